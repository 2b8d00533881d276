"""Depthwise-separable convolutions: a cheap student that starts from the teacher's full ones."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from tutelage.architecture.builders import StudentBuilder, layers_in_use, with_replaced
from tutelage.catalogue import method

if TYPE_CHECKING:
    from tutelage.deploy.calling import Example

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def separable_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The depthwise and the pointwise filters whose product comes nearest to a convolution's weight.

    For each input channel i, W[:, i] is a matrix (O, positions) and σ·u·vᵀ its best fit of rank 1: the depthwise
    filter is √σ·v and the pointwise column √σ·u. As the squared error is the sum over input channels, no other
    depthwise-separable convolution is nearer to W.

    Args:
        weight: (O, I, *kernel).

    Returns:
        (I, 1, *kernel) and (O, I, 1, ...).

    >>> depthwise, pointwise = separable_factors(torch.ones(4, 3, 3, 3))
    >>> bool(torch.allclose(pointwise * depthwise.transpose(0, 1), torch.ones(4, 3, 3, 3)))
    True
    """
    matrices = weight.detach().float().flatten(2).transpose(0, 1)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :1].sqrt()
    depthwise = (root * vh[:, 0]).reshape(weight.shape[1], 1, *weight.shape[2:])
    pointwise = (root * u[:, :, 0]).T.reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:]))
    return depthwise.to(weight), pointwise.to(weight)


@method(
    section="4",
    role="student",
    paper="Crowley, Gray, Storkey: Moonshine: Distilling with Cheap Convolutions",
    year=2018,
    link="https://arxiv.org/abs/1711.02613",
    use="A convolutional teacher whose shape should stay (the same stages to tap), at about an eighth of the cost.",
)
@dataclass(frozen=True)
class Separable(StudentBuilder):
    """The teacher with a depthwise and a pointwise convolution in the place of each full one.

    A k×k convolution of I to O channels has k²·I·O weights, the two of it I·k² + I·O. Stride, padding, dilation and
    bias stay. What stays as it is: the first convolution of the network (as in MobileNets), 1×1 and grouped ones, and
    those that would not become smaller. The two are called ``depthwise`` and ``pointwise``, in an ``nn.Sequential``
    of the old name, so that taps stay.

    There is nothing between the two. MobileNets and Moonshine put a batch norm and a ReLU there; with them the
    teacher's weights would say nothing, and with ``init="fresh"`` too the network is the same, so that both can be
    compared.

    Args:
        init: ``"svd"`` starts from :func:`separable_factors` of the teacher's weights; ``"fresh"`` from new weights.
        keep: addresses of modules that stay whole (``"layer1.*"``).

    Crowley et al. 2018, "Moonshine: Distilling with Cheap Convolutions", https://arxiv.org/abs/1711.02613; Howard et
    al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
    https://arxiv.org/abs/1704.04861

    >>> from tutelage.models import SmallCNN
    >>> student = Separable()(SmallCNN(width=8), torch.zeros(1, 1, 28, 28))
    >>> [tuple(layer.weight.shape) for layer in student.stage2[0]]
    [(8, 1, 3, 3), (16, 8, 1, 1)]
    """

    init: Literal["svd", "fresh"] = "svd"
    keep: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse another ``init``."""
        if self.init not in ("svd", "fresh"):
            raise ValueError(f"init={self.init!r}: expected svd or fresh")

    def choose(self, teacher: nn.Module, example: Example) -> dict[str, Any]:
        """``{"init": ..., "layers": {address: relative error of the fit, or None}}``; the error is
        ‖W − fit‖ / ‖W‖.

        Raises:
            ValueError: nothing to replace, an address in keep that names nothing, or a parametrised layer.
        """
        found, calls, _ = layers_in_use(teacher, example, _CONVOLUTIONS, self.keep)
        layers = {
            name: _error(layer.weight) if self.init == "svd" else None
            for name, layer in found.items()
            if name != calls[0].name and _smaller(layer)
        }
        if not layers:
            raise ValueError(
                f"{type(teacher).__name__} has no convolution to replace: expected one with a kernel above 1×1 and "
                "without groups, beside the first and those in keep"
            )
        return {"init": self.init, "layers": layers}

    @staticmethod
    def build(network: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """The network with these convolutions replaced."""
        fresh = structure["init"] == "fresh"
        with torch.random.fork_rng(enabled=not fresh):
            return with_replaced(network, structure["layers"], lambda old, name: _pair(old, name, fresh))


def _smaller(layer: Any) -> bool:
    positions = math.prod(layer.kernel_size)
    full = positions * layer.in_channels * layer.out_channels
    return layer.groups == 1 and positions > 1 and layer.in_channels * (positions + layer.out_channels) < full


def _error(weight: Tensor) -> float:
    weight = weight.detach()
    depthwise, pointwise = separable_factors(weight)
    return round(float((pointwise * depthwise.transpose(0, 1) - weight).norm() / weight.norm().clamp_min(1e-12)), 4)


def _pair(old: nn.Module, name: str, fresh: bool) -> nn.Module:
    if not isinstance(old, _CONVOLUTIONS) or old.groups > 1:
        raise ValueError(f"{name!r} is a {type(old).__name__}, and no full convolution to replace")
    layer, kind = cast(nn.Conv2d, old), cast(type[nn.Conv2d], type(old))
    pair = nn.Sequential(
        OrderedDict(
            depthwise=kind(
                layer.in_channels,
                layer.in_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                groups=layer.in_channels,
                bias=False,
                padding_mode=layer.padding_mode,
            ),
            pointwise=kind(layer.in_channels, layer.out_channels, 1, bias=layer.bias is not None),
        )
    )
    if not fresh:
        with torch.no_grad():
            for part, weight in zip(pair, separable_factors(layer.weight), strict=True):
                cast(nn.Conv2d, part).weight.copy_(weight)
            if layer.bias is not None:
                cast(Tensor, cast(nn.Conv2d, pair[1]).bias).copy_(layer.bias)
    return pair
