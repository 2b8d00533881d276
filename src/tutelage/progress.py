"""What the last steps cost: averages for the log, bars for people, and a stop at the first loss that is no number."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tutelage.console import console, say
from tutelage.distillation import Losses
from tutelage.views import read_batch


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the message names the term and the samples."""


class Meter:
    """Collects the losses of steps without waiting for the device, and looks at them now and then.

    Args:
        total: steps of the whole training.
        every: steps between two looks.
        visible: whether to draw a bar.
        done: steps already done, of a resumed run.
    """

    def __init__(self, total: int, every: int, visible: bool, done: int = 0):
        self.every = every
        self.pending: list[tuple[Losses, Any]] = []
        self.sums: dict[str, float] = {}
        self.count = 0
        self.started = time.monotonic()
        self.visible = visible
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self.task = self.bar.add_task("step", total=total, completed=done, terms="")

    def __enter__(self) -> Meter:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def add(self, losses: Losses, raw: Any, step_ended: bool) -> None:
        """Note one batch's losses; look at the last ones if it is time."""
        self.pending.append((losses, raw))
        if step_ended:
            self.bar.advance(self.task)
            if sum(1 for _ in self.pending) >= self.every:
                self.look()

    def look(self) -> dict[str, float]:
        """Wait for the device, check the pending losses and add them to the averages.

        Returns:
            The means over what was pending, ``{}`` if nothing was.

        Raises:
            NonFiniteLoss: one of them is NaN or infinite.
        """
        if not self.pending:
            return {}
        names = list(dict.fromkeys(n for losses, _ in self.pending for n in losses.values))
        nothing = torch.zeros(())
        rows = [
            torch.stack([losses.total.detach(), *(losses.values.get(n, nothing.to(losses.total)) for n in names)])
            for losses, _ in self.pending
        ]
        table = torch.stack(rows).float().cpu()
        bad = (~torch.isfinite(table)).any(1).nonzero()
        if len(bad):
            self._refuse(int(bad[0]), names, table)
        means = dict(zip(["loss", *names], table.mean(0).tolist(), strict=True))
        for name, value in zip(["loss", *names], table.sum(0).tolist(), strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += len(self.pending)
        self.pending.clear()
        self.bar.update(self.task, terms="  ".join(f"{n} {v:.3g}" for n, v in means.items()))
        return means

    def averages(self) -> dict[str, float]:
        """The means since the last call."""
        self.look()
        means = {name: value / self.count for name, value in self.sums.items()} if self.count else {}
        self.sums, self.count = {}, 0
        return means

    def line(self, text: str) -> None:
        """A line above the bar."""
        if self.visible:
            say(text)

    def _refuse(self, row: int, names: list[str], table: Tensor) -> None:
        losses, raw = self.pending[row]
        terms = [n for n, v in zip(names, table[row, 1:].tolist(), strict=True) if not math.isfinite(v)]
        batch = read_batch(raw)
        ids = "unknown (wrap the data set in tutelage.data.Indexed to see them)"
        if batch.ids is not None:
            numbers = batch.ids.tolist()
            ids = f"{numbers[:16]}" + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
        inputs = [t for t in batch.student.tensors() if t.is_floating_point()]
        finite = all(bool(torch.isfinite(t).all()) for t in inputs)
        blame = "; its inputs are finite" if finite else "; its inputs contain NaN or infinite values"
        values = {n: float(v) for n, v in losses.values.items()}
        raise NonFiniteLoss(
            f"loss term {', '.join(terms) or 'total (a weight)'} is not finite: {values}; sample ids of the batch: "
            f"{ids}{blame}. Nothing was saved since; the last checkpoint is whole"
        )
