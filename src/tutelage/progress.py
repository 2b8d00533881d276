"""What the last steps cost: averages for the log, bars for people, and a stop where something is no number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from tutelage.console import console, say
from tutelage.distillation import Losses
from tutelage.training import Training
from tutelage.views import Batch, Inputs, read_batch


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite, or the weights did; the message names the step, and the term with the samples or
    the weights."""


@dataclass
class _Pending:
    """One batch's losses, not yet waited for, and what its error message would say of the batch."""

    step: int
    losses: Losses
    ids: Tensor | None
    inputs_finite: Tensor | None


class Meter:
    """Collects the losses of steps without waiting for the device, and looks at them now and then.

    Args:
        total: steps of the whole training.
        visible: whether to draw a bar.
        done: steps already done, of a resumed run.
        sums: of an epoch under way, [sum, batches] of each term; it is kept up to date, to be saved with the run.
    """

    def __init__(self, total: int, visible: bool, done: int = 0, sums: dict[str, list[float]] | None = None):
        self.pending: list[_Pending] = []
        self.step = done
        self.sums = {} if sums is None else sums
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
        """Note one batch's losses. The batch itself is not kept, or many would fill the device's memory."""
        try:
            batch = read_batch(raw)
        except TypeError:  # of a kind that only the run's views can read
            batch = Batch(Inputs(), Inputs())
        sums = [t.detach().sum(dtype=torch.float32) for t in batch.student.tensors() if t.is_floating_point()]
        finite = torch.isfinite(torch.stack(sums)).all() if sums else None
        losses = replace(losses, total=losses.total.detach())
        self.pending.append(_Pending(self.step + 1, losses, batch.ids, finite))
        if step_ended:
            self.step += 1
            self.bar.advance(self.task)

    def look(self) -> dict[str, float]:
        """Wait for the device, check the pending losses and add them to the averages.

        Returns:
            The means over what was pending, ``{}`` if nothing was.

        Raises:
            NonFiniteLoss: one of them is NaN or infinite.
        """
        if not self.pending:
            return {}
        names = list(dict.fromkeys(n for p in self.pending for n in p.losses.values))
        nothing = self.pending[0].losses.total.new_zeros(())
        rows = [
            torch.stack([p.losses.values.get(n, nothing).float() for n in names] or [nothing]) for p in self.pending
        ]
        table = torch.stack(rows).cpu().tolist()
        now: dict[str, list[float]] = {}
        for pending, values in zip(self.pending, table, strict=True):
            terms = {n: v for n, v in zip(names, values, strict=False) if n in pending.losses.values}
            # of the whole batch: the total that is trained on is only its share of an accumulated step
            loss = sum(pending.losses.weights[n] * v for n, v in terms.items())
            if not math.isfinite(loss):
                self._refuse(pending, terms)
            for name, value in {"loss": loss, **terms}.items():
                for sums in (self.sums, now):
                    entry = sums.setdefault(name, [0.0, 0])
                    entry[0] += value
                    entry[1] += 1
        self.pending.clear()
        means = _means(now)
        self.bar.update(self.task, terms="  ".join(f"{n} {v:.3g}" for n, v in means.items()))
        return means

    def averages(self) -> dict[str, float]:
        """The means since the last call; of each term, over the batches in which it had a weight."""
        self.look()
        means = _means(self.sums)
        self.sums.clear()
        return means

    def line(self, text: str) -> None:
        """A line above the bar."""
        if self.visible:
            say(text)

    def _refuse(self, pending: _Pending, terms: dict[str, float]) -> None:
        bad = [n for n, v in terms.items() if not math.isfinite(v)]
        ids = "unknown (wrap the data set in tutelage.data.Indexed to see them)"
        if pending.ids is not None:
            numbers = pending.ids.tolist()
            ids = f"{numbers[:16]}" + (f" and {len(numbers) - 16} more" if len(numbers) > 16 else "")
        blame = ""
        if pending.inputs_finite is not None:
            blame = (
                "; its inputs are finite" if pending.inputs_finite else "; its inputs contain NaN or infinite values"
            )
        raise NonFiniteLoss(
            f"loss term {', '.join(bad) or 'total (a weight)'} is not finite in step {pending.step}: {terms}; sample "
            f"ids of the batch: {ids}{blame}. Nothing was saved since; the last checkpoint is whole"
        )


def check_weights(model: nn.Module, step: int) -> None:
    """See that what was learned up to a step can be saved: a gradient that is no number (of √0) leaves the loss finite.

    Raises:
        NonFiniteLoss: a weight is NaN or infinite; the message names it.
    """
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    # under FSDP2 this process's part of each
    mine = [value.to_local() if hasattr(value, "to_local") else value for value in learned.values()]
    finite = torch.stack([torch.isfinite(value).all() for value in mine]).tolist() if mine else []
    if bad := [name.removeprefix("module.") for name, good in zip(learned, finite, strict=True) if not good]:
        raise NonFiniteLoss(
            f"after step {step} weights are NaN or infinite, and no loss was ({len(bad)} of {len(learned)} tensors: "
            f"{', '.join(bad[:3])}): a gradient must have been. Nothing was saved since; the last checkpoint is whole"
        )


def _means(sums: dict[str, list[float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items()}


@contextmanager
def tracking(accelerator: Accelerator, training: Training) -> Iterator[None]:
    """The run's trackers, closed however it ends; accelerate's own way would close the process group with them."""
    if training.trackers:
        accelerator.init_trackers("tutelage", config={k: str(v) for k, v in training.description().items()})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
