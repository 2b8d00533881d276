"""Shared by the tests of response losses: values from their authors' code, and one small school for all methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage import Distillation, Loss, TaskLoss


@pytest.fixture
def published() -> Callable[..., None]:
    """Check a formula of (student, teacher, target) against a value and a gradient's norm.

    Both were calculated in float64 with the code that the authors of the method published, on these inputs.
    """

    def check(formula: Callable[[Tensor, Tensor, Tensor], Tensor], loss: float | None, grad_norm: float) -> None:
        student = torch.from_numpy(np.random.RandomState(10).randn(16, 10) * 2).requires_grad_()
        teacher = torch.from_numpy(np.random.RandomState(11).randn(16, 10) * 3)
        target = torch.from_numpy(np.random.RandomState(12).randint(0, 10, 16))
        value = formula(student, teacher, target)
        (gradient,) = torch.autograd.grad(value, student)
        if loss is not None:
            assert value.item() == pytest.approx(loss, rel=1e-6)
        assert gradient.norm().item() == pytest.approx(grad_norm, rel=1e-6)

    return check


@dataclass
class School:
    """Five classes, few labelled samples of them, a teacher that knows more, and what students learnt."""

    inputs: Tensor
    labels: Tensor
    unseen: Tensor
    unseen_labels: Tensor
    teacher: nn.Module
    student: nn.Module

    def learnt(self, *losses: Loss, teacher: nn.Module | None = None, steps: int = 60) -> Tensor:
        """What a student taught with these losses says of the unseen samples."""
        student = copy.deepcopy(self.student)
        batch = self.inputs, self.labels
        torch.manual_seed(0)
        d = Distillation(student, teacher or self.teacher, losses=list(losses)).bind(batch)
        optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            d(batch).total.backward()
            optimizer.step()
        with torch.no_grad():
            return student(self.unseen)

    def alone(self) -> Tensor:
        """What the same student says that learnt from the labels alone."""
        return self.learnt(TaskLoss())

    def taught(self) -> Tensor:
        """What the teacher says of the unseen samples."""
        with torch.no_grad():
            return self.teacher(self.unseen)


@pytest.fixture(scope="session")
def school() -> School:
    torch.manual_seed(3)
    centres = 1.5 * torch.randn(5, 6)
    labels = torch.arange(1200) % 5
    inputs = centres[labels] + 1.5 * torch.randn(1200, 6)
    teacher = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(inputs[:600]), labels[:600]).backward()
        optimizer.step()
    student = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    return School(inputs[:100], labels[:100], inputs[600:], labels[600:], teacher, student)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


@pytest.fixture
def largest_tensor():
    """:class:`Largest`."""
    return Largest
