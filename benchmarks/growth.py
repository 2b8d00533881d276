"""How the time and memory of losses grow with the batch and with the classes.

    OMP_NUM_THREADS=1 python benchmarks/growth.py

Each loss runs forward and backward to the student's tensors, at doubling sizes. The exponent is the slope of log(time)
or log(peak bytes) over log(size), fitted to the larger half of the sizes, where fixed costs no longer count: 1 is
linear. Memory is counted allocation by allocation (benchmarks/peaks.py). Times are medians.

The process is started again with an allocator that keeps the memory that it has: glibc's maps tensors from 32 MiB anew
each time, and that step, which has nothing to do with a loss, would be what the exponent shows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peaks import peak_bytes
from torch import Tensor

import tutelage as tl
from tutelage.deploy.report import environment
from tutelage.files import replacing
from tutelage.record import Record
from tutelage.views import Batch, Inputs

BATCHES = (64, 128, 256, 512, 1024, 2048)
CLASSES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000)
POPULATION = 50_000


@dataclass(frozen=True)
class Case:
    """A loss and the tensors that it reads.

    Args:
        loss: makes it.
        shapes: of what it reads of each sample, from the number of classes; one for each tap.
        largest: the exponent that its mathematics wants in the batch: 2 where all pairs of samples are compared.
    """

    loss: Callable[[], tl.Loss]
    shapes: Callable[[int], tuple[tuple[int, ...], ...]]
    largest: int = 1


def logits(classes: int) -> tuple[tuple[int, ...], ...]:
    return ((classes,),)


def embedding(classes: int) -> tuple[tuple[int, ...], ...]:
    return ((64,),)


def last(classes: int) -> tuple[tuple[int, ...], ...]:
    return ((64, 8, 8),)


def stages(classes: int) -> tuple[tuple[int, ...], ...]:
    return ((32, 16, 16), (64, 8, 8))


CASES = {
    "KD": Case(tl.KD, logits),
    "DKD": Case(tl.DKD, logits),
    "DIST": Case(tl.DIST, logits),
    "LogitStd": Case(tl.LogitStd, logits),
    "NKD": Case(tl.NKD, logits),
    "WSLD": Case(tl.WSLD, logits),
    "GeneralizedJSD": Case(tl.GeneralizedJSD, logits),
    "SkewKL": Case(tl.SkewKL, logits),
    "TotalVariation": Case(tl.TotalVariation, logits),
    "TopKKD": Case(tl.TopKKD, logits),
    "LogitRegression": Case(tl.LogitRegression, logits),
    "FitNets": Case(lambda: tl.FitNets("0"), last),
    "AttentionTransfer": Case(lambda: tl.AttentionTransfer("0", "1"), stages),
    "VID": Case(lambda: tl.VID("0"), last),
    "ChannelWise": Case(lambda: tl.ChannelWise("0"), last),
    "NeuronSelectivity": Case(lambda: tl.NeuronSelectivity("0", "1"), stages),
    "FSP": Case(lambda: tl.FSP("0", "1"), stages),
    "CRD": Case(lambda: tl.CRD("0", k=16_384), embedding),
    "PKT": Case(lambda: tl.PKT("0"), embedding, 2),
    "SimilarityPreserving": Case(lambda: tl.SimilarityPreserving("0"), last, 2),
    "RKD, distances": Case(lambda: tl.RKD("0", angle=0), embedding, 2),
    "RKD, angles": Case(lambda: tl.RKD("0", distance=0), embedding, 3),
    "CorrelationCongruence": Case(lambda: tl.CorrelationCongruence("0"), embedding, 2),
}


def step_of(case: Case, batch: int, classes: int) -> Callable[[], None]:
    """Forward and backward of the loss, to the student's tensors."""
    torch.manual_seed(0)
    shapes = case.shapes(classes)
    mine, theirs = ([torch.randn(batch, *shape) for shape in shapes] for _ in range(2))
    loss = case.loss()
    of_logits = case.shapes is logits
    addresses = ["@logits"] if of_logits else [str(n) for n in range(len(shapes))]
    loss.pairs = [(a, a) for a in addresses]
    whole = Batch(Inputs((mine[0],)), Inputs((theirs[0],)), torch.randint(classes, (batch,)), torch.arange(batch))
    whole.population = POPULATION

    def record(tensors: list[Tensor]) -> Record:
        return Record(tensors[0]) if of_logits else Record(None, dict(zip(addresses, tensors, strict=True)))

    loss.build(record(mine), record(theirs), whole)

    def step() -> None:
        learned = [x.detach().requires_grad_() for x in mine]
        loss(record(learned), record(theirs), whole).backward()

    return step


def measured(case: Case, sizes: list[tuple[int, int]], repeats: int) -> tuple[list[float], list[int]]:
    seconds, peaks = [], []
    for batch, classes in sizes:
        step = step_of(case, batch, classes)
        step()
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
        seconds.append(statistics.median(taken))
        peaks.append(peak_bytes(step))
    return seconds, peaks


def exponent(sizes: tuple[int, ...], values: list[float] | list[int]) -> float:
    """The slope of log(value) over log(size) by least squares, on the larger half of the sizes."""
    points = list(zip(map(math.log, sizes), map(math.log, values), strict=True))[len(sizes) // 2 :]
    x, y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    return round(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", default="benchmarks/results/growth.json")
    given = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        kept = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **kept})
    torch.set_num_threads(1)
    rows = []
    for name in given.cases:
        case = CASES[name]
        batches = BATCHES if case.largest < 3 else BATCHES[:4]
        axes = [("batch", batches, [(b, 100) for b in batches], case.largest)]
        if case.shapes is logits:
            axes.append(("classes", CLASSES, [(64, c) for c in CLASSES], 1))
        for axis, sizes, points, largest in axes:
            seconds, peaks = measured(case, points, given.repeats)
            rows.append(
                {
                    "loss": name,
                    "axis": axis,
                    "sizes": sizes,
                    "seconds": [round(s, 6) for s in seconds],
                    "peak_bytes": peaks,
                    "time_exponent": exponent(sizes, seconds),
                    "memory_exponent": exponent(sizes, peaks),
                    "largest_expected": largest,
                }
            )
            print({k: v for k, v in rows[-1].items() if k not in ("seconds", "peak_bytes", "sizes")}, flush=True)
    content = {"crd": {"bank": POPULATION, "negatives": 16_384}, "environment": environment(), "rows": rows}
    with replacing(given.out) as beside:
        Path(beside).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
