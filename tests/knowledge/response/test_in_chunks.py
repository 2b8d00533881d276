from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import (
    DIST,
    DKD,
    KD,
    Batch,
    Distillation,
    GeneralizedJSD,
    InChunks,
    Record,
    SkewKL,
    TaskLoss,
    TopKKD,
    TotalVariation,
    methods,
)
from tutelage.views import Inputs

RANDOM = ("NoisyTeacher", "DKPP")
SEPARABLE = [m.thing for m in methods() if m.role == "losses" and m.thing.separable and m.name not in RANDOM]


@pytest.mark.parametrize("kind", [TaskLoss, *SEPARABLE])
def test_losses_that_call_themselves_separable_are_means_of_their_positions(kind):
    torch.manual_seed(0)
    loss = kind().at() if kind is not TaskLoss else kind()
    model = nn.Linear(2, 5)  # HahnChoi reads the weights of the last layer
    loss.resolve(model, model, Batch(Inputs(), Inputs()))
    student, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 1, 4, 4, 2, 0])

    def value(rows):
        batch = Batch(Inputs(), Inputs(), labels[rows], progress=0.5)
        return loss(Record(student[rows]), Record(teacher[rows]), batch)

    parts = torch.stack([value(slice(i, i + 1)) for i in range(6)])
    torch.testing.assert_close(value(slice(6)), parts.mean())


@pytest.mark.parametrize("make", [TaskLoss, KD, GeneralizedJSD, SkewKL, TotalVariation, TopKKD])
def test_a_distillation_never_has_all_logits_either(make, largest_tensor):
    """Of positions that are more than a chunk has by default, from the models' inputs to the gradients."""
    torch.manual_seed(0)
    words, width = 2**16, 2  # a chunk has 64 positions
    student, teacher = (nn.Sequential(nn.Embedding(words, width), nn.Linear(width, words)) for _ in range(2))
    ids = torch.randint(words, (2, 130))
    labels = torch.where(ids % 4 == 0, -100, ids)
    d = Distillation(student, teacher, losses=[InChunks(make())]).bind({"input": ids[:, :9], "labels": labels[:, :9]})
    with largest_tensor() as largest:
        d({"input": ids, "labels": labels}).total.backward()
    assert largest.numbers == 64 * words
    assert student[1].bias.grad.abs().sum() > 0


class LanguageModel(nn.Module):
    def __init__(self, width: int, words: int = 13, cap: float | None = None):
        super().__init__()
        self.embedding, self.body = nn.Embedding(words, width), nn.GRU(width, width, batch_first=True)
        self.lm_head, self.cap = nn.Linear(width, words, bias=False), cap

    def forward(self, input_ids):
        logits = self.lm_head(self.body(self.embedding(input_ids))[0])
        return {"logits": logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)}


@pytest.fixture
def batch():
    ids = torch.randint(13, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    labels[1, 3:] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    "make", [lambda: [TaskLoss(weight=0.5), KD(temperature=2.0)], lambda: [GeneralizedJSD(beta=0.2)], lambda: [DKD()]]
)
def test_losses_inside_give_what_they_give_outside_and_the_head_is_not_run(make, batch):
    torch.manual_seed(0)
    student, teacher = LanguageModel(6), LanguageModel(9)
    other = copy.deepcopy(student)
    d = Distillation(student, teacher, losses=[InChunks(loss, chunk=4) for loss in make()]).bind(batch)
    e = Distillation(other, teacher, losses=make()).bind(batch)
    runs = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    losses, expected = d(batch), e(batch)
    assert len(runs) == 1  # the teacher's, for the whole form
    torch.testing.assert_close(losses.total, expected.total)
    assert losses.weights == expected.weights
    assert sorted(losses.values) == sorted(expected.values)
    losses.total.backward()
    expected.total.backward()
    for (name, mine), theirs in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    assert all(p.grad is None for p in teacher.parameters())
    assert {k: int(v) for k, v in d.units(batch).items()} == {k: int(v) for k, v in e.units(batch).items()}


def test_transformers_models_with_soft_caps_and_tied_heads(batch):
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=13, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, final_logit_softcapping=2.0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = (transformers.Gemma2ForCausalLM(config) for _ in range(2))
    with torch.no_grad():  # far enough for the cap to matter
        for model in (student, teacher):
            model.lm_head.weight.mul_(40)
    whole = Distillation(copy.deepcopy(student), teacher, losses=[KD(temperature=1.0)])
    parts = Distillation(student, teacher, losses=[InChunks(KD(temperature=1.0), chunk=4)])
    a, b = whole(batch), parts(batch)
    torch.testing.assert_close(a.total, b.total, rtol=1e-4, atol=1e-5)
    a.total.backward()
    b.total.backward()
    assert student.lm_head.weight is student.model.embed_tokens.weight
    for (name, mine), theirs in zip(whole.student.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_what_cannot_be_done_in_chunks_is_refused_by_name(batch):
    with pytest.raises(TypeError, match="InChunks: DIST is no response loss"):
        InChunks(DIST())
    with pytest.raises(ValueError, match="chunk=0: expected 1 or more"):
        InChunks(KD(), chunk=0)
    with pytest.raises(ValueError, match=r"KD: the linear layer 'lm_head' does not give the logits of LanguageModel"):
        Distillation(LanguageModel(6), LanguageModel(6, cap=0.1), losses=[InChunks(KD())]).bind(batch)
    with pytest.raises(ValueError, match=r"KD: the heads have \[13, 14\] words"):
        Distillation(LanguageModel(6), LanguageModel(6, words=14), losses=[InChunks(KD())]).bind(batch)
