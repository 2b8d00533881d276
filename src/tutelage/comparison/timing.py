"""What a training step of each method costs, beside the student alone in the same moments of the same process."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.comparison.cells import Cell, trained_paths
from tutelage.comparison.plan import CONTROL, TEACHER
from tutelage.distillation import Distillation
from tutelage.knowledge.feature.route_constrained import RouteConstrained
from tutelage.procedures import lay_out, setting_of
from tutelage.recipe import load, student_network
from tutelage.teachers import Frozen, as_teacher
from tutelage.training import Training
from tutelage.views import move

STEPS = 24


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step: forward passes, backward pass and optimiser, without loading data.

    Args:
        seconds: the median.
        ratio: the median over rounds of this step ÷ the student's alone, each timed in turn.
        batch_size: samples in a step.
    """

    seconds: float
    ratio: float
    batch_size: int


def time_steps(
    cells: Sequence[Cell],
    folder: Path,
    threads: int = 1,
    trust: Sequence[str] = (),
    known: dict[str, StepTime] | None = None,
) -> Generator[tuple[str, StepTime], None, None]:
    """Time a step of every cell, each in turn with a step of its pair's control; yields (key, time).

    What is timed is the student's own (last) training, from first weights: how long a step takes does not depend on
    them. Where a source makes the batches, that is part of the step. A slow moment of the machine hits both, so the
    ratio holds where the seconds do not; with ``threads`` as in the cells, and as before afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = {c.student: c for c in cells if c.method == CONTROL}
        for cell in cells:
            if cell.method == TEACHER or cell.student not in alone or (known and cell.key in known):
                continue
            control = _stepper(alone[cell.student], folder, trust)
            step = control if cell.method == CONTROL else _stepper(cell, folder, trust)
            rounds = [(_seconds(control.step), _seconds(step.step)) for _ in range(STEPS + 3)][3:]  # the first warm up
            ratio = 1.0 if step is control else statistics.median(mine / base for base, mine in rounds)
            yield cell.key, StepTime(statistics.median(mine for _, mine in rounds), ratio, step.batch_size)
    finally:
        torch.set_num_threads(before)


@dataclass
class _Stepper:
    step: Callable[[], None]
    batch_size: int


def _stepper(cell: Cell, folder: Path, trust: Sequence[str]) -> _Stepper:
    """The cell's step on its first few batches."""
    keywords = load(trained_paths(cell.fields, folder), trust=trust).keywords
    keywords |= {"student": student_network(keywords)}
    training: Training = keywords.get("training") or Training(epochs=10)
    leg = lay_out(keywords.get("procedure"), setting_of(keywords))[-1]
    role = as_teacher(leg.teacher)
    if isinstance(role, RouteConstrained):
        role = Frozen(role.module)  # its route is known only after the teacher's training
    terms: list[Any] = [stage.losses for stage in leg.stages or ()] or [leg.losses]
    device = torch.device("cuda" if torch.cuda.is_available() and not training.cpu else "cpu")
    chain = [Distillation(leg.student, role, losses, keywords.get("views")).to(device) for losses in terms]
    d = chain[-1]  # the last stage is the longest, and what is timed
    if training.channels_last:
        d.to(memory_format=torch.channels_last)
    source = keywords.get("source")
    if source is not None:
        source.attach(d.student, role.module if isinstance(role, Frozen) else None)
    train: Any = source if source is not None else keywords["data"].train
    first = [move(raw, device) for raw in itertools.islice(train, 1 if source is not None else 4)]
    for n, stage in enumerate(chain):
        if n:
            chain[n - 1](first[0]).total.backward()  # later stages may want to have learned something in the earlier
            stage.continue_from(chain[n - 1])
        stage.bind(first[0], population=len(getattr(train, "dataset", ())) or None)
    d.zero_grad()
    optimizer = training.make_optimizer(p for p in d.train().parameters() if p.requires_grad)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.precision)
    batches = itertools.cycle(first) if source is None else _again_and_again(source)

    def step() -> None:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            losses = d(move(next(batches), device))
        losses.total.backward()
        if training.clip:
            torch.nn.utils.clip_grad_norm_(d.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad()

    return _Stepper(step, len(d.views(first[0])))


def _again_and_again(source: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from source


def _seconds(step: Callable[[], None]) -> float:
    _wait()
    began = time.perf_counter()
    step()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
