"""A network once more, with first weights of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


def fresh_network(network: nn.Module, seed: int, make: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A network of the same form with new first weights, which depend on the seed alone.

    It is what ``make`` makes, or else a deep copy in which every part that owns parameters sets them anew by its own
    ``reset_parameters``, inner parts first. That is how the layers of torch.nn are initialised; a network that does it
    in another way in its ``__init__`` needs ``make``. Torch's global random numbers are left as they were.

    Args:
        network: any module; it is not changed.
        seed: of the new weights.
        make: a function without arguments that makes such a network.

    Raises:
        TypeError: ``make`` makes no network.
        ValueError: a part owns parameters and cannot set them anew, or ``make`` gives the network itself.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> new, again = fresh_network(network, 0), fresh_network(network, 0)
    >>> bool((new[0].weight == network[0].weight).any()), bool((new[0].weight == again[0].weight).all())
    (False, True)
    """
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        if make is not None:
            new = make()
            if not isinstance(new, nn.Module):
                raise TypeError(f"fresh: expected a function that makes a network, got {type(new).__name__}")
            if {id(p) for p in new.parameters()} & {id(p) for p in network.parameters()}:
                raise ValueError("fresh: expected a new network at every call, got one that is there already")
            return new
        new = copy.deepcopy(network)
        for name, part in reversed(list(new.named_modules())):  # the inner ones first
            reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            own = [n for n, _ in part.named_parameters(recurse=False)]
            if reset is not None:
                reset()
            elif own:
                raise ValueError(
                    f"student: {name or type(part).__name__!r} owns {', '.join(own)} and has no reset_parameters, so "
                    "its first weights are not known; give fresh, a function that makes a new network"
                )
    return new
