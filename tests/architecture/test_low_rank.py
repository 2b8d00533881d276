"""Low rank: products of thin layers, as near to the teacher's as their rank allows, where that saves anything."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage import LowRank
from tutelage.architecture.low_rank import low_rank_factors
from tutelage.models import MLP, SmallCNN


def test_linear_factors_are_the_truncated_svd():
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight)
    for rank in range(1, 6):
        first, second = low_rank_factors(weight, rank)
        torch.testing.assert_close(second @ first, u[:, :rank] @ s[:rank].diag() @ vh[:rank], rtol=1e-5, atol=1e-5)


def test_convolution_factors_are_no_worse_than_a_naive_search():
    """Σᵣ H[o, r, x]·V[r, i, y] by alternating least squares, from a random start."""
    torch.manual_seed(0)
    weight, rank = torch.randn(4, 3, 3, 5), 3
    first, second = low_rank_factors(weight, rank)
    product = torch.einsum("riy,orx->oiyx", first[..., 0], second[:, :, 0])
    v = torch.randn(rank, 9)
    matrix = weight.permute(1, 2, 0, 3).reshape(9, 20)
    for _ in range(2000):
        h = torch.linalg.lstsq(v.T, matrix).solution
        v = torch.linalg.lstsq(h.T, matrix.T).solution
    naive = (v.T @ h - matrix).square().sum()
    torch.testing.assert_close((product - weight).square().sum(), naive, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "old",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(6, 8, (3, 5), stride=(1, 2), padding=(0, 2), padding_mode="circular"),
        nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(6, 8, 1, stride=2),
        nn.Linear(10, 8),
    ],
    ids=lambda layer: str(layer)[:30],
)
def test_a_layer_of_that_rank_is_reproduced(old):
    torch.manual_seed(0)
    matrix = torch.randn(2, 2) if old.weight.ndim == 2 else None
    with torch.no_grad():
        if matrix is not None:
            old.weight.copy_(torch.randn(8, 2) @ torch.randn(2, 10))
        else:
            height, width = old.kernel_size
            old.weight.copy_(torch.einsum("riy,orx->oiyx", torch.randn(2, 6, height), torch.randn(8, 2, width)))
    network = nn.Sequential(old, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.randn(2, 10) if matrix is not None else torch.randn(2, 6, 12, 12)
    network(x)
    student, structure = LowRank(2).derive(network, x)
    assert structure["layers"]["0"]["rank"] == 2
    assert structure["layers"]["0"]["error"] == pytest.approx(0, abs=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(x), network(x), rtol=1e-4, atol=1e-4)


def test_the_stated_error_is_the_weights_own():
    torch.manual_seed(0)
    teacher = SmallCNN(width=8)
    _, structure = LowRank(0.25).derive(teacher, torch.zeros(1, 1, 28, 28))
    for name, layer in structure["layers"].items():
        weight = teacher.get_submodule(name).weight.detach()
        first, second = low_rank_factors(weight, layer["rank"])
        product = torch.einsum("riy,orx->oiyx", first[..., 0], second[:, :, 0])
        assert layer["error"] == pytest.approx(float((product - weight).norm() / weight.norm()), abs=1e-3)


def test_ranks_by_number_share_and_energy():
    torch.manual_seed(0)
    teacher, x = MLP(64, (64, 32), 10), torch.randn(2, 64)
    with torch.no_grad():  # squares of the singular values: 16, 9, 4, 1 and nothing
        basis = torch.linalg.qr(torch.randn(64, 64))[0]
        teacher.hidden[0][0].weight.copy_(basis[:, :4] @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ basis[:4])

    def rank(builder):
        return builder.derive(teacher, x)[1]["layers"]["hidden.0.0"]

    assert rank(LowRank(5))["rank"] == 5
    assert rank(LowRank(0.25))["rank"] == 16
    assert [rank(LowRank(energy=e))["rank"] for e in (0.5, 0.8, 0.84, 0.96, 0.97)] == [1, 2, 3, 3, 4]
    assert rank(LowRank(2))["error"] == pytest.approx((5 / 30) ** 0.5, abs=1e-3)


def test_only_where_it_saves_and_never_the_logits():
    teacher, x = MLP(64, (64, 6), 10), torch.randn(2, 64)
    student, structure = LowRank(8).derive(teacher, x)
    assert list(structure["layers"]) == ["hidden.0.0"]  # 6 rows have no 8 singular values
    assert isinstance(student.linear, nn.Linear)
    with pytest.raises(ValueError, match=r"rank=32: no layer of this MLP would become smaller"):
        LowRank(32)(teacher, x)
    assert LowRank(31).derive(teacher, x)[1]["layers"]["hidden.0.0"]["rank"] == 31
    assert list(LowRank(2, keep=("hidden.0",)).derive(teacher, x)[1]["layers"]) == ["hidden.1.0"]


def test_weights_of_zeros_are_no_trouble():
    teacher = MLP(16, (16,), 3)
    nn.init.zeros_(teacher.hidden[0][0].weight)
    student, structure = LowRank(energy=0.5).derive(teacher, torch.zeros(1, 16))
    assert structure["layers"] == {"hidden.0.0": {"rank": 1, "error": 0.0}}
    assert student(torch.zeros(1, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("builder", "said"),
    [
        (LowRank(), "rank=None, energy=None: expected one of them"),
        (LowRank(2, energy=0.5), "rank=2, energy=0.5: expected one of them"),
        (LowRank(0), "rank=0: expected a share above 0 and below 1, or a whole number from 1"),
        (LowRank(1.0), "rank=1.0: expected a share"),
        (LowRank(energy=1.5), "energy=1.5: expected a share above 0 and below 1$"),
        (LowRank(2, keep=("hiden",)), "keep: no module 'hiden' in this MLP; nearest: 'hidden'"),
    ],
)
def test_mistakes_are_named(builder, said):
    with pytest.raises(ValueError, match=said):
        builder(MLP(16, (16,), 3), torch.zeros(1, 16))
