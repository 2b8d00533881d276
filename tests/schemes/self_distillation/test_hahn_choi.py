from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, RKD, AttentionTransfer, Distillation, HahnChoi, InChunks, LabelSmoothing, TaskLoss, distill
from tutelage.data import pydoc_loaders
from tutelage.functional import hahn_choi, label_smoothing, word_closeness
from tutelage.models import SmallCNN, SmallLanguageModel, SmallLSTM
from tutelage.schemes.self_distillation.hahn_choi import embedding_layer
from tutelage.views import UNLABELLED, Inputs


def given(words: int = 7, positions: int = 5, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    logits = torch.randn(positions, words, dtype=dtype, requires_grad=True)
    return logits, torch.randint(words, (positions,)), torch.randn(words, 3, dtype=dtype, requires_grad=True)


def naive_closeness(e: torch.Tensor, true: int, words: list[int], temperature: float) -> torch.Tensor:
    squares = [(e[i] - e[j]).square().sum() for i in range(len(e)) for j in range(len(e)) if i != j]
    unit = temperature * (sum(squares) / len(squares)).sqrt()
    near = torch.stack([(-(e[w] - e[true]).square().sum().sqrt() / unit).exp() for w in words])
    return near / near.sum()


def test_closeness_and_loss_equal_their_loops():
    logits, target, e = given()
    total = 0.0
    for row, true in zip(logits, target.tolist(), strict=True):
        others = sorted((w for w in range(7) if w != true), key=lambda w: -row[w].item())[:3]
        q = naive_closeness(e.detach(), true, [true, *others], 0.4)
        torch.testing.assert_close(word_closeness(e, torch.tensor([[true, *others]]), 0.4)[0], q)
        y = 0.75 * F.one_hot(torch.tensor(true), 7).double()
        y[[true, *others]] += 0.25 * q
        total = total - (y * row.log_softmax(0)).sum()
    torch.testing.assert_close(hahn_choi(logits, target, e, 0.25, 3, 0.4), total / 5)


def test_it_ends_in_cross_entropy_and_in_label_smoothing():
    logits, target, e = given()
    for known in (hahn_choi(logits, target, e, alpha=0.0), hahn_choi(logits, target, e, 0.7, temperature=1e-4)):
        torch.testing.assert_close(known, F.cross_entropy(logits, target))
    alike = hahn_choi(logits, target, e, alpha=0.3, words=100, temperature=1e9)
    torch.testing.assert_close(alike, label_smoothing(logits, target, 0.3))


def test_closeness_knows_no_scale_place_or_rotation_of_the_embeddings():
    _, _, e = given()
    words = torch.tensor([[0, 1, 2, 3], [4, 0, 5, 6]])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(word_closeness(7 * e @ turn + 5, words), word_closeness(e, words))
    q = word_closeness(e, words, 2.0)
    torch.testing.assert_close(q.sum(1), torch.ones(2).double())
    assert (q[:, :1] >= q).all(), "the true word has the most"
    distances = (e[words] - e[words[:, :1]]).norm(dim=2)
    assert (q.gather(1, distances.argsort(1)).diff(dim=1) <= 0).all(), "the nearer, the more"


def test_the_gradient_is_that_of_finite_differences_and_not_one_of_the_embeddings():
    logits, target, e = given()
    assert torch.autograd.gradcheck(lambda z: hahn_choi(z, target, e, 0.5, 100, 0.5), logits)
    hahn_choi(logits, target, e, 0.5).backward()
    assert logits.grad.abs().sum() > 0
    assert e.grad is None


@pytest.mark.parametrize("spoil", ["zero", "equal", "huge", "tiny", "two equal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_degenerate_embeddings_and_extreme_logits_are_finite(spoil, dtype):
    logits, target, e = given(dtype=torch.float32)
    e = e.detach()
    e = {"zero": 0 * e, "equal": 0 * e + e[:1], "huge": 1e4 * e, "tiny": 1e-6 * e, "two equal": e}[spoil].clone()
    if spoil == "two equal":
        e[1] = e[0]
    for scale in (1, 500):
        z = (logits.detach().sign() * scale).to(dtype).requires_grad_()
        value = hahn_choi(z, target, e.to(dtype), 0.5)
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert z.grad.isfinite().all()
    one = torch.zeros(2, 1, requires_grad=True)
    assert hahn_choi(one, torch.zeros(2).long(), torch.ones(1, 3)) == 0, "a vocabulary of one word"


def test_masked_tokens_count_for_nothing():
    torch.manual_seed(0)
    logits, e = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, 3)
    target = torch.tensor([[1, 2, UNLABELLED, UNLABELLED], [3, 4, 5, UNLABELLED]])
    value = hahn_choi(logits, target, e, 0.5)
    value.backward()
    kept = target != UNLABELLED
    torch.testing.assert_close(value, hahn_choi(logits[kept], target[kept], e, 0.5))
    assert logits.grad[~kept].abs().max() == 0
    nothing = hahn_choi(logits, torch.full_like(target, UNLABELLED), e, 0.5)
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert (nothing, gradient.abs().max()) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, r"alpha=1.5: expected a number from 0 to 1"),
        ({"words": 0}, r"words=0: expected 1 or more"),
        ({"temperature": 0.0}, r"temperature=0.0: expected a positive number"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        hahn_choi(*given(), **wrong)
    with pytest.raises(ValueError, match=f"HahnChoi: {message}"):
        HahnChoi(**wrong)


def test_other_numbers_of_words_are_refused():
    logits, target, e = given()
    with pytest.raises(ValueError, match=r"embeddings of shape \(6, 3\): expected a row for each of the 7 words"):
        hahn_choi(logits, target, e[:6])


# where the embeddings are

BATCH = {"input_ids": torch.tensor([[1, 2, 3, 1]]), "labels": torch.tensor([[2, 3, 1, UNLABELLED]])}
INPUTS = Inputs((), {"input_ids": BATCH["input_ids"]})


class Plain(nn.Module):
    """A model without the methods that name its embeddings, whose input has other words than its output."""

    def __init__(self, words_in: int = 9, words_out: int = 9):
        super().__init__()
        self.embed, self.fc = nn.Embedding(words_in, 4), nn.Linear(4, words_out)

    def forward(self, input_ids):
        return self.fc(self.embed(input_ids))


def test_the_layer_is_found_by_its_role_or_name():
    plain, own = Plain(), SmallLSTM(9, width=4, tied=False)
    assert embedding_layer(plain, INPUTS) is plain.fc
    assert embedding_layer(plain, INPUTS, "input") is plain.embed
    assert embedding_layer(plain, INPUTS, "embed") is plain.embed
    assert embedding_layer(own, INPUTS) is own.head
    assert embedding_layer(own, INPUTS, "input") is own.embedding


def test_models_of_transformers_say_where_their_embeddings_are():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    assert embedding_layer(model, INPUTS, "input") is model.transformer.wte
    assert embedding_layer(model, INPUTS) is model.lm_head
    logits = model(BATCH["input_ids"]).logits
    expected = hahn_choi(logits, BATCH["labels"], model.lm_head.weight, 0.5)
    losses = Distillation(model, losses=[HahnChoi(alpha=0.5)]).bind(BATCH)(BATCH)
    torch.testing.assert_close(losses.total, expected)


@pytest.mark.parametrize(
    ("model", "address", "message"),
    [
        (Plain(9, 8), "input", r"HahnChoi: embedding='input' has 9 words and the logits have 8"),
        (Plain(), "embedd", r"HahnChoi: embedding='embedd': Plain has no module of this name; nearest: 'embed'"),
        (
            SmallLanguageModel(9, width=4),
            "norm",
            r"embedding='norm': expected a layer with a matrix of words, got Layer",
        ),
    ],
)
def test_a_layer_that_is_absent_or_of_another_vocabulary_is_refused(model, address, message):
    with pytest.raises(ValueError, match=message):
        Distillation(model, losses=[HahnChoi(address)]).bind(BATCH)


def test_a_network_without_words_to_read_is_refused():
    images, d = torch.ones(2, 1, 28, 28), Distillation(SmallCNN(4), losses=[HahnChoi("input")])
    with pytest.raises(ValueError, match=r"HahnChoi: embedding='input': SmallCNN has no nn.Embedding"):
        d.bind((images, torch.tensor([0, 1])))


# in a training


def test_the_loss_is_cross_entropy_before_its_time_and_reads_the_embeddings_of_the_moment():
    torch.manual_seed(0)
    model = SmallLSTM(9, width=4)
    d = Distillation(model, losses=[HahnChoi(words=3, temperature=1.0)]).bind(BATCH)
    logits = model(BATCH["input_ids"])
    torch.testing.assert_close(d(BATCH)["HahnChoi"], F.cross_entropy(logits[0, :3], BATCH["labels"][0, :3]).detach())
    d.progress = 0.2
    for _ in range(2):
        now = hahn_choi(model(BATCH["input_ids"]), BATCH["labels"], model.head.weight, 0.3, 3, 1.0)
        torch.testing.assert_close(d(BATCH)["HahnChoi"], now.detach())
        nn.init.normal_(model.embedding.weight)
    assert list(d.owned.parameters()) == [], "the words stay the student's"


def test_any_losses_stand_beside_it():
    torch.manual_seed(0)
    student, teacher = SmallCNN(4), SmallCNN(8)
    losses = [HahnChoi(alpha=0.5, words=3), KD(), AttentionTransfer("stage1"), RKD("linear:input")]
    batch = torch.randn(6, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4, UNLABELLED])
    d = Distillation(student, teacher, losses=losses).bind(batch)
    d(batch).total.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_in_chunks_it_is_the_same():
    torch.manual_seed(0)
    model, found = SmallLSTM(9, width=4), []
    for loss in (HahnChoi(alpha=0.5), InChunks(HahnChoi(alpha=0.5), chunk=2)):
        model.zero_grad()
        losses = Distillation(model, losses=[loss]).bind(BATCH)(BATCH)
        losses.total.backward()
        found.append((losses.total.detach(), model.lstm.weight_ih_l0.grad.clone()))
    torch.testing.assert_close(*found)


@functools.cache
def text():
    return pydoc_loaders(vocabulary=500, validation=100, limit=300)


def mass_near(model: nn.Module, near: int = 10) -> float:
    """Of the probability that is not on the true word, the part on the 10 words nearest to it."""
    e = model.head.weight.detach()
    apart = torch.cdist(e, e).fill_diagonal_(float("inf"))
    closest = apart.topk(near, largest=False).indices
    data = text().validation.dataset
    model.eval()
    with torch.no_grad():
        p, labels = model(data.inputs).softmax(2).flatten(0, 1), data.labels.flatten()
    p, labels = p[labels != UNLABELLED], labels[labels != UNLABELLED]
    wrong = 1 - p.gather(1, labels[:, None])
    return (p.gather(1, closest[labels]).sum(1, keepdim=True) / wrong).mean().item()


def trained(loss, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = SmallLSTM(500, width=32)
    distill(
        model, None, text().train, losses=[loss], epochs=8, optimizer="adamw", lr=0.01, scheduler="constant",
        progress=False, seed=seed,
    )  # fmt: skip
    return model


def test_words_near_the_true_one_get_more_than_under_cross_entropy_and_label_smoothing():
    """The quantity that defines the method; the perplexity is no better here than with plain cross-entropy."""
    soft = HahnChoi(alpha=0.5, words=20, temperature=0.4)
    near = {type(loss).__name__: mass_near(trained(loss, 0)) for loss in (soft, TaskLoss(), LabelSmoothing())}
    assert near["HahnChoi"] > near["TaskLoss"]
    assert near["HahnChoi"] > near["LabelSmoothing"]
