"""Shared by the tests of losses: comparison with reference values, and a loss called on bare tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tutelage import Loss
from tutelage.record import Record
from tutelage.views import Batch, Inputs


@pytest.fixture
def agrees(reference: dict) -> Callable[[str, Callable[[Tensor, Tensor], Tensor]], None]:
    """Check a formula's values and student-gradient norms against every reference case of an entry."""

    def check(entry: str, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        known = reference[entry]
        for case in known["cases"]:
            student, teacher = (
                torch.from_numpy(np.random.RandomState(case[f"seed_{side}"]).randn(*known[f"shape_{side}"]))
                .float()
                .double()
                for side in ("student", "teacher")
            )
            value = formula(student.requires_grad_(), teacher)
            (gradient,) = torch.autograd.grad(value, student)
            assert value.item() == pytest.approx(case["loss"], rel=1e-5)
            assert gradient.norm().item() == pytest.approx(case["grad_norm"], rel=1e-5)

    return check


@pytest.fixture
def bound() -> Callable[..., Callable[..., Tensor]]:
    """Build a loss on tensors instead of models, and return it as a function of (student, teacher, ids, labels)."""

    def make(
        loss: Loss,
        student: Tensor,
        teacher: Tensor,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        population: int | None = None,
    ) -> Callable[..., Tensor]:
        loss.pairs = [("s", "t")]

        def records(s: Tensor, t: Tensor) -> tuple[Record, Record]:
            return Record(None, {"s": s}), Record(None, {"t": t})

        def batch(s: Tensor, t: Tensor, ids: Tensor | None, labels: Tensor | None) -> Batch:
            return Batch(Inputs((s,)), Inputs((t,)), labels, ids, population=population)

        first = batch(student, teacher, ids, labels)
        loss.build(*records(student, teacher), first)
        loss.check(*records(student, teacher), first)

        def call(s: Tensor, t: Tensor, ids: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            return loss(*records(s, t), batch(s, t, ids, labels))

        return call

    return make
