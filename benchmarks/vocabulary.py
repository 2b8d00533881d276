"""Peak memory and time of the divergences over large vocabularies: in chunks, and from all logits at once.

    OMP_NUM_THREADS=1 python benchmarks/vocabulary.py

*In chunks* is ``tutelage.functional.chunked``; *direct* makes both models' logits (states · weightᵀ), takes the same
formula of them in float32, and goes backward to the student's states and its head's weight, as both do. 32k words have
8,192 positions; where there are more words, positions are fewer, so that the direct form still fits: about as many
logits as a quarter of that (``positions`` in the file).

The student's states are 128 wide and the teacher's 256, narrower than language models': the heads' products, which are
the same in both forms, then leave something to see of the rest. With wider states the ratio of times tends to 1.

Each pass runs in a process of its own, forked from one that has loaded the libraries; the forms run in turn. Its peak
is the highest resident memory that the system counts (VmHWM, Linux) above what was resident before the pass, with the
inputs; its time is that of the first pass of the process. Ratios are of medians; the file has the range of peaks, and
all times. Before that, both forms have to agree on a small input in value and gradients with float64.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import tutelage.functional as TF
from tutelage.deploy.report import environment
from tutelage.files import replacing
from tutelage.knowledge.response.chunks import Hidden

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward KL": partial(TF.kd_divergence, temperature=1.0),
    "reverse KL": partial(TF.generalized_jsd, beta=1.0),
    "JSD": TF.generalized_jsd,
    "skew KL": TF.skew_kl,
    "total variation": TF.total_variation,
    "top-10 KL": TF.top_k_kd,
}
VOCABULARIES = (32_768, 65_536, 131_072, 151_936)
POSITIONS, STUDENT, TEACHER = 8192, 128, 256
FORMS = ("in chunks", "direct")


def positions(words: int) -> int:
    return POSITIONS if words == VOCABULARIES[0] else POSITIONS * VOCABULARIES[0] // (4 * words)


def sides(count: int, words: int, dtype: torch.dtype = torch.float32) -> tuple[Hidden, Hidden]:
    """Of both, logits with a standard deviation of 2."""
    torch.manual_seed(0)
    made = []
    for width in (STUDENT, TEACHER):
        made.append(
            Hidden(torch.randn(count, width, dtype=dtype), torch.randn(words, width, dtype=dtype) * 2 / width**0.5)
        )
    for tensor in (made[0].states, made[0].weight):
        tensor.requires_grad_()
    return made[0], made[1]


def value(form: str, formula: Callable[..., Tensor], student: Hidden, teacher: Hidden) -> Tensor:
    if form == "direct":
        return formula(student.logits(), teacher.logits())
    return TF.chunked(formula, student, teacher)


def resident(field: str) -> int:
    """Bytes that the system counts for this process: VmRSS now, VmHWM at its most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def one_pass(divergence: str, words: int, form: str) -> tuple[int, float]:
    """Peak bytes above what was there before, and seconds, of forward and backward."""
    torch.set_num_threads(1)
    formula = DIVERGENCES[divergence]
    value(form, formula, *sides(8, 64)).backward()  # libraries load what they use
    student, teacher = sides(positions(words), words)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began = time.perf_counter()
    value(form, formula, student, teacher).backward()
    return resident("VmHWM") - before, time.perf_counter() - began


def agrees(divergence: str) -> float:
    """The largest relative distance of either form in float32 from the direct one in float64; 1,000 words."""
    formula, found = DIVERGENCES[divergence], {}
    for form, dtype in (("direct", torch.float64), *((form, torch.float32) for form in FORMS)):
        student, teacher = (
            Hidden(h.states.detach().to(dtype), h.weight.detach().to(dtype)) for h in sides(200, 1000, torch.float64)
        )
        leaves = [student.states.requires_grad_(), student.weight.requires_grad_()]
        said = value(form, formula, student, teacher)
        found[form, dtype] = [said.detach(), *torch.autograd.grad(said, leaves)]
    exact = found.pop(("direct", torch.float64))
    worst = max(float((a - b).norm() / b.norm()) for mine in found.values() for a, b in zip(mine, exact, strict=True))
    if worst > 1e-4:
        raise SystemExit(f"{divergence}: a form is {worst:.1e} from float64")
    return worst


def row(divergence: str, words: int, rounds: int, pool: multiprocessing.pool.Pool) -> dict[str, object]:
    made: dict[str, list[tuple[int, float]]] = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            made[form].append(pool.apply(one_pass, (divergence, words, form)))
    peaks = {form: statistics.median(peak for peak, _ in passes) for form, passes in made.items()}
    times = {form: statistics.median(seconds for _, seconds in passes) for form, passes in made.items()}
    return {
        "divergence": divergence,
        "vocabulary": words,
        "positions": positions(words),
        "logits_bytes": 4 * positions(words) * words,
        "peak_over_direct": round(peaks["in chunks"] / peaks["direct"], 4),
        "time_over_direct": round(times["in chunks"] / times["direct"], 3),
        "forms": {
            form: {
                "peak_bytes": peaks[form],
                "peak_range": [min(passes)[0], max(passes)[0]],
                "seconds": round(times[form], 3),
                "all_seconds": [round(seconds, 3) for _, seconds in passes],
            }
            for form, passes in made.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="32k words, a quarter of the positions, one round, no file"
    )
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    parser.add_argument("--vocabularies", nargs="+", type=int, choices=VOCABULARIES, default=VOCABULARIES)
    parser.add_argument("--out", default="benchmarks/results/vocabulary.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        global POSITIONS
        POSITIONS, given.rounds, given.vocabularies = POSITIONS // 4, 1, VOCABULARIES[:1]
    distances = {divergence: agrees(divergence) for divergence in given.divergences}
    table = []
    # every pass in a fresh child, which inherits the libraries and nothing that was measured
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for words in given.vocabularies:
            for divergence in given.divergences:
                table.append(row(divergence, words, given.rounds, pool))
                print(json.dumps(table[-1]), flush=True)
    if given.quick:
        return
    made = {
        "what": "forward and backward to the student's states and head, one thread, float32; medians of passes in "
        "turn, each in a process of its own; peak is VmHWM above the resident memory before the pass",
        "states": {"student": STUDENT, "teacher": TEACHER},
        "rounds": given.rounds,
        "distance_from_float64": distances,
        "environment": environment(),
        "rows": table,
    }
    os.makedirs(Path(given.out).parent, exist_ok=True)
    with replacing(given.out) as path:
        Path(path).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
