"""Shared by the tests of feature losses: a small class of images, in which the effect of any of them can be seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tutelage import Distillation, Loss, TaskLoss
from tutelage.models import SmallCNN


@dataclass
class Lessons:
    """Five classes of noisy 12×12 images, few of them labelled, a teacher that has seen more, and a student."""

    images: Tensor
    labels: Tensor
    unseen: Tensor
    unseen_labels: Tensor
    teacher: nn.Module
    beginner: nn.Module

    def student(self, *losses: Loss, steps: int = 60, lr: float = 0.01) -> nn.Module:
        """What a copy of the student becomes by the labels and these losses, or by the labels alone; in eval mode."""
        student = copy.deepcopy(self.beginner)
        torch.manual_seed(0)
        batch = self.images, self.labels
        d = Distillation(student, self.teacher, losses=[TaskLoss(), *losses]).bind(batch)
        d.progress = 0.5
        optimizer = torch.optim.Adam(d.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            d(batch).total.backward()
            optimizer.step()
        return student.eval()

    def distance(self, student: nn.Module, loss: Loss, steps: int = 60) -> float:
        """What a new loss says of unseen images, after what it learns was fitted to this student, which stays."""
        torch.manual_seed(0)
        student = copy.deepcopy(student).requires_grad_(False)
        batch = self.images, self.labels
        d = Distillation(student, self.teacher, losses=[loss]).bind(batch)
        d.progress = 0.5
        student.eval()
        if learned := list(loss.parameters()):
            optimizer = torch.optim.Adam(learned, lr=0.02)
            for _ in range(steps):
                optimizer.zero_grad()
                d(batch).total.backward()
                optimizer.step()
        d.eval()
        with torch.no_grad():
            return d((self.unseen, self.unseen_labels))[loss.name].item()


@pytest.fixture(scope="session")
def lessons() -> Lessons:
    torch.manual_seed(5)
    prototypes = torch.randn(5, 1, 12, 12)
    labels = torch.arange(480) % 5
    images = prototypes[labels] + 1.2 * torch.randn(480, 1, 12, 12)
    teacher, student = SmallCNN(8, num_classes=5), SmallCNN(4, num_classes=5)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(images[:320]), labels[:320]).backward()
        optimizer.step()
    return Lessons(images[:96], labels[:96], images[320:], labels[320:], teacher.eval(), student)
