"""Which channels of a network's layers stay, and taking the others away."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tutelage.checked import write_json

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = (*CONVOLUTIONS, *NORMS, nn.Linear, nn.PReLU)
_FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """Which of a layer's channels stay: ``channels`` (ascending) out of ``of``."""

    of: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Pruning:
    """Which channels of which layers stay; layers that are not named stay whole.

    This is what a pruned architecture is written down as: with the function that makes the unpruned network, it makes
    the pruned one again. No code and no pickle is stored, nothing is traced again, torch-pruning is not needed to load,
    and the network stays an ordinary ``nn.Module`` that can be tapped, trained, pruned further and exported (a
    ``torch.export`` archive can only be run). The indices, and not the widths alone, say in which of the original's
    channels each one has its origin.

    Args:
        outputs: by the name of a convolution, linear layer, batch norm or PReLU.
        inputs: by the name of a convolution or linear layer.
    """

    outputs: dict[str, Kept] = field(default_factory=dict)
    inputs: dict[str, Kept] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """It as plain values."""
        sides = {"outputs": self.outputs, "inputs": self.inputs}
        return {
            side: {name: {"of": k.of, "kept": list(k.channels)} for name, k in layers.items()}
            for side, layers in sides.items()
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Pruning:
        """It from what :meth:`plain` gave."""
        return cls(
            *(
                {name: Kept(int(k["of"]), tuple(map(int, k["kept"]))) for name, k in plain[side].items()}
                for side in ("outputs", "inputs")
            )
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(Path(path), {"format": _FORMAT, **self.plain()})

    @classmethod
    def load(cls, path: str | Path) -> Pruning:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is no such file.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            if body["format"] != _FORMAT:
                raise ValueError(f"format {body['format']!r}, expected {_FORMAT}")
            return cls.of(body)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is no file of pruned channels: {error!r}") from error


def cut(layer: nn.Module, name: str, outputs: Kept | None, inputs: Kept | None) -> None:
    """Take channels away from one layer, in place."""
    if not isinstance(layer, LAYERS) or (inputs and not reads(layer)):
        raise ValueError(f"{name!r} is a {type(layer).__name__}, which cannot be cut like this")
    for kept, makes in ((outputs, True), (inputs, False)):
        if kept and (
            kept.of != width(layer, makes)
            or not kept.channels
            or list(kept.channels) != sorted(set(kept.channels) & set(range(kept.of)))
        ):
            raise ValueError(
                f"{name!r} has {width(layer, makes)} {'output' if makes else 'input'} channels; the file keeps "
                f"{len(kept.channels)} of {kept.of}"
            )
    if isinstance(layer, CONVOLUTIONS):
        _cut_convolution(layer, name, outputs, inputs)
    elif isinstance(layer, nn.Linear):
        for kept, dimension in ((outputs, 0), (inputs, 1)):
            if kept:
                _select(layer, ("weight", "bias") if dimension == 0 else ("weight",), kept.channels, dimension)
        layer.out_features, layer.in_features = layer.weight.shape
    elif outputs:
        _select(layer, ("weight", "bias", "running_mean", "running_var"), outputs.channels, 0)
        setattr(layer, "num_features" if isinstance(layer, NORMS) else "num_parameters", len(outputs.channels))


def _cut_convolution(layer: nn.Module, name: str, outputs: Kept | None, inputs: Kept | None) -> None:
    layer = cast(nn.Conv2d, layer)
    if outputs and is_depthwise(layer):
        _select(layer, ("weight", "bias"), outputs.channels, 0)
        layer.groups = layer.in_channels = layer.out_channels = len(outputs.channels)
        return
    if outputs:
        _positions(name, outputs, layer.groups)
        _select(layer, ("weight", "bias"), outputs.channels, 0)
        layer.out_channels = len(outputs.channels)
    if inputs:
        _select(layer, ("weight",), _positions(name, inputs, layer.groups), 1)
        layer.in_channels = len(inputs.channels)


def _positions(name: str, kept: Kept, groups: int) -> tuple[int, ...]:
    """The positions that stay in each group of channels, which must be the same in all."""
    each = kept.of // groups
    positions = tuple(c for c in kept.channels if c < each)
    if kept.channels != tuple(g * each + p for g in range(groups) for p in positions):
        raise ValueError(f"{name!r} has {groups} groups of channels, and other channels of each would stay")
    return positions


def _select(layer: nn.Module, names: Iterable[str], channels: Sequence[int], dimension: int) -> None:
    for name in names:
        tensor = getattr(layer, name, None)
        if tensor is not None:
            index = torch.tensor(channels, dtype=torch.long, device=tensor.device)
            # index_select forgets a memory format such as channels-last; a fresh parameter learns in any
            part = tensor.detach().index_select(dimension, index)
            setattr(layer, name, nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part)


def reads(layer: nn.Module) -> bool:
    """Whether a layer has inputs of its own, and not one for each output."""
    return isinstance(layer, (*CONVOLUTIONS, nn.Linear))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution with one input and one output channel in each group."""
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups == layer.in_channels == layer.out_channels


def width(layer: nn.Module, outputs: bool) -> int:
    """How many output or input channels a layer of :data:`LAYERS` has."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels if outputs else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if outputs else layer.in_features
    return layer.num_features if isinstance(layer, NORMS) else cast(nn.PReLU, layer).num_parameters
