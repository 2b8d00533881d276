"""Branches: several networks that share their lower layers, made of any network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tutelage.console import say
from tutelage.schemes.online.cohort import Cohort
from tutelage.taps import UnknownTap, expand, stages
from tutelage.views import Inputs, example_inputs


@dataclass
class Trunk:
    """What of a network has run when a module has: the part that its branches share.

    Args:
        calls: the largest modules that are done by then, by name, and how often each was called.
        around: the modules inside which it stands, whose own parameters are shared too.
        tail: names of the modules that were called afterwards.
        overwritten: of ``calls``, those whose output something outside of them changes in place.
    """

    calls: dict[str, int]
    around: list[str]
    tail: list[str]
    overwritten: frozenset[str]


def trunk_of(model: nn.Module, after: str, inputs: Inputs) -> Trunk:
    """Run the model once, and see what has run by the time that the module ``after`` has.

    Raises:
        UnknownTap: no such module, or it is not called.
        ValueError: nothing with parameters comes after it.

    >>> trunk = trunk_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), "1", Inputs((torch.ones(2, 4),)))
    >>> trunk.calls, trunk.tail
    ({'0': 1, '1': 1}, ['2'])
    """
    found = expand(model, after)
    if len(found) != 1 or ":" in after or "#" in after or "[" in after or "@" in after:
        raise UnknownTap(f"after={after!r}: expected the name of one module, whose output the branches share")
    (after,) = found
    names = {module: name for name, module in model.named_modules()}
    done: list[str] = []
    began: list[tuple[str, int]] = []
    tail: list[str] = []
    around: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        if around:
            tail.append(names[module])
        began.append((names[module], len(done)))

    def leave(module: nn.Module, *_: Any) -> None:
        name, first = began.pop()
        if not around:
            del done[first:]  # what was inside of it is no longer among the largest
            done.append(name)
            if name == after:
                around.extend(outer for outer, _ in began)

    with _hooked(model.modules(), enter, leave):
        inputs.call(model)
    if not around:
        raise UnknownTap(f"after={after!r}: this module is not called in a forward pass of {type(model).__name__}")
    if not any(True for name in tail for _ in model.get_submodule(name).parameters()):
        raise ValueError(
            f"after={after!r}: nothing with parameters comes after it in {type(model).__name__}: no branch"
        )
    calls = {name: done.count(name) for name in dict.fromkeys(done)}
    return Trunk(calls, around, tail, _overwritten(model, calls, inputs))


def _overwritten(model: nn.Module, calls: Mapping[str, int], inputs: Inputs) -> frozenset[str]:
    """Whose output is changed in place by code that is run again for each branch, and not by the trunk's modules."""
    names = {model.get_submodule(name): name for name in calls}
    left = dict(calls)
    versions: list[tuple[str, Tensor, int]] = []
    spoiled: set[str] = set()

    def look(*_: Any) -> None:
        spoiled.update(name for name, tensor, version in versions if tensor._version != version)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        left[names[module]] -= 1
        if left[names[module]] < 0:
            return  # used again above the fork, where every branch runs it
        versions[:] = [(name, tensor, tensor._version) for name, tensor, _ in versions]  # its own doing is not repeated
        versions.extend((names[module], tensor, tensor._version) for tensor in _tensors(output))

    with _hooked(names, look, leave):
        inputs.call(model)
    look()
    return frozenset(spoiled)


def fork_of(model: nn.Module, inputs: Inputs) -> str:
    """Where a network parts if nobody says: after the stage before its last (:func:`tutelage.taps.stages`).

    Raises:
        ValueError: no stages, one alone, or one whose module is called several times.

    >>> from tutelage.models import SmallCNN
    >>> fork_of(SmallCNN(width=4), Inputs((torch.ones(2, 1, 28, 28),)))
    'stage2'
    """
    found = [stage.address for stage in stages(model, inputs)]
    if len(found) < 2 or "#" in found[-2]:
        raise ValueError(f"after: no stage to part after among {found}; name the module whose output is shared")
    return found[-2].split("[")[0]


class Branches(Cohort):
    """One network that forks after one of its modules: a trunk that all share, and a tail of each branch's own.

    It works with any network whose modules are called in the same order each time, from torchvision, timm, transformers
    or anywhere. Branch 0 is the network that is given. Each further one is a copy of it that holds the *same* modules
    up to ``after`` and its own from there on. The trunk runs once per batch: when a further branch's forward pass comes
    to a module of the trunk, that module's output in the first branch's pass is taken. What stands between the modules
    (additions, reshapes, activations that are functions) is repeated, so skip connections across the fork are right.

    It is a cohort: ``branches.peers[i]`` is the whole network of branch i, :meth:`peer` a copy of it that shares
    nothing and can be exported, and every teacher of a cohort can stand beside it. With ``augment`` the branches see
    the same draw, as they share a trunk.

    Args:
        model: the network; it becomes branch 0.
        after: the module after whose output the branches part, such as ``"layer2"``; ``None`` takes the stage before
            the last, and says which that is.
        count: how many branches, 2 or more.
        example: a few inputs, or the shape of one, to see the order of the modules with.
        fresh: give further branches new random weights (``reset_parameters`` of each module that has it); otherwise
            they begin as copies, which learn different things only if something treats them differently.
        rescale: divide the gradient that reaches the trunk at ``after`` by ``count``: the mean over the branches, not
            their sum (Song & Chai 2018, https://arxiv.org/abs/1805.11761).

    Raises:
        UnknownTap: there is no such module, or it is not called.
        ValueError: fewer than two branches, or nothing with parameters after the module.

    Memory: the trunk once, with the outputs of its largest modules; the tails and their activations ``count`` times.

    >>> from tutelage.models import SmallCNN
    >>> branches = Branches(SmallCNN(width=4), after="stage2", count=3, example=(1, 28, 28))
    >>> branches.peers[1].stage1 is branches.peers[0].stage1, branches.peers[1].stage3 is branches.peers[0].stage3
    (True, False)
    >>> len(branches(torch.ones(2, 1, 28, 28)).peers)
    3
    """

    def __init__(
        self,
        model: nn.Module,
        after: str | None,
        count: int,
        example: Tensor | Mapping[str, Any] | Sequence[int],
        *,
        fresh: bool = True,
        rescale: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
    ):
        if count < 2:
            raise ValueError(f"count={count}: expected 2 branches or more")
        # Looked at in train mode, where in-place dropout may overwrite an output; on a copy, whose statistics may move.
        probe = copy.deepcopy(model).train()
        with torch.no_grad(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            inputs = example_inputs(example, model)
            if after is None:
                after = fork_of(probe, inputs)
                say(f"{type(self).__name__}: the branches part after {after!r}")
            trunk = trunk_of(probe, after, inputs)
        peers = [model, *(_branch(model, trunk, fresh) for _ in range(count - 1))]
        super().__init__(peers, augment)
        self.after, self.trunk, self.rescale = after, trunk, rescale

    def said(self, inputs: Inputs) -> list[Any]:
        inputs = self.seen(inputs)
        (first, speak), *others = self._limbs()
        tape: dict[str, list[Any]] = {name: [] for name in self.trunk.calls}
        handles = [first.get_submodule(name).register_forward_hook(self._record(name, tape[name])) for name in tape]
        try:
            outputs = speak(inputs)
        finally:
            for handle in handles:
                handle.remove()
        for limb, speak in others:
            with self._replaying(limb, tape):
                outputs += speak(inputs)
        return outputs

    def _limbs(self) -> list[tuple[nn.Module, Callable[[Inputs], list[Any]]]]:
        """What stands on the trunk: of each a network that holds the trunk, and a function to hear all it says."""

        def speaking(peer: nn.Module) -> Callable[[Inputs], list[Any]]:
            return lambda inputs: [inputs.call(peer)]

        return [(peer, speaking(peer)) for peer in self.peers]

    def _record(self, name: str, outputs: list[Any]) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if len(outputs) == self.trunk.calls[name]:
                return  # a module that is used again above the fork
            if self.rescale and name == self.after:
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: gradient / len(self._limbs()))
            outputs.append(self._own(name, output))

        return hook

    def _own(self, name: str, output: Any) -> Any:
        """A copy where something would change it in place before the next branch reads it."""
        return tree_map_only(Tensor, torch.clone, output) if name in self.trunk.overwritten else output

    @contextmanager
    def _replaying(self, peer: nn.Module, tape: Mapping[str, list[Any]]) -> Iterator[None]:
        """Inside, the trunk's modules give what they gave to the first branch instead of running."""
        modules = {name: peer.get_submodule(name) for name in tape}

        def replayed(name: str, run: Callable) -> Callable:
            left = iter(tape[name])

            def forward(*args: Any, **kwargs: Any) -> Any:
                for output in left:
                    return self._own(name, output)
                return run(*args, **kwargs)

            return forward

        before = {name: vars(module).get("forward") for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.forward = replayed(name, module.forward)  # type: ignore[method-assign]
            yield
        finally:
            for name, module in modules.items():
                if before[name] is None:
                    del module.forward
                else:
                    module.forward = before[name]  # type: ignore[assignment]

    def extra_repr(self) -> str:
        return f"after={self.after!r}, count={len(self.peers)}, rescale={self.rescale}"


def _branch(model: nn.Module, trunk: Trunk, fresh: bool) -> nn.Module:
    """A copy of the network that holds the same trunk."""
    shared: dict[int, Any] = {id(m): m for name in trunk.calls for m in model.get_submodule(name).modules()}
    around = [model.get_submodule(name) for name in trunk.around]
    for module in around:  # class tokens, positions: nobody knows on which side of the fork they are used
        for own in (*module._parameters.values(), *module._buffers.values()):
            if own is not None:
                shared[id(own)] = own
    kept = {id(module) for module in around} | set(shared)
    branch = copy.deepcopy(model, dict(shared))
    if fresh:
        originals = dict(model.named_modules())
        for name, module in branch.named_modules():
            if id(originals[name]) not in kept and hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return branch


@contextmanager
def _hooked(modules: Any, enter: Callable, leave: Callable) -> Iterator[None]:
    handles = []
    for module in modules:
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
