"""Low rank: a student whose layers are products of two thin ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tutelage.architecture.builders import StudentBuilder, layers_in_use, with_replaced
from tutelage.catalogue import method
from tutelage.record import logits_of

if TYPE_CHECKING:
    from tutelage.deploy.calling import Example


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two thin weights whose product comes nearest to a linear layer's or a 2-d convolution's.

    By the truncated singular value decomposition A ≈ U·S·Vᵀ with √S in both factors. Of a linear layer A is Wᵀ. Of a
    convolution A[(i, y), (o, x)] = W[o, i, y, x], so that the first factor is a column of the kernel (kh×1, I → r), and
    the second a row (1×kw, r → O): W[o, i, y, x] ≈ Σᵣ H[o, r, x]·V[r, i, y] (Jaderberg's second scheme). The squared
    error is the sum of the squared singular values from the r-th on, the least of all such products.

    Args:
        weight: (O, I) or (O, I, kh, kw).
        rank: r, from 1 to the number of singular values.

    Returns:
        (r, I) and (O, r), or (r, I, kh, 1) and (O, r, 1, kw).

    >>> first, second = low_rank_factors(torch.ones(4, 3, 3, 3), 1)
    >>> first.shape, second.shape
    (torch.Size([1, 3, 3, 1]), torch.Size([4, 1, 1, 3]))
    """
    u, s, vh = torch.linalg.svd(_matrix(weight), full_matrices=False)
    root = s[:rank].sqrt()
    first, second = (u[:, :rank] * root).T, (root[:, None] * vh[:rank]).T
    if weight.ndim == 4:
        out, given, height, width = weight.shape
        first = first.reshape(rank, given, height, 1)
        second = second.reshape(out, width, rank).transpose(1, 2).unsqueeze(2)
    return first.contiguous().to(weight), second.contiguous().to(weight)


@method(
    section="4",
    role="student",
    paper="Jaderberg, Vedaldi, Zisserman: Speeding up Convolutional Neural Networks with Low Rank Expansions",
    year=2014,
    link="https://arxiv.org/abs/1405.3866",
    use="Wide linear layers or convolutions with fewer directions than numbers; every width of the teacher stays.",
)
@dataclass(frozen=True)
class LowRank(StudentBuilder):
    """The teacher with two thin layers in the place of each wide one, as near to it as their rank allows.

    A linear layer (I → O) becomes I → r → O. A k×k convolution becomes a k×1 one and a 1×k one with r channels between
    them, with the stride, padding and dilation of their own axis; a 1×1 one becomes two 1×1. Of the two usual schemes
    for convolutions this one has k·(I + O) weights for each unit of rank, where a k×k convolution to r channels and a
    1×1 one have k²·I + O: for I = O and k = 3 the same size allows 1.7 times the rank. A layer is replaced only if it
    becomes smaller; it is then an ``nn.Sequential`` of the old name with the parts ``first`` and ``second``. The layer
    that makes the logits stays whole, as each class is a direction of its own; and so do subclasses of the two layers,
    grouped convolutions, and weights that several layers share.

    The error of the approximation, ‖W − W'‖ / ‖W‖ = √(1 − Σ_{i≤r} σᵢ² / Σ σᵢ²), is in the structure, layer by layer.

    Args:
        rank: a whole number, or a share of each layer's number of singular values, above 0 and below 1.
        energy: instead of it, the smallest rank with this share of Σ σᵢ², above 0 and below 1.
        keep: addresses of modules that stay whole (``"layer1.*"``).

    Jaderberg et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions",
    https://arxiv.org/abs/1405.3866. Here the error of the weights is minimised, in closed form; distillation stands for
    their second variant, which fits the data's responses.

    >>> from tutelage.models import SmallCNN
    >>> student = LowRank(0.25)(SmallCNN(width=8), torch.zeros(1, 1, 28, 28))
    >>> [tuple(layer.weight.shape) for layer in student.stage2[0]]
    [(6, 8, 3, 1), (16, 6, 1, 3)]
    """

    rank: int | float | None = None
    energy: float | None = None
    keep: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse a rank or an energy out of range."""
        if (self.rank is None) == (self.energy is None):
            raise ValueError(f"rank={self.rank}, energy={self.energy}: expected one of them")
        value = self.energy if self.energy is not None else self.rank
        share = isinstance(value, float) and 0 < value < 1
        number = self.energy is None and isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not share and not number:
            other = "" if self.rank is None else ", or a whole number from 1"
            raise ValueError(f"{self._said}: expected a share above 0 and below 1{other}")

    def choose(self, teacher: nn.Module, example: Example) -> dict[str, Any]:
        """``{"layers": {address: {"rank": r, "error": relative error}}}``.

        Raises:
            ValueError: no layer that becomes smaller, an address in keep that names nothing, or a parametrised layer.
        """
        found, calls, output = layers_in_use(teacher, example, (nn.Linear, nn.Conv2d), self.keep)
        last = {call.name for call in calls if call.returned is logits_of(output)}
        layers = {}
        for name, layer in found.items():
            if name in last or getattr(layer, "groups", 1) > 1:
                continue
            squares = torch.linalg.svdvals(_matrix(layer.weight)).square()
            rank = self._rank(squares)
            if rank * _each(layer.weight) < layer.weight.numel() and rank <= len(squares):
                left = squares[rank:].sum() / squares.sum().clamp_min(1e-30)
                layers[name] = {"rank": rank, "error": round(float(left.sqrt()), 4)}
        if not layers:
            raise ValueError(
                f"{self._said}: no layer of this {type(teacher).__name__} would become smaller; expected a lower one, "
                "or linear layers or convolutions beside those in keep and the one that makes the logits"
            )
        return {"layers": layers}

    @staticmethod
    def build(network: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """The network with these layers in two."""
        ranks = {name: int(layer["rank"]) for name, layer in structure["layers"].items()}
        with torch.random.fork_rng():  # new layers are drawn before they are fitted
            return with_replaced(network, ranks, lambda old, name: _pair(old, name, ranks[name]))

    @property
    def _said(self) -> str:
        return f"energy={self.energy}" if self.energy is not None else f"rank={self.rank}"

    def _rank(self, squares: Tensor) -> int:
        if self.energy is not None:
            kept = squares.double().cumsum(0)
            return 1 + int((kept < self.energy * kept[-1]).sum())
        assert self.rank is not None
        return self.rank if isinstance(self.rank, int) else max(1, round(self.rank * len(squares)))


def _matrix(weight: Tensor) -> Tensor:
    """The matrix whose rank is reduced, in float32: rows are read, columns are made."""
    weight = weight.detach().float()
    return weight.T if weight.ndim == 2 else weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _each(weight: Tensor) -> int:
    """Weights for each unit of rank."""
    return sum(_matrix(weight).shape)


def _pair(old: nn.Module, name: str, rank: int) -> nn.Module:
    if not isinstance(old, nn.Linear | nn.Conv2d) or rank > min(_matrix(old.weight).shape):
        raise ValueError(f"{name!r} is {old}, which has no rank {rank}")
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        parts: list[nn.Module] = [
            nn.Linear(old.in_features, rank, bias=False),
            nn.Linear(rank, old.out_features, bias=bias),
        ]
    else:
        parts = [_along(old, 0, old.in_channels, rank, False), _along(old, 1, rank, old.out_channels, bias)]
    with torch.no_grad():
        for part, weight in zip(parts, low_rank_factors(old.weight, rank), strict=True):
            cast(nn.Linear, part).weight.copy_(weight)
        if old.bias is not None:
            cast(nn.Linear, parts[1]).bias.copy_(old.bias)
    return nn.Sequential(OrderedDict(first=parts[0], second=parts[1]))


def _along(old: nn.Conv2d, axis: int, given: int, made: int, bias: bool) -> nn.Conv2d:
    """A convolution along one axis of an old one's kernel."""

    def part(values: Any, other: int) -> Any:
        if isinstance(values, str):
            return values
        return tuple(value if n == axis else other for n, value in enumerate(values))

    return nn.Conv2d(
        given,
        made,
        part(old.kernel_size, 1),
        part(old.stride, 1),
        part(old.padding, 0),
        part(old.dilation, 1),
        bias=bias,
        padding_mode=old.padding_mode,
    )
