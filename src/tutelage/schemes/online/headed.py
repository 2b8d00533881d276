"""A cohort with a part of its own on top, which reads one tensor of each peer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.record import logits_of
from tutelage.schemes.online.cohort import Cohort
from tutelage.taps import Observer, UnknownTap, expand
from tutelage.views import Inputs, example_inputs


class HeadedCohort(Cohort):
    """Base of student roles that put something on top of a cohort, be it networks or branches: its peers are the same.

    A subclass builds its part from ``shapes`` and ``classes``, and calls :meth:`read` in its ``forward``.

    Args:
        cohort: the :class:`tutelage.Cohort` or :class:`tutelage.Branches` whose peers these are.
        example: a few inputs, or the shape of one.
        at: the address that is read in every peer, or one for each; by default ``choose(peer, inputs)``.
        choose: finds the address in a peer.

    Raises:
        TypeError: ``cohort`` is none.
        UnknownTap: an address names nothing in a peer.
        ValueError: another number of addresses than of peers, or peers that return no logits of the same classes.
    """

    def __init__(
        self,
        cohort: Cohort,
        example: Tensor | Mapping[str, Any] | Sequence[int],
        at: str | Sequence[str] | None,
        choose: Callable[[nn.Module, Inputs], str],
    ):
        if not isinstance(cohort, Cohort):
            raise TypeError(f"cohort: expected a tutelage Cohort or Branches, got {type(cohort).__name__}")
        super().__init__(list(cohort.peers), cohort.augment)
        inputs = example_inputs(example, cohort)
        # Looked at in train mode, where in-place dropout may overwrite a tap; on a copy, whose statistics may move.
        probe = copy.deepcopy(cohort).train()
        with torch.no_grad(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            if at is None:
                at = [choose(peer, inputs) for peer in probe.peers]
            places = [at] * len(self.peers) if isinstance(at, str) else list(at)
            if len(places) != len(self.peers):
                raise ValueError(f"at={places}: expected an address for each of the {len(self.peers)} peers")
            self.at = [_inside(i, peer, place) for i, (peer, place) in enumerate(zip(self.peers, places, strict=True))]
            observer = Observer(probe, [*self.at, "@logits"])
            record = observer.dry_run(inputs)
        said = [logits_of(output) for output in record.output.peers]
        found = [None if logits is None else tuple(logits.shape) for logits in said]
        if found[0] is None or len(found[0]) != 2 or any(shape != found[0] for shape in found):
            raise ValueError(f"cohort: expected logits (B, K) of the same classes from every peer, got {found}")
        self.classes = found[0][1]
        self.shapes = [tuple(record[address].shape) for address in self.at]
        # An observer is no module: nothing of the cohort is registered a second time
        self._observer = Observer(cohort, [*self.at, "@logits"])
        self._observer.copied = observer.copied

    def read(self, inputs: Inputs) -> tuple[list[Any], list[Tensor]]:
        """What every peer says, and its tensor at its address, in float32."""
        self._observer.model.training = self.training
        record = self._observer(inputs)
        return record.output.peers, [record[address] for address in self.at]

    def said(self, inputs: Inputs) -> list[Any]:
        return self.read(inputs)[0]


def _inside(i: int, peer: nn.Module, place: str) -> str:
    """The address inside the cohort of an address inside peer ``i``."""
    try:
        found = expand(peer, place)
    except UnknownTap as error:
        raise UnknownTap(f"at: peer {i} has no such tap: {error}") from None
    if len(found) != 1 or place.startswith("@"):
        raise UnknownTap(f"at={place!r}: expected the address of one module's tensor, got {found}")
    return f"peers.{i}{found[0]}" if found[0].startswith(":") else f"peers.{i}.{found[0]}"


class Spoken(nn.Module):
    """One answer of a student role with several, as a plain network that returns logits: a copy of the whole role.

    Args:
        role: the student role.
        answer: the field of its output.
    """

    def __init__(self, role: nn.Module, answer: str):
        super().__init__()
        self.role = copy.deepcopy(role)
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return getattr(self.role(*args, **kwargs), self.answer)
