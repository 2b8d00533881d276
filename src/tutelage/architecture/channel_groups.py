"""Channels that depend on one another, as torch-pruning's graph groups them: which can go, and what that leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.architecture.channels import CONVOLUTIONS, LAYERS, Kept, Pruning, is_depthwise, reads, width
from tutelage.architecture.prune import Importance


def layer_name(dependency: Any, names: Mapping[Any, str]) -> str:
    """The name of a dependency's layer; "" of an operation without one."""
    return names.get(dependency.target.module, "")


def made(graph: Any, group: Any) -> Iterable[tuple[Any, list[int]]]:
    """The part of a group that makes its channels, rather than reads them."""
    return ((dep, channels) for dep, channels in group if graph.is_out_channel_pruning_fn(dep.handler))


def stays_whole(pruner: Any, group: Any) -> bool:
    """Whether a group reaches the model's output, or a padding of channels."""
    for dependency, _ in group:
        node = dependency.target
        if node.type == pruner.ops.OPTYPE.OUTPUT:
            return True
        # Two numbers for each dimension, the last one first: of (N, C, H, W) the third pair is the channels'.
        pad = getattr(node.grad_fn, "_saved_pad", ())
        if any(pad[4:6]):
            return True
    return False


def scored(pruner: Any, importance: Importance, generator: torch.Generator) -> Callable[[Any], Tensor]:
    """What gives each channel of a group its importance."""
    if importance == "random":
        return lambda group: torch.rand(len(group[0][1]), generator=generator)
    magnitude = pruner.importance.GroupMagnitudeImportance(p=2 if importance == "l2" else 1, normalizer=None)
    return lambda group: magnitude(group).detach().float().cpu()


def removed_of(group: Any, names: Mapping[Any, str], scores: Tensor, ratio: float, round_to: int | None) -> list[int]:
    """The channels of a group's first layer that go."""
    count, parts = len(scores), 1
    for dependency, _ in group:
        layer = dependency.target.module
        if isinstance(layer, CONVOLUTIONS) and 1 < layer.groups < layer.out_channels:
            parts = math.lcm(parts, layer.groups)
    if count % parts:
        raise ValueError(
            f"{layer_name(group[0][0], names)!r}: its {count} channels are shared by grouped convolutions that "
            "divide them differently; name it in keep"
        )
    each = count // parts
    stay = max(1, each - math.floor(ratio * each + 1e-9))
    while round_to and stay < each and stay * parts % round_to:
        stay += 1
    order = scores.view(parts, each).mean(0).argsort(stable=True)
    gone = order[: each - stay].tolist()
    return sorted(part * each + channel for part in range(parts) for channel in gone)


def pruning_of(graph: Any, group: Any, names: Mapping[Any, str]) -> Pruning:
    """What removing one group's channels leaves of each layer in it."""
    found = Pruning()
    for dependency, channels in group:
        layer, name = dependency.target.module, layer_name(dependency, names)
        if layer not in names:
            if isinstance(layer, nn.Parameter):
                raise ValueError(
                    f"{layer_name(group[0][0], names)!r}: its channels are read by a parameter of shape "
                    f"{tuple(layer.shape)} outside of any layer, which cannot be cut; name it in keep"
                )
            continue  # an operation without parameters
        if not isinstance(layer, LAYERS):
            if any(True for _ in layer.parameters()):
                raise ValueError(
                    f"{name!r} is a {type(layer).__name__}, which cannot be cut; expected convolutions, linear layers, "
                    f"batch norms and PReLUs, or {layer_name(group[0][0], names)!r} in keep"
                )
            continue
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            continue
        makes = graph.is_out_channel_pruning_fn(dependency.handler)
        side = found.outputs if makes or is_depthwise(layer) or not reads(layer) else found.inputs
        of = width(layer, side is found.outputs)
        gone = set(channels)
        side[name] = Kept(of, tuple(c for c in range(of) if c not in gone))
    return found


def joined(parts: Iterable[Pruning], model: nn.Module) -> Pruning:
    """All groups together: several may remove inputs of one layer, where they were concatenated."""
    whole = Pruning()
    for part in parts:
        for mine, others in ((whole.outputs, part.outputs), (whole.inputs, part.inputs)):
            for name, kept in others.items():
                before = mine.get(name, kept)
                mine[name] = Kept(kept.of, tuple(c for c in before.channels if c in set(kept.channels)))
    # In the model's order, for people who read the file.
    names = [name for name, _ in model.named_modules()]
    return Pruning(*({n: side[n] for n in names if n in side} for side in (whole.outputs, whole.inputs)))
