from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.functional import (
    generalized_jsd,
    kd_divergence,
    skew_kl,
    task_cross_entropy,
    top_k_kd,
    total_variation,
)
from tutelage.knowledge.response.chunks import Hidden, chunked

FORMULAS = [
    pytest.param(partial(kd_divergence, temperature=1.0), id="forward"),
    pytest.param(partial(kd_divergence, temperature=3.0), id="softened"),
    pytest.param(partial(generalized_jsd, beta=1), id="reverse"),
    pytest.param(partial(generalized_jsd, beta=0.3), id="jsd"),
    pytest.param(skew_kl, id="skew"),
    pytest.param(partial(skew_kl, reverse=True), id="reverse skew"),
    pytest.param(total_variation, id="tvd"),
    pytest.param(partial(top_k_kd, k=3, temperature=2.0), id="top-k"),
]


def sides(dtype=torch.float32, **student):
    torch.manual_seed(0)
    parts = {
        "states": torch.randn(2, 5, 4, dtype=dtype).requires_grad_(),
        "weight": torch.randn(11, 4, dtype=dtype).requires_grad_(),
        "bias": torch.randn(11, dtype=dtype).requires_grad_(),
    }
    return Hidden(**parts, **student), Hidden(torch.randn(2, 5, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype))


NAMES = ("states", "weight", "bias")


def gradients(value, hidden):
    return torch.autograd.grad(3 * value, [getattr(hidden, name) for name in NAMES])


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


@pytest.mark.parametrize("head", [{}, {"scale": 2.0, "softcap": 3.0}])
@pytest.mark.parametrize("formula", FORMULAS)
def test_float32_values_and_gradients_are_within_1e_4_of_float64s(formula, head):
    exact, single = sides(torch.float64, **head), sides(torch.float64, **head)
    low = [
        replace(h, **{n: getattr(h, n).detach().float() for n in NAMES if getattr(h, n) is not None}) for h in single
    ]
    for name in NAMES:
        getattr(low[0], name).requires_grad_()
    mine = chunked(formula, *low, chunk=2)
    theirs = formula(exact[0].logits(), exact[1].logits())
    assert abs(mine.double() - theirs) < 1e-4 * theirs
    for a, b in zip(gradients(mine, low[0]), gradients(theirs, exact[0]), strict=True):
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


@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 2.0}])
@pytest.mark.parametrize("formula", FORMULAS)
def test_all_logits_are_never_there_at_once(formula, head, largest_tensor):
    states, weight = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    teacher = Hidden(torch.randn(64, 8), torch.randn(100, 8), **head)
    with largest_tensor() as largest:
        chunked(formula, Hidden(states, weight, **head), teacher, chunk=4).backward()
    assert largest.numbers == weight.numel()  # its own gradient; a chunk has half as many logits


def products(run):
    """How many matrix products it makes, and what it returns."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    with Products() as mode:
        found = run()
    return mode.count, found


def test_what_needs_no_gradient_costs_none():
    student, teacher = sides()
    frozen_head = replace(student, weight=student.weight.detach(), bias=student.bias.detach())
    frozen_states = replace(student, states=student.states.detach())
    counts = {}
    for name, side in (("all", student), ("head", frozen_head), ("states", frozen_states)):
        counts[name], value = products(partial(chunked, kd_divergence, side, teacher))
        torch.testing.assert_close(value, kd_divergence(student.logits(), teacher.logits()))
        for tensor in (side.states, side.weight, side.bias):
            if tensor.requires_grad:
                mine, theirs = (
                    torch.autograd.grad(v, tensor, retain_graph=True)[0]
                    for v in (value, kd_divergence(side.logits(), teacher.logits()))
                )
                torch.testing.assert_close(mine, theirs)
    # the logits of both, the gradient of the states, the gradient of the weight
    assert counts == {"all": 4, "head": 3, "states": 3}
    with torch.no_grad():
        count, value = products(partial(chunked, kd_divergence, student, teacher))
    assert count == 2
    assert not value.requires_grad


def test_gradients_are_let_go_after_the_backward_pass_and_kept_when_the_graph_is():
    student, teacher = sides()
    value = chunked(kd_divergence, student, teacher)
    first, second = (torch.autograd.grad(value, student.weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    (value * 1.0).backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        (value * 1.0).backward()
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice \(create_graph=True\)"):
        torch.autograd.grad(chunked(kd_divergence, student, teacher), student.weight, create_graph=True)


def test_weights_of_positions_are_one_more_tensor_beside_the_logits():
    student, teacher = sides()
    weights = torch.rand(2, 5)

    def weighted(mine, theirs, weights):
        rows = F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        return (rows * weights).mean()

    value = chunked(weighted, student, teacher, weights, chunk=3)
    direct = weighted(student.logits(), teacher.logits(), weights)
    torch.testing.assert_close(value, direct)
    torch.testing.assert_close(gradients(value, student), gradients(direct, student))


def test_autocast_and_states_of_another_precision_change_the_precision_alone():
    student, teacher = sides()
    direct = kd_divergence(student.logits(), teacher.logits())
    with torch.autocast("cpu", torch.bfloat16):
        value = chunked(kd_divergence, student, teacher, chunk=4)
    torch.testing.assert_close(value, direct)
    torch.testing.assert_close(gradients(value, student), gradients(direct, student))
    half = replace(student, states=student.states.detach().bfloat16().requires_grad_())
    value = chunked(kd_divergence, half, teacher, chunk=4)
    torch.testing.assert_close(value, direct, rtol=2e-2, atol=0.0)
    assert torch.autograd.grad(value, half.states)[0].dtype == torch.bfloat16


def test_positions_that_do_not_fit_are_refused():
    student, teacher = sides()
    with pytest.raises(ValueError, match="mask of shape"):
        chunked(kd_divergence, student, teacher, mask=torch.ones(3) > 0)
    with pytest.raises(ValueError, match="positions of shape"):
        chunked(kd_divergence, student, teacher.rows(slice(1)))
