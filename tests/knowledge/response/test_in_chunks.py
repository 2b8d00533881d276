from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage import DIST, DKD, KD, Batch, Distillation, GeneralizedJSD, Record, TaskLoss, methods
from tutelage.functional import generalized_jsd, kd_divergence, task_cross_entropy
from tutelage.knowledge.response.in_chunks import Hidden, InChunks, chunked
from tutelage.views import Inputs

FORMULAS = [
    pytest.param(partial(kd_divergence, temperature=1.0), id="forward"),
    pytest.param(partial(kd_divergence, temperature=3.0), id="softened"),
    pytest.param(partial(generalized_jsd, beta=1), id="reverse"),
    pytest.param(partial(generalized_jsd, beta=0.3), id="jsd"),
]


def sides(dtype=torch.float32, **student):
    torch.manual_seed(0)
    parts = {
        "states": torch.randn(2, 5, 4, dtype=dtype).requires_grad_(),
        "weight": torch.randn(11, 4, dtype=dtype).requires_grad_(),
        "bias": torch.randn(11, dtype=dtype).requires_grad_(),
    }
    return Hidden(**parts, **student), Hidden(torch.randn(2, 5, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype))


def gradients(value, hidden):
    return torch.autograd.grad(3 * value, [hidden.states, hidden.weight, hidden.bias])


@pytest.mark.parametrize("chunk", [1, 3, 100, None])
@pytest.mark.parametrize("head", [{}, {"scale": 0.5}, {"softcap": 2.0}, {"scale": 2.0, "softcap": 1.5}])
@pytest.mark.parametrize("formula", FORMULAS)
def test_value_and_gradients_are_those_of_all_logits_at_once(formula, head, chunk):
    student, teacher = sides(torch.float64, **head)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]) > 0
    value = chunked(formula, student, teacher, mask=mask, chunk=chunk)
    direct = formula(student.logits()[mask], teacher.logits()[mask])
    torch.testing.assert_close(value, direct)
    for mine, theirs in zip(gradients(value, student), gradients(direct, student), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("formula", FORMULAS)
def test_float32_gradients_are_within_1e_4_of_float64s(formula):
    exact, single = sides(torch.float64), sides(torch.float64)
    low = [Hidden(*(None if t is None else t.detach().float() for t in (h.states, h.weight, h.bias))) for h in single]
    for tensor in (low[0].states, low[0].weight, low[0].bias):
        tensor.requires_grad_()
    mine = gradients(chunked(formula, *low, chunk=2), low[0])
    theirs = gradients(formula(exact[0].logits(), exact[1].logits()), exact[0])
    for a, b in zip(mine, theirs, strict=True):
        assert (a.double() - b).norm() < 1e-4 * b.norm()


def test_a_soft_cap_is_the_formula_that_gemma_has():
    student, _ = sides(softcap=3.0)
    plain = F.linear(student.states, student.weight, student.bias)
    torch.testing.assert_close(student.logits(), 3.0 * torch.tanh(plain / 3.0))


def test_labels_are_chunked_too_and_masked_positions_change_nothing():
    student, _ = sides()
    labels = torch.tensor([[1, 2, -100, 10, 0], [-100, -100, 4, 4, 9]])
    known = labels != -100
    value = chunked(task_cross_entropy, student, labels, mask=known, chunk=2)
    torch.testing.assert_close(value, F.cross_entropy(student.logits().transpose(1, 2), labels))
    (d_states,) = torch.autograd.grad(value, student.states)
    assert d_states[~known].abs().max() == 0
    nothing = chunked(task_cross_entropy, student, labels, mask=torch.zeros_like(known))
    assert nothing == 0
    assert all(g.abs().max() == 0 for g in gradients(nothing, student))


def test_half_precision_weights_keep_what_many_chunks_add():
    torch.manual_seed(0)
    weight = (torch.randn(7, 4) / 2).bfloat16().requires_grad_()
    states, labels = torch.randn(512, 4).bfloat16(), torch.randint(7, (512,))
    (mine,) = torch.autograd.grad(chunked(task_cross_entropy, Hidden(states, weight), labels, chunk=1), weight)
    exact_weight = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.cross_entropy(states.double() @ exact_weight.T, labels), exact_weight)
    assert mine.dtype == torch.bfloat16
    assert (mine.double() - exact).norm() < 0.01 * exact.norm()


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


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


def test_all_logits_are_never_there_at_once():
    states, weight = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    teacher = Hidden(torch.randn(64, 8), torch.randn(100, 8))
    with Largest() as largest:
        chunked(kd_divergence, Hidden(states, weight), teacher, chunk=4).backward()
    assert largest.numbers == weight.numel()  # its own gradient; a chunk has half as many logits


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
    student, teacher = sides()
    with pytest.raises(ValueError, match="mask of shape"):
        chunked(kd_divergence, student, teacher, mask=torch.ones(3) > 0)
    with pytest.raises(ValueError, match="positions of shape"):
        chunked(kd_divergence, student, teacher.rows(slice(1)))
