"""Optimiser steps seen from inside: for teachers that change when the student has."""

from __future__ import annotations

from torch import nn


class Steps:
    """Notices that a network's weights were changed in place, as the optimisers of torch.optim change them.

    So a teacher counts a step once, however many batches it is made of, and needs no word from whoever trains. An
    optimiser that writes to ``parameter.data`` goes unseen, as autograd does not see it either.

    >>> network = nn.Linear(2, 2)
    >>> steps = Steps(network)
    >>> before, _ = steps.taken(), nn.init.ones_(network.weight)
    >>> before, steps.taken(), steps.taken()
    (False, True, False)
    """

    def __init__(self, network: nn.Module):
        self._network = (network,)  # in a tuple, so that a module that holds this does not register it
        self._seen = self._changes()

    def taken(self) -> bool:
        """Whether the weights have changed since this was last asked."""
        now = self._changes()
        changed, self._seen = now != self._seen, now
        return changed

    def pending(self) -> bool:
        """What :meth:`taken` would say; for a checkpoint."""
        return self._changes() != self._seen

    def restore(self, pending: bool) -> None:
        """Take up :meth:`pending` again, after the network's weights were loaded, which is no step."""
        self._seen = -1 if pending else self._changes()

    def _changes(self) -> int:
        return sum(p._version for p in self._network[0].parameters())
