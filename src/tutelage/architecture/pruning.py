"""Structured pruning: a student that is the teacher with fewer channels, and keeps the weights of those that stay."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from tutelage.architecture.channel_groups import joined, layer_name, made, pruning_of, removed_of, scored, stays_whole
from tutelage.architecture.channels import CONVOLUTIONS, Pruning, cut
from tutelage.architecture.prune import Importance
from tutelage.deploy.calling import Example, as_call, device_of
from tutelage.errors import nearest, require
from tutelage.evaluation import evaluating
from tutelage.models import load_weights
from tutelage.record import Record
from tutelage.views import move


def prune_channels(
    model: nn.Module,
    example: Example,
    ratio: float,
    *,
    importance: Importance = "l2",
    keep: Sequence[str] = (),
    round_to: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A copy of a network with fewer channels, whose remaining weights are the original's.

    The same as ``keep_channels(model, choose_channels(model, example, ratio, ...))``; take those two to save the
    architecture as well (:func:`load_pruned`). The original is untouched, and every parameter of the copy learns, also
    where the original is frozen.

    Args:
        model: see :func:`choose_channels`, also for the other arguments and the errors.

    >>> from tutelage.models import SmallCNN
    >>> half = prune_channels(SmallCNN(width=8), torch.zeros(1, 1, 28, 28), 0.5)
    >>> half.stage1[0].out_channels, half.stage3[0].out_channels, half.linear.out_features
    (4, 16, 10)
    """
    pruning = choose_channels(model, example, ratio, importance=importance, keep=keep, round_to=round_to, seed=seed)
    return keep_channels(model, pruning)


def choose_channels(
    model: nn.Module,
    example: Example,
    ratio: float,
    *,
    importance: Importance = "l2",
    keep: Sequence[str] = (),
    round_to: int | None = None,
    seed: int = 0,
) -> Pruning:
    """Choose which channels of a network stay.

    Channels that depend on one another (across a residual sum, a batch norm, a depthwise convolution, a flattening)
    form a group and stay or go together; the groups are torch-pruning's (DepGraph, Fang et al.,
    https://arxiv.org/abs/2301.12900). Of a group of n channels, max(1, n − ⌊ratio · n⌋) stay: those with the largest
    sum of wᵖ, averaged over the layers of the group, where the sum is over the weights that make or read the channel
    (p = 2 or 1: Li et al., https://arxiv.org/abs/1608.08710), or random ones. In a convolution with g groups of
    channels, the same positions of each stay.

    Never pruned are the model's inputs and outputs and the groups of ``keep``; and the channels that a shortcut pads
    with zeros (He's option A): there, only the channels inside the blocks are pruned, as a padding without parameters
    cannot follow a choice of channels. So the parameters fall by less than with projections.

    Before anything is returned, the network is cut and compared with the original in which the weights that read the
    removed channels are 0: both must say the same of random inputs. A network in which torch-pruning did not see what
    depends on what (channel shuffles, attention heads) is refused rather than returned wrong.

    Args:
        model: built of convolutions, linear layers, batch norms and PReLUs, and operations without parameters.
        example: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        ratio: of each group's channels that go, from 0 to below 1. Parameters fall roughly with (1 − ratio)².
        importance: ``"l2"``, ``"l1"`` or ``"random"``.
        keep: addresses of modules whose output channels all stay (``"layer1.0.conv1"``), also with ``*``. A module
            with parts stands for all of them.
        round_to: what stays is rounded up to a multiple of this, for kernels that like one.
        seed: of random importance.

    Returns:
        The channels that stay.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: a ratio out of range, an address that names nothing, a layer that cannot be cut (named), nothing to
            prune, or a network that mixes channels in a way that was not seen.

    Memory: three copies of the network, one of them in float64.

    >>> from tutelage.models import SmallCNN
    >>> pruning = choose_channels(SmallCNN(width=4), torch.zeros(1, 1, 28, 28), 0.5, keep=["stage1"])
    >>> sorted(pruning.outputs), pruning.inputs["linear"].of, len(pruning.inputs["linear"].channels)
    (['stage2.0', 'stage2.1', 'stage3.0', 'stage3.1'], 16, 8)
    """
    pruner = require("torch_pruning", extra="compress")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio}: expected a share from 0 to below 1")
    if importance not in ("l2", "l1", "random"):
        raise ValueError(
            f"importance={importance!r}: expected l2, l1 or random{nearest(str(importance), ['l2', 'l1', 'random'], 1)}"
        )
    if round_to is not None and round_to < 1:
        raise ValueError(f"round_to={round_to}: expected 1 or more")
    _refuse_parametrized(model)
    kept_layers = _layers_of(model, keep)
    # Tracing follows the autograd graph, so nothing in it may be frozen; and it sets modes.
    traced = copy.deepcopy(model).requires_grad_(True)
    names: dict[Any, str] = {module: name for name, module in traced.named_modules()}
    args, kwargs = as_call(move(example, device_of(model)))

    def logits(network: nn.Module, _: Any) -> Tensor:
        # The sum makes the output an operation of its own; otherwise the classifier would look like any layer.
        return Record(network(*args, **kwargs)).logits + 0

    with torch.random.fork_rng(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits(traced, None)  # a model that cannot be called so is better refused in its own words
        try:
            graph = pruner.DependencyGraph().build_dependency(traced, args or kwargs, forward_fn=logits, verbose=False)
            groups = list(graph.get_all_groups(root_module_types=[*CONVOLUTIONS, nn.Linear]))
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__}: torch-pruning cannot follow its channels "
                f"({type(error).__name__}: {error}); it shuffles, splits or reshapes them in a way it does not know"
            ) from error
    score = scored(pruner, importance, torch.Generator().manual_seed(seed))
    chosen: dict[str, Pruning] = {}
    for group in groups:
        scores = score(group)  # drawn for every group, so that keep does not change the choice in the others
        if stays_whole(pruner, group) or any(layer_name(dep, names) in kept_layers for dep, _ in made(graph, group)):
            continue
        removed = removed_of(group, names, scores, ratio, round_to)
        if removed:
            root = group[0][0]
            whole = graph.get_pruning_group(root.target.module, root.handler, removed)
            chosen[layer_name(root, names)] = pruning_of(graph, whole, names)
    pruning = joined(chosen.values(), model)
    if ratio and not pruning.outputs:
        raise ValueError(
            f"ratio={ratio}: no channel of this {type(model).__name__} can go; every group of channels is too small, "
            "in keep, padded by a shortcut, or the model's output"
        )
    _check(model, args, kwargs, pruning, chosen)
    return pruning


def keep_channels(model: nn.Module, pruning: Pruning) -> nn.Module:
    """A copy of a network with the given channels alone; every parameter of it learns.

    Args:
        model: the network that the channels were chosen of, with any weights.
        pruning: the channels that stay.

    Raises:
        ValueError: the network has no such layer, or one of another width.

    >>> from tutelage.architecture.channels import Kept
    >>> layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    >>> small = keep_channels(layer, Pruning({"0": Kept(2, (1,))}, {"1": Kept(2, (1,))}))
    >>> small[0].out_features, bool((small[0].weight == layer[0].weight[1:]).all())
    (1, True)
    """
    _refuse_parametrized(model)
    small = copy.deepcopy(model)
    modules = dict(small.named_modules())
    for side in (pruning.outputs, pruning.inputs):
        for name in side:
            if name not in modules:
                raise ValueError(f"{type(model).__name__} has no layer {name!r}{nearest(name, modules)}")
    for name in dict.fromkeys([*pruning.outputs, *pruning.inputs]):
        cut(modules[name], name, pruning.outputs.get(name), pruning.inputs.get(name))
    return small.requires_grad_(True)


def load_pruned(model_factory: Callable[[], nn.Module], channels: str | Path, weights: str | Path) -> nn.Module:
    """A pruned network from its files: the channels as JSON (:meth:`Pruning.save`), the weights as safetensors.

    Nothing in the files is executed, and torch-pruning is not needed.

    Args:
        model_factory: makes the unpruned network; its weights do not matter.
        channels: the file of channels that stay.
        weights: the file of the pruned network's weights (:func:`tutelage.models.save_weights`, or the
            ``student.safetensors`` of its distillation).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the files do not fit the network or each other.

    >>> import tempfile
    >>> from tutelage.models import SmallCNN, save_weights
    >>> folder, teacher = Path(tempfile.mkdtemp()), SmallCNN(width=8)
    >>> pruning = choose_channels(teacher, torch.zeros(1, 1, 28, 28), 0.5)
    >>> pruning.save(folder / "channels.json")
    >>> save_weights(keep_channels(teacher, pruning), folder / "half.safetensors")
    >>> again = load_pruned(lambda: SmallCNN(width=8), folder / "channels.json", folder / "half.safetensors")
    >>> again.stage2[0].in_channels
    4
    """
    small = keep_channels(model_factory(), Pruning.load(channels))
    load_weights(small, weights)
    return small


def _refuse_parametrized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name or type(model).__name__} is parametrised (fake quantisation, weight norm): prune the plain "
                "network and parametrise the result"
            )


def _layers_of(model: nn.Module, keep: Sequence[str]) -> set[str]:
    """The names of all modules that the addresses stand for, with what is inside them."""
    if isinstance(keep, str):
        raise TypeError(f"keep={keep!r}: expected a list of addresses")
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for address in keep:
        matching = fnmatch.filter(names, address)
        if not matching:
            raise ValueError(f"keep: no module {address!r} in this {type(model).__name__}{nearest(address, names)}")
        found.update(n for n in names if any(n == m or n.startswith(f"{m}.") for m in matching))
    return found


def _silenced(model: nn.Module, pruning: Pruning) -> nn.Module:
    """A copy of the whole network in which nobody reads the channels that go."""
    whole = copy.deepcopy(model)
    modules = dict(whole.named_modules())
    with torch.no_grad():
        for name, kept in pruning.inputs.items():
            layer = cast(nn.Conv2d, modules[name])
            groups = getattr(layer, "groups", 1)
            each = kept.of // groups
            rows = layer.weight.shape[0] // groups
            for channel in set(range(kept.of)) - set(kept.channels):
                part = channel // each
                layer.weight[part * rows : (part + 1) * rows, channel % each] = 0
    return whole


def _check(model: nn.Module, args: Any, kwargs: Any, pruning: Pruning, chosen: Mapping[str, Pruning]) -> None:
    """Refuse a choice after which the network says something other than without what reads the removed channels."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)

    def random(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        return leaf

    args, kwargs = pytree.tree_map(random, (args, kwargs))

    def same(part: Pruning) -> bool:
        silenced = _silenced(model, part)
        with evaluating(silenced):
            whole = Record(silenced(*args, **kwargs)).logits
        try:
            narrow = keep_channels(model, part)
            with evaluating(narrow):
                small = Record(narrow(*args, **kwargs)).logits
        except (RuntimeError, ValueError, IndexError):  # shapes that no longer fit
            return False
        return whole.shape == small.shape and torch.allclose(whole, small, rtol=1e-6, atol=1e-9)

    with torch.random.fork_rng():
        if same(pruning):
            return
        # Each group alone, until there are enough to tell of; if only all together are wrong, all of them are.
        guilty = list(islice((name for name, part in chosen.items() if not same(part)), 5)) or list(chosen)
    raise ValueError(
        f"{type(model).__name__}: the channels of {', '.join(map(repr, guilty[:4]))}"
        f"{' and others' if len(guilty) > 4 else ''} are mixed in a way that the pruning does not see (a shuffle, "
        f"attention heads, a norm over channels); name {'it' if len(guilty) == 1 else 'them'} in keep"
    )
