"""What learns beside the student: a critic, a generator. Its owner updates it, inside the owner's own call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SideLearner(nn.Module):
    """A network with an optimiser of its own, which is not part of what trains the student.

    It moves with its owner and is saved with the run, but its parameters appear neither in ``owner.parameters()`` nor
    in DDP; :meth:`update` averages its gradients over the processes itself.

    Args:
        module: the network.
        optimizer: makes the optimiser from the network's parameters.

    >>> critic = SideLearner(nn.Linear(2, 1), lambda p: torch.optim.SGD(p, lr=0.1))
    >>> before = critic.module.weight.clone()
    >>> critic.update(critic(torch.ones(4, 2)).mean())
    >>> bool((critic.module.weight != before).any()), len(list(critic.parameters()))
    (True, 0)
    """

    def __init__(self, module: nn.Module, optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]):
        super().__init__()
        self._held = (module,)  # in a tuple, or nn.Module would register it
        self.optimizer = optimizer(module.parameters())
        if dist.is_available() and dist.is_initialized():
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)

    @property
    def module(self) -> nn.Module:
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def update(self, loss: Tensor) -> None:
        """One step of its own optimiser down ``loss``; no gradient reaches anything else."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and dist.is_available() and dist.is_initialized():
                dist.all_reduce(gradient)
                gradient = gradient / dist.get_world_size()
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, mode: bool = True) -> SideLearner:
        super().train(mode)
        self.module.train(mode)
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> SideLearner:
        super()._apply(fn, recurse)
        self.module._apply(fn)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = fn(value)
        return self

    def own_state(self) -> dict[str, Any]:
        """Weights and optimiser, for the checkpoint of a run."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
