"""Branches that fork again: a binary (or wider) tree of networks, made of any network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tutelage.architecture.branches import Branches
from tutelage.views import Inputs


class BranchTree(Branches):
    """One network that forks after one of its modules, each branch after a further one, and so on.

    With ``after=["layer1", "layer2"]`` and ``count=2`` there are four networks: all share ``layer1``, each pair its own
    ``layer2``, and each has its own rest. What is shared runs once per batch. It is :class:`tutelage.Branches` with
    more levels: the same cohort of peers to every teacher.

    Args:
        model: the network; it becomes peer 0.
        after: the modules after whose outputs branches part, in the order of the forward pass.
        count: how many branches at each fork; the tree has ``count`` to the power of the levels as peers.
        example: a few inputs, or the shape of one.
        fresh: give further branches new random weights.
        rescale: divide the gradient at each fork by ``count``.
        augment: of the inputs, one draw for all, in train mode.

    Raises:
        UnknownTap: there is no such module.
        ValueError: no module, a fork that does not come after the one before, or what :class:`Branches` refuses.

    Song, Chai 2018, "Collaborative Learning for Deep Neural Networks", https://arxiv.org/abs/1805.11761 (the
    hierarchical sharing)

    >>> from tutelage.models import SmallCNN
    >>> tree = BranchTree(SmallCNN(width=4), after=["stage1", "stage2"], count=2, example=(1, 28, 28))
    >>> len(tree.peers), [len({id(peer.get_submodule(f"stage{i}")) for peer in tree.peers}) for i in (1, 2, 3)]
    (4, [1, 2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        after: Sequence[str],
        count: int,
        example: Tensor | Mapping[str, Any] | Sequence[int],
        *,
        fresh: bool = True,
        rescale: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
    ):
        if isinstance(after, str) or not after:
            raise ValueError(f"after={after!r}: expected a list of modules with at least one")
        how: dict[str, Any] = {"fresh": fresh, "rescale": rescale}
        super().__init__(model, after[0], count, example, augment=augment, **how)
        self._forks: tuple[BranchTree, ...] = ()
        if len(after) > 1:
            if after[1] not in self.trunk.tail:
                raise ValueError(f"after={list(after)}: {after[1]!r} does not come after {after[0]!r}")
            # In a tuple, so that no module of theirs is registered a second time
            self._forks = tuple(BranchTree(peer, after[1:], count, example, **how) for peer in self.peers)
            self.peers = nn.ModuleList(peer for fork in self._forks for peer in fork.peers)

    def _limbs(self) -> list[tuple[nn.Module, Callable[[Inputs], list[Any]]]]:
        return [(fork.peers[0], fork.said) for fork in self._forks] or super()._limbs()
