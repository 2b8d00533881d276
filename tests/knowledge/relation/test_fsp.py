from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tutelage.knowledge.relation.fsp as module
from tutelage import Distillation
from tutelage.knowledge.relation.fsp import FSP, fsp, fsp_matrix
from tutelage.models import SmallCNN


def rebuilt(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float().double()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and 0 not in value.stride():
                self.numbers = max(self.numbers, value.numel())
        return result


def test_value_and_gradient_of_the_crd_studys_code():
    student = [rebuilt(10, 4, 5, 8, 8).requires_grad_(), rebuilt(11, 4, 6, 4, 4).requires_grad_()]
    teacher = rebuilt(12, 4, 5, 8, 8), rebuilt(13, 4, 6, 4, 4)
    value = fsp(student, teacher, "average")
    gradients = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(0.025228457352813708, rel=1e-9)
    assert sum(g.square().sum() for g in gradients).sqrt().item() == pytest.approx(0.005360514002246034, rel=1e-9)


@pytest.mark.parametrize("pool", ["max", "average"])
def test_the_matrix_is_the_loop_over_channels_and_positions(pool):
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 5, 2, 3, dtype=torch.float64)
    matrix = fsp_matrix(first, second, pool)
    assert matrix.shape == (2, 3, 5)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                total = 0.0
                for y in range(2):
                    for x in range(3):
                        window = first[b, i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                        total += (window.max() if pool == "max" else window.mean()) * second[b, j, y, x]
                assert matrix[b, i, j].item() == pytest.approx(total.item() / 6)


def test_each_axis_meets_at_the_smaller():
    tall, wide = torch.ones(1, 2, 8, 3), torch.ones(1, 3, 4, 6)
    torch.testing.assert_close(fsp_matrix(tall, wide), torch.ones(1, 2, 3))


def test_positions_in_another_order_and_models_of_other_sizes_are_the_same_flow():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    assert fsp((first.flip(3), second.flip(3)), (first, second)) < 1e-12
    twice = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (first, second)]
    assert fsp(twice, (first, second)) < 1e-12
    assert fsp((first.flip(3), second), (first, second)) > 1e-3


def test_sequences_are_compared_over_tokens_and_rows_by_outer_products():
    torch.manual_seed(0)
    first, second = torch.randn(2, 7, 3), torch.randn(2, 7, 4)
    torch.testing.assert_close(fsp_matrix(first, second), torch.einsum("bnc,bnd->bcd", first, second) / 7)
    torch.testing.assert_close(
        fsp_matrix(first[:, 0], second[:, 0]), torch.einsum("bc,bd->bcd", first[:, 0], second[:, 0])
    )


def test_memory_is_channels_squared_and_never_channels_squared_times_pixels():
    torch.manual_seed(0)
    student = [torch.randn(2, 32, 16, 16, requires_grad=True), torch.randn(2, 32, 16, 16)]
    with Largest() as largest:
        fsp(student, [torch.randn(2, 32, 16, 16), torch.randn(2, 32, 16, 16)]).backward()
    assert largest.numbers <= 2 * 32 * 16 * 16 < 2 * 32 * 32 * 16 * 16


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("layers_first", [True, False])
@pytest.mark.parametrize("mapped", [(False, False), (True, False), (False, True), (True, True)])
def test_projected_flows_and_their_gradients_are_those_of_projected_layers(monkeypatch, mapped, layers_first, chunk):
    torch.manual_seed(0)
    student = [torch.randn(3, c, 4, 4, dtype=torch.float64, requires_grad=True) for c in (3, 5)]
    channels = [n if own else c for own, n, c in zip(mapped, (4, 6), (3, 5), strict=True)]
    teacher = [torch.randn(3, c, 2, 2, dtype=torch.float64) for c in channels]
    maps = [
        torch.randn(n, c, dtype=torch.float64, requires_grad=True) if own else None
        for own, n, c in zip(mapped, (4, 6), (3, 5), strict=True)
    ]
    monkeypatch.setattr(module, "_layers_first", lambda *args: layers_first)
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk * channels[0] * channels[1])
    projected = [x if w is None else torch.einsum("dc,bcyx->bdyx", w, x) for w, x in zip(maps, student, strict=True)]
    expected = (fsp_matrix(*projected) - fsp_matrix(*teacher)).square().mean()
    learned = [x for x in (*student, *maps) if x is not None]
    wanted = torch.autograd.grad(3 * expected, learned)
    value = fsp(student, teacher, projections=maps)
    torch.testing.assert_close(value, expected)
    for mine, gradient in zip(torch.autograd.grad(3 * value, learned), wanted, strict=True):
        torch.testing.assert_close(mine, gradient)


def test_the_cheaper_way_to_map_channels_is_taken():
    def layers_first(c, d, c_t, d_t, positions):
        shapes = (1, c, positions), (1, d, positions), (c_t, c), (d_t, d)
        return module._layers_first(*(torch.empty(shape) for shape in shapes))

    assert not layers_first(64, 128, 256, 512, positions=784), "many positions: 25 million products, not 167"
    assert layers_first(256, 512, 1024, 2048, positions=49), "few positions: 167 million products, not 1,214"


def test_no_matrix_waits_for_the_backward_pass():
    student = [torch.randn(8, 64, 4, 4, requires_grad=True), torch.randn(8, 64, 4, 4, requires_grad=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        fsp(student, [x.detach() for x in student])
    assert max(kept) <= 8 * 64 * 16 < 8 * 64 * 64


def test_refusals():
    a, b = torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"\(3, 3\) channels and the teacher's \(3, 5\)"):
        fsp((a, a), (a, b))
    with pytest.raises(ValueError, match="2 of the student, 3 of the teacher"):
        fsp((a, b), (torch.ones(3, 3, 4, 4), torch.ones(3, 5, 4, 4)))
    with pytest.raises(ValueError, match="pool='maximum'"):
        FSP(pool="maximum")
    with pytest.raises(ValueError, match=r"pool='mean': expected one of \('max', 'average'\)"):
        fsp((a, b), (a, b), "mean")
    with pytest.raises(ValueError, match=r"expected a map \(B, C, H, W\)"):
        fsp_matrix(torch.ones(2, 3, 4, 4, 4), a)
    with pytest.raises(ValueError, match=r"at least two pairs of taps, got 1 \(stage2\)"):
        Distillation(SmallCNN(4), SmallCNN(4), losses=[FSP("stage2")]).bind(torch.randn(2, 1, 16, 16))


def test_reads_every_stage_and_sums_the_steps_between_them():
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 16, 16)
    whole = FSP()
    early, late = FSP("stage1", "stage2", name="early"), FSP("stage2", "stage3", name="late")
    losses = Distillation(SmallCNN(4), SmallCNN(4), losses=[whole, early, late]).bind(inputs)(inputs)
    assert whole.pairs == [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")]
    torch.testing.assert_close(losses["FSP"], losses["early"] + losses["late"])
    assert not list(whole.parameters()), "equal channels need no projector"


def test_projectors_learn_and_stay_out_of_the_student():
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 16, 16)
    loss = FSP("stage1", "stage2")
    student = SmallCNN(4)
    keys = set(student.state_dict())
    d = Distillation(student, SmallCNN(6), losses=[loss]).bind(inputs)
    d(inputs).total.backward()
    assert [p.shape for p in loss.projectors.parameters()] == [(6, 4), (12, 8)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.projectors.parameters())
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in d.parameters()}
    assert set(student.state_dict()) == keys


def test_a_first_stage_carries_the_flow_over_to_fresh_samples():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()) for _ in range(2))
    inputs, fresh = torch.randn(32, 1, 12, 12), torch.randn(32, 1, 12, 12)
    d = Distillation(student, teacher, losses=[FSP("1", "3")]).bind(inputs)

    def between():
        with torch.no_grad():
            return d(fresh).total

    before = between()
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert between() < 0.3 * before
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_reach_both_of_the_students_layers_and_none_of_the_teachers():
    torch.manual_seed(0)
    layers = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(4)]
    fsp(layers[:2], layers[2:]).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in layers[:2])
    assert all(x.grad is None for x in layers[2:])


def test_in_chunks_of_samples_it_is_the_same(monkeypatch):
    from tutelage.knowledge.relation import fsp as module

    torch.manual_seed(0)
    teacher = [torch.randn(5, 3, 6, 6), torch.randn(5, 4, 3, 3)]
    results = []
    for numbers in (2**23, 24, 1):  # all samples at once, two, one
        monkeypatch.setattr(module, "CHUNK_NUMBERS", numbers)
        torch.manual_seed(1)
        student = [torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, 4, 4, 4, requires_grad=True)]
        value = fsp(student, teacher)
        value.backward()
        results.append([value.detach(), *(x.grad for x in student)])
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, theirs)
