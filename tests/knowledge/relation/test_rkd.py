from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage import Distillation
from tutelage.knowledge.relation import rkd
from tutelage.knowledge.relation.rkd import RKD, rkd_angle, rkd_distance


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            # views of stride 0 hold nothing
            if isinstance(value, torch.Tensor) and 0 not in value.stride():
                self.numbers = max(self.numbers, value.numel())
        return result


def test_reference_value_of_distances(agrees):
    agrees("rkd_distance", rkd_distance)


def test_distances_are_the_loop_over_pairs():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)

    def relative(x):
        distances = [[(a - b).norm().item() for b in x] for a in x]
        positive = [d for row in distances for d in row if d > 0]
        return [[d * len(positive) / sum(positive) for d in row] for row in distances]

    pairs = zip(relative(student), relative(teacher), strict=True)
    total = sum(huber(a - b) for s, t in pairs for a, b in zip(s, t, strict=True))
    assert rkd_distance(student, teacher).item() == pytest.approx(total / 25)


def test_angles_are_the_loop_over_triples():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)

    def cosine(x, j, i, k):
        if i in (j, k):
            return 0.0
        a, b = x[j] - x[i], x[k] - x[i]
        return ((a @ b) / (a.norm() * b.norm())).item()

    triples = [(j, i, k) for i in range(5) for j in range(5) for k in range(5)]
    total = sum(huber(cosine(student, *t) - cosine(teacher, *t)) for t in triples)
    assert rkd_angle(student, teacher).item() == pytest.approx(total / 125)


@pytest.mark.parametrize("formula", [rkd_distance, rkd_angle])
def test_rotation_shift_and_scale_do_not_count(formula):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(formula(3 * student - 1, 5 * teacher @ rotation + 2), formula(student, teacher))
    assert formula(7 * teacher @ rotation + 1, teacher) < 1e-20


@pytest.mark.parametrize("formula", [rkd_distance, rkd_angle])
def test_close_points_far_from_the_origin_keep_their_relations(formula):
    # their squared norms are 1e6 times the squared distances, which in float32 leaves nothing of |x|² + |y|² − 2xy
    torch.manual_seed(0)
    near = torch.randn(6, 64) / 1024
    far = near + 8  # exact in float32 up to the rounding of `near`
    teacher = torch.randn(6, 16)
    exact = formula((far.double() - 8), teacher.double()).float()
    torch.testing.assert_close(formula(far, teacher), exact, rtol=1e-4, atol=1e-7)


def test_equal_points_are_left_out_of_the_mean_distance():
    student = torch.tensor([[0.0], [0.0], [2.0]], requires_grad=True)
    teacher = torch.tensor([[0.0], [1.0], [2.0]])
    # student: 0, 2, 2 over a mean of 2; teacher: 1, 2, 1 over a mean of 4/3
    expected = 2 * (huber(0 - 0.75) + huber(1 - 1.5) + huber(1 - 0.75)) / 9
    assert rkd_distance(student, teacher).item() == pytest.approx(expected)


def test_samples_of_any_shape_are_flattened():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 2, 3, 3), torch.randn(4, 5)
    torch.testing.assert_close(rkd_distance(student, teacher), rkd_distance(student.flatten(1), teacher))
    torch.testing.assert_close(rkd_angle(student, teacher), rkd_angle(student.flatten(1), teacher))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_change_neither_value_nor_gradient(chunk):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 7).double()
    whole, parts = rkd_angle(student, teacher), rkd_angle(student, teacher, chunk=chunk)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (parts, whole)))
    with pytest.raises(ValueError, match="chunk=0"):
        rkd_angle(student, teacher, chunk=0)


def test_neither_pass_makes_a_tensor_of_all_triples(monkeypatch):
    monkeypatch.setattr(rkd, "CHUNK_NUMBERS", 40_000)
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 8, requires_grad=True), torch.randn(64, 16)
    with Largest() as largest:
        rkd_angle(student, teacher).backward()
    assert largest.numbers <= 40_000 < 64**3
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    # what autograd keeps outside the chunks that it calculates again
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rkd_angle(student, teacher)
    assert kept < 40_000


def test_two_samples_have_a_distance_and_no_angle():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    assert rkd_distance(student, teacher).item() == pytest.approx(0, abs=1e-6)
    assert rkd_angle(student, teacher).item() == pytest.approx(0, abs=1e-6)


def test_different_samples_are_refused():
    for formula in (rkd_distance, rkd_angle):
        with pytest.raises(ValueError, match="3 of the student, 4 of the teacher"):
            formula(torch.ones(3, 2), torch.ones(4, 2))


def networks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, n), nn.Tanh(), nn.Linear(n, 3)) for n in (12, 32)]


def test_the_term_is_25_distances_and_50_angles_of_the_embedding():
    student, teacher = networks()
    inputs = torch.randn(6, 8)
    loss = RKD()
    value = Distillation(student, teacher, losses=[loss]).bind(inputs)(inputs).total
    assert loss.pairs == [("2:input", "2:input")]
    embeddings = student[:2](inputs), teacher[:2](inputs)
    torch.testing.assert_close(value, 25 * rkd_distance(*embeddings) + 50 * rkd_angle(*embeddings))


@pytest.mark.parametrize(("distance", "angle"), [(-1, 2), (0, 0)])
def test_weights_inside_the_term_are_checked(distance, angle):
    with pytest.raises(ValueError, match=f"distance={distance}, angle={angle}"):
        RKD(distance=distance, angle=angle)


def test_training_carries_the_teachers_geometry_over():
    student, teacher = networks()
    inputs, fresh = torch.randn(48, 8), torch.randn(48, 8)

    def correlation():
        """Of the distances between fresh samples, as student and teacher see them."""
        with torch.no_grad():
            distances = [torch.nn.functional.pdist(net[:2](fresh)) for net in (student, teacher)]
            return torch.corrcoef(torch.stack(distances))[0, 1]

    before = correlation()
    d = Distillation(student, teacher, losses=[RKD()]).bind(inputs)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert correlation() > max(0.9, before)


def naive_cosines(rows):
    sides = rows.unsqueeze(0) - rows.unsqueeze(1)
    norm = sides.norm(dim=-1, keepdim=True)
    sides = sides / norm.masked_fill(norm == 0, torch.inf)
    return sides @ sides.mT


@pytest.mark.parametrize("spoil", [None, "equal rows", "all equal", "zeros"])
def test_wide_embeddings_have_the_angles_and_gradients_of_their_own_space(spoil):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 50) + 3, torch.randn(6, 5, 3, 2)
    if spoil == "equal rows":
        student[3], teacher[5] = student[1], teacher[0]
    elif spoil:
        student = torch.ones(6, 50) / 3 if spoil == "all equal" else torch.zeros(6, 50)
    mine, naive = (student.clone().requires_grad_() for _ in range(2))
    value = rkd_angle(mine, teacher)
    expected = F.smooth_l1_loss(naive_cosines(naive), naive_cosines(teacher.flatten(1)))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    value.backward()
    if spoil is None:  # the naive form's gradient at a distance of 0 is not a number
        expected.backward()
        torch.testing.assert_close(mine.grad, naive.grad, rtol=1e-4, atol=1e-7)
    assert mine.grad.isfinite().all()
    if spoil in ("all equal", "zeros"):
        assert mine.grad.abs().max() == 0
