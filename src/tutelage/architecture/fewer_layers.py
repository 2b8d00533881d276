"""Fewer layers: a student that is the teacher without some of its blocks."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from tutelage.architecture.builders import StudentBuilder, student_copy, watched
from tutelage.catalogue import method
from tutelage.errors import nearest

if TYPE_CHECKING:
    from tutelage.deploy.calling import Example


@method(
    section="4",
    role="student",
    paper="Sanh, Debut, Chaumond, Wolf: DistilBERT, a distilled version of BERT",
    year=2019,
    link="https://arxiv.org/abs/1910.01108",
    use="A deep teacher of equal blocks (ResNets, transformers): the student starts from every second one, say.",
)
@dataclass(frozen=True)
class FewerLayers(StudentBuilder):
    """The teacher without some of its blocks; those that stay keep their weights.

    A *stage* is an ``nn.Sequential`` or ``nn.ModuleList`` with two or more blocks of one class, each called once, one
    after the other. A block can go if its output has the shape of its input. Where stages lie inside blocks of stages,
    that one is taken of which the larger part can go. Of n blocks, k stay: positions round(i·(n − 1) / (k − 1)), so the
    first and the last are among them. Of 12 blocks 6 are 0, 2, 4, 7, 9, 11, which are the ones that DistilBERT's
    authors start from. Blocks that change the shape stay in any case, and so does what stands between blocks.

    In networks of transformers, ``config.num_hidden_layers`` and ``config.layer_types`` are made to fit, and the
    layers' own numbers.

    Args:
        keep: a share of each stage's blocks (rounded up), a number of them, a list of their positions in the stage, or
            any of these by the stage's address (``{"layer1": [0, 2]}``, also with ``*``), where stages without a name
            stay whole.
        which: evenly spaced ones, the first or the last.
        every: instead of a share or number: the positions 0, n, 2n, ...

    Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
    https://arxiv.org/abs/1910.01108

    >>> import torch
    >>> from tutelage.models import resnet20
    >>> student = FewerLayers({"layer*": 1})(resnet20(), torch.zeros(1, 3, 32, 32))
    >>> [len(stage) for stage in (student.layer1, student.layer2, student.layer3)]
    [1, 1, 1]
    """

    keep: int | float | list[int] | dict[str, Any] = 0.5
    which: Literal["even", "first", "last"] = "even"
    every: int | None = None

    def check(self) -> None:
        """Refuse ways to choose that exclude each other."""
        if self.every is not None and (self.every < 2 or self.keep != 0.5 or self.which != "even"):
            raise ValueError(f"every={self.every}: expected 2 or more, and neither keep nor which")
        if self.which not in ("even", "first", "last"):
            raise ValueError(f"which={self.which!r}: expected even, first or last")

    def choose(self, teacher: nn.Module, example: Example) -> dict[str, Any]:
        """``{"stages": {address: {"of": children, "kept": positions}}}``.

        Raises:
            ValueError: no stage, no block that can go, a position out of range, or one that has to stay; named.
        """
        found = _stages(teacher, example)
        stages = _chosen(found)
        if not stages:
            raise ValueError(
                f"{type(teacher).__name__} has no block that could go: expected an nn.Sequential or nn.ModuleList with "
                "two or more blocks of one class, one of them with an output of its input's shape"
            )
        wanted: dict[str, Any] = dict.fromkeys(stages, self.keep)
        if isinstance(self.keep, Mapping):
            wanted = {}
            for address, value in self.keep.items():
                matching = fnmatch.filter(stages, address) or fnmatch.filter(found, address)
                if not matching:
                    raise ValueError(
                        f"keep: no stage {address!r} in this {type(teacher).__name__}{_near(address, found)}"
                    )
                wanted |= dict.fromkeys(matching, value)
        kept = {name: self._kept(found[name], value) for name, value in wanted.items()}
        less = {n: {"of": found[n].size, "kept": p} for n, p in kept.items() if len(p) < found[n].size}
        if not less:
            there = ", ".join(f"{n!r} of {len(s.blocks)}" for n, s in stages.items())
            raise ValueError(f"keep={self.keep!r}: every block stays; expected fewer than there are in {there}")
        return {"stages": less}

    @staticmethod
    def build(network: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """The network without the blocks that are not kept."""
        student = student_copy(network)
        for name, stage in structure["stages"].items():
            try:
                container = student.get_submodule(name)
            except AttributeError:
                raise ValueError(f"{type(network).__name__} has no stage {name!r}") from None
            parts = list(container.named_children())
            if len(parts) != stage["of"] or not set(stage["kept"]) <= set(range(len(parts))):
                raise ValueError(
                    f"{name!r} has {len(parts)} parts; the structure keeps {stage['kept']} of {stage['of']}"
                )
            for key, _ in parts:
                del container._modules[key]
            for number, (key, part) in enumerate(parts[position] for position in stage["kept"]):
                container._modules[str(number) if key.isdecimal() else key] = part
                for module in part.modules():  # by which layers of transformers find their part of a cache
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx = number  # type: ignore[assignment]
            _fit_configs(student, name, stage)
        return student

    def _kept(self, stage: _Stage, keep: Any) -> list[int]:
        """The positions of a stage's parts that stay."""
        if isinstance(keep, list | tuple):
            for position in keep:
                if position not in range(stage.size):
                    raise ValueError(f"keep: {stage.name!r} has no block {position!r}; expected 0 to {stage.size - 1}")
            if len(set(keep)) < len(keep) or not keep:
                raise ValueError(f"keep={list(keep)} of {stage.name!r}: expected different positions, one or more")
            for position in sorted(set(range(stage.size)) - set(keep) - stage.free):
                raise ValueError(f"keep: {stage.name}.{position} cannot go: {stage.why(position)}")
            return sorted(keep)
        several = len(stage.blocks)
        if isinstance(keep, float) and 0 < keep <= 1:
            count = math.ceil(keep * several - 1e-9)
        elif isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
            count = min(keep, several)
        else:
            raise ValueError(f"keep={keep!r}: expected a share from 0 to 1, a number from 1 or a list of positions")
        chosen, bound = self._spread(stage.blocks, count), [b for b in stage.blocks if b not in stage.free]
        if not set(bound) <= set(chosen):
            chosen = bound + self._spread([b for b in stage.blocks if b in stage.free], max(0, count - len(bound)))
        return sorted({*chosen, *range(stage.size)} - (set(stage.blocks) - set(chosen)))

    def _spread(self, blocks: list[int], count: int) -> list[int]:
        if self.every:
            return blocks[:: self.every]
        if self.which != "even":
            return blocks[:count] if self.which == "first" else blocks[len(blocks) - count :]
        return [blocks[round(i * (len(blocks) - 1) / max(1, count - 1))] for i in range(count)]


@dataclass
class _Stage:
    """A container's parts: how many, which are blocks, which of these can go, the shapes of each block, the blocks'
    classes, and the classes of what the container is a part of."""

    name: str
    size: int
    blocks: list[int] = field(default_factory=list)
    free: set[int] = field(default_factory=set)
    shapes: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    kinds: set[type] = field(default_factory=set)
    around: set[type] = field(default_factory=set)

    @property
    def share(self) -> float:
        return len(self.free) / len(self.blocks)

    def why(self, position: int) -> str:
        if position not in self.shapes:
            return "it is no block like the others"
        given, returned = self.shapes[position]
        return f"it makes {returned} of {given}; expected equal shapes"


def _stages(teacher: nn.Module, example: Example) -> dict[str, _Stage]:
    """Every container of which a block can go, the outer ones first."""
    network = student_copy(teacher)
    containers = {
        name: list(module.named_children())
        for name, module in network.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
    }
    inside = {name: [f"{name}.{key}" if name else key for key, _ in parts] for name, parts in containers.items()}
    calls, _ = watched(network, example, dict.fromkeys(n for names in inside.values() for n in names))
    found = {}
    for name, parts in containers.items():
        classes = Counter(type(part) for _, part in parts if any(True for _ in part.children()))
        stage, givens = _Stage(name, len(parts)), []
        path = name.split(".")
        stage.around = {type(network.get_submodule(".".join(path[:end]))) for end in range(len(path))}
        for position, (_, part) in enumerate(parts):
            mine = [c for c in calls if c.name == inside[name][position]]
            if classes[type(part)] < 2 or len(mine) != 1 or mine[0].given is None or mine[0].returned is None:
                continue
            stage.blocks.append(position)
            stage.kinds.add(type(part))
            stage.shapes[position] = tuple(mine[0].given.shape), tuple(mine[0].returned.shape)
            givens.append(id(mine[0].given))
            if mine[0].given.shape == mine[0].returned.shape:
                stage.free.add(position)
        # branches beside each other are no stage: they read one tensor
        if stage.free and len(stage.blocks) > 1 and len(set(givens)) == len(givens):
            found[name] = stage
    return found


def _chosen(found: Mapping[str, _Stage]) -> dict[str, _Stage]:
    """Of stages inside one another, those of which the larger part can go; of equals the outer one. Then without those
    that are inside such a block as another stage is made of, where that block happens to stand alone."""
    left = dict(found)
    for name in found:
        nested = [n for n in left if n != name and n.startswith(f"{name}." if name else "")]
        if name in left and nested:
            outer = left[name].share >= max(left[n].share for n in nested)
            for gone in nested if outer else [name]:
                del left[gone]
    kinds = set().union(*(stage.kinds for stage in left.values())) - {nn.Sequential, nn.ModuleList}
    return {name: stage for name, stage in left.items() if not stage.around & kinds}


def _near(address: str, found: Mapping[str, _Stage]) -> str:
    return nearest(address, found) or "; no block of it could go"


def _fit_configs(student: nn.Module, name: str, stage: Mapping[str, Any]) -> None:
    """Let the configurations above a stage say how many layers there are, if they say it."""
    path = name.split(".")
    above = [student.get_submodule(".".join(path[:end])) for end in range(len(path))]
    for config in {id(c): c for m in above if (c := getattr(m, "config", None)) is not None}.values():
        if getattr(config, "num_hidden_layers", None) == stage["of"]:
            kinds = getattr(config, "layer_types", None)
            if isinstance(kinds, list) and len(kinds) == stage["of"]:
                config.layer_types = [kinds[position] for position in stage["kept"]]
            config.num_hidden_layers = len(stage["kept"])
