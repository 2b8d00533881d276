"""Peak memory and time of the relation losses, beside the formula written down as it stands and torchdistill's classes.

    pip install -e ".[benchmark]"
    python benchmarks/loss_memory.py

Student and teacher have maps of 512×7×7 for a batch of 256. Each form runs forward and backward to the student's maps
in a process of its own, whose resident memory before and at its most is read from the operating system (Linux); then
all forms of a method run in turn in one process. A form whose largest tensor would take more than
3 GB is not run; the file says how much it would be. Before anything is measured, the straightforward form has
to give our value on a small input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import tutelage.functional as TF
from tutelage.deploy.report import environment
from tutelage.files import replacing
from tutelage.knowledge.relation.crd import bank_scores, contrastive_nce
from tutelage.knowledge.relation.memories import other_samples
from tutelage.knowledge.relation.mhgd import GraphHeads
from tutelage.knowledge.relation.svd_transfer import aligned_vectors

FULL = (256, 512, 7, 7)
SMALL = (6, 8, 3, 3)
BANK, NEGATIVES, FEATURES = 50_000, 16_384, 128
LARGEST = 3_000_000_000
Formula = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Method:
    """One method's forms.

    Args:
        shape: of student's and teacher's tensors, from the shape of the maps.
        ours: the library's function.
        straight: the formula as it stands.
        largest: bytes of the straightforward form's largest tensor, from the shape of the tensors.
        theirs: makes torchdistill's class into a function of the same two tensors.
        theirs_largest: bytes of its largest tensor, where that is more than the inputs.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    ours: Formula
    straight: Formula
    largest: Callable[[tuple[int, ...]], int]
    theirs: Callable[[], Formula] | None = None
    theirs_largest: Callable[[tuple[int, ...]], int] = lambda shape: 0


def maps(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2]


def elements(*sizes: int) -> int:
    total = 4
    for size in sizes:
        total *= size
    return total


def rows(x: Tensor) -> Tensor:
    return x.flatten(1)


def width(shape: tuple[int, ...]) -> int:
    return elements(*shape[1:]) // 4


def nst(s: Tensor, t: Tensor) -> Tensor:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) * y.unsqueeze(1)).sum(-1).square().mean((1, 2))

    s, t = (F.normalize(x.flatten(2), dim=2) for x in (s, t))
    return (kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)).mean()


def pkt(s: Tensor, t: Tensor) -> Tensor:
    def likelihoods(x: Tensor) -> Tensor:
        x = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-7)
        similarity = (x @ x.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p, q = likelihoods(rows(t)), likelihoods(rows(s))
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def sp(s: Tensor, t: Tensor) -> Tensor:
    mine, theirs = (F.normalize(rows(x) @ rows(x).T, dim=1) for x in (s, t))
    return (mine - theirs).square().sum() / len(s) ** 2


def angles(x: Tensor) -> Tensor:
    differences = F.normalize(rows(x).unsqueeze(0) - rows(x).unsqueeze(1), dim=2)
    return differences @ differences.mT


def rkd(s: Tensor, t: Tensor) -> Tensor:
    return F.smooth_l1_loss(angles(s), angles(t))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers of one network: neighbouring halves of the channels."""
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def fsp(s: Tensor, t: Tensor) -> Tensor:
    def flow(x: Tensor) -> Tensor:
        first, second = halves(x)
        return (first.unsqueeze(2) * second.unsqueeze(1)).mean((3, 4))

    return (flow(s) - flow(t)).square().mean()


def cc(s: Tensor, t: Tensor) -> Tensor:
    def kernel(x: Tensor) -> Tensor:
        # exp(−γ|x − y|²) of unit vectors, its second factor exp(2γ x·y) as a Taylor polynomial of order 2
        x = F.normalize(rows(x), dim=1)
        products = 0.8 * (x.unsqueeze(0) * x.unsqueeze(1)).sum(2)
        return torch.tensor(-0.8).exp() * (1 + products + products.square() / 2)

    return (kernel(s) - kernel(t)).square().mean()


def edges(s: Tensor, t: Tensor) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        squares = (rows(x).unsqueeze(0) - rows(x).unsqueeze(1)).square().sum(2)
        return squares / squares.max()

    return (relative(s) - relative(t)).square().mean()


def instance_graph(s: Tensor, t: Tensor) -> Tensor:
    """Edges of one layer and the transformation between two, as InstanceGraph weighs them."""
    return 5 * TF.graph_edges(s, t) + 5 * TF.graph_transformation(halves(s), halves(t))


def instance_graph_straight(s: Tensor, t: Tensor) -> Tensor:
    def moved(x: Tensor) -> Tensor:
        first, second = (half.mean((2, 3)) for half in halves(x))
        squares = (second - first).square().sum(1)
        return squares / squares.max()

    return 5 * edges(s, t) + 5 * (moved(s) - moved(t)).square().mean()


class Bank:
    """CRD's memory and the drawn negatives, equal for every form; projections are left out."""

    def __init__(self, batch: int):
        generator = torch.Generator().manual_seed(0)
        samples, count, self.width = (BANK, NEGATIVES, FEATURES) if batch == FULL[0] else (40, 10, SMALL[1])
        self.rows = F.normalize(torch.randn(samples, self.width, generator=generator), dim=1)
        self.ids = torch.arange(batch)
        torch.manual_seed(0)
        self.candidates = torch.cat([self.ids.unsqueeze(1), other_samples(self.ids, samples, count)], 1)

    def ours(self, s: Tensor, t: Tensor) -> Tensor:
        losses = []
        for anchors in (s, t):
            anchors = F.normalize(anchors[:, : self.width], dim=1)
            scores = bank_scores(anchors, self.rows, self.candidates)
            mean = scores.detach().logsumexp((0, 1)) - torch.tensor(float(scores.numel())).log()
            losses.append(contrastive_nce(scores[:, :1], scores[:, 1:], mean))
        return torch.stack(losses).sum()

    def straight(self, s: Tensor, t: Tensor) -> Tensor:
        losses = []
        for anchors in (s, t):
            anchors = F.normalize(anchors[:, : self.width], dim=1)
            gathered = self.rows[self.candidates]
            scores = (gathered @ anchors.unsqueeze(2)).squeeze(2).div(0.07).exp()
            count = scores.shape[1] - 1
            ratio = scores / scores.detach().mean()
            kept = ratio / (ratio + count)
            losses.append(-(kept[:, 0].log() + (1 - kept[:, 1:]).log().sum(1)).mean())
        return torch.stack(losses).sum()


def crd(form: str) -> Formula:
    banks: dict[int, Bank] = {}

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return getattr(banks.setdefault(len(s), Bank(len(s))), form)(s, t)

    return formula


def mhgd(exact: bool) -> Formula:
    heads: dict[int, GraphHeads] = {}

    def leading(x: Tensor) -> Tensor:
        return torch.linalg.svd(x.flatten(2), full_matrices=False)[0][:, :, 0]

    def formula(s: Tensor, t: Tensor) -> Tensor:
        pairs = list(zip(halves(s), halves(t), strict=True))
        if exact:
            theirs = [leading(b) for _, b in pairs]
            mine = [leading(a) for a, _ in pairs]
            # singular vectors have no sign: the student's takes the teacher's
            mine = [a * (a * b).sum(1, keepdim=True).sign() for a, b in zip(mine, theirs, strict=True)]
        else:
            aligned = [aligned_vectors(a, b) for a, b in pairs]
            mine, theirs = ([x[k].squeeze(2) for x in aligned] for k in (0, 1))
        size = mine[0].shape[1]
        if size not in heads:
            torch.manual_seed(0)
            heads[size] = GraphHeads(size, size, heads=8).requires_grad_(False).eval()
        return TF.attention_graph_divergence(heads[size].graph(*mine), heads[size].graph(*theirs))

    return formula


def torchdistill(name: str, **options: object) -> Callable[[], Formula]:
    def make() -> Formula:
        from torchdistill.losses import mid_level

        if name == "PKTLoss":
            loss = mid_level.PKTLoss("a", "output", "b", "output")
            return lambda s, t: loss({"a": {"output": rows(s)}}, {"b": {"output": rows(t)}})
        if name == "FSPLoss":
            both = {
                f"{who}_{n}": {"path": n, "io": "output"} for who in ("student", "teacher") for n in ("first", "second")
            }
            loss = mid_level.FSPLoss({"pair": both})
            layers = lambda x: {n: {"output": half} for n, half in zip(("first", "second"), halves(x), strict=True)}  # noqa: E731
            return lambda s, t: loss(layers(s), layers(t))
        loss = getattr(mid_level, name)("a", "b", **options)
        if name == "RKDLoss":
            return lambda s, t: loss.compute_rkd_angle_loss(rows(t), rows(s))
        flat = rows if name == "CCKDLoss" else maps
        return lambda s, t: loss({"a": {"output": flat(s)}}, {"b": {"output": flat(t)}})

    return make


def pairwise(shape: tuple[int, ...]) -> int:
    return elements(shape[0], shape[0], width(shape))


METHODS = {
    "NeuronSelectivity": Method(
        maps, TF.neuron_selectivity, nst, lambda s: elements(s[0], s[1], s[1], width(s) // s[1])
    ),
    "PKT": Method(maps, TF.pkt, pkt, lambda s: elements(*s), torchdistill("PKTLoss")),
    "SimilarityPreserving": Method(
        maps, TF.similarity_preserving, sp, lambda s: elements(*s), torchdistill("SPKDLoss", reduction="batchmean")
    ),
    "RKD angle, maps": Method(
        maps,
        TF.rkd_angle,
        rkd,
        pairwise,
        torchdistill("RKDLoss", dist_factor=0.0, angle_factor=1.0, reduction="mean"),
        pairwise,
    ),
    "RKD angle, embeddings": Method(
        pooled,
        TF.rkd_angle,
        rkd,
        pairwise,
        torchdistill("RKDLoss", dist_factor=0.0, angle_factor=1.0, reduction="mean"),
        pairwise,
    ),
    "FSP": Method(
        maps,
        lambda s, t: TF.fsp(halves(s), halves(t)),
        fsp,
        lambda s: elements(s[0], s[1] // 2, s[1] // 2, s[2], s[3]),
        torchdistill("FSPLoss"),
    ),
    "CorrelationCongruence": Method(
        maps,
        TF.correlation_congruence,
        cc,
        pairwise,
        torchdistill("CCKDLoss", kernel_config={"type": "gaussian", "gamma": 0.4, "max_p": 2}, reduction="batchmean"),
    ),
    "CRD": Method(pooled, crd("ours"), crd("straight"), lambda s: elements(s[0], NEGATIVES + 1, FEATURES)),
    "InstanceGraph": Method(maps, instance_graph, instance_graph_straight, pairwise),
    "MHGD": Method(maps, mhgd(exact=False), mhgd(exact=True), lambda s: elements(*s)),
}


def forms(name: str) -> dict[str, Formula]:
    method = METHODS[name]
    made = {"tutelage": method.ours, "straightforward": method.straight}
    if method.theirs is not None and importlib.util.find_spec("torchdistill"):
        made["torchdistill"] = method.theirs()
    return made


def inputs(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    size = METHODS[name].shape(shape)
    # after a ReLU, as most taps are
    return torch.rand(size).sub_(0.3).relu_().requires_grad_(), torch.rand(size).sub_(0.3).relu_()


def resident(field: str) -> int:
    """Bytes that the system counts for this process: VmRSS now, VmHWM at its most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def memory(name: str, form: str) -> tuple[int, float]:
    """How much a forward and backward pass holds at its most beyond the inputs and the libraries, and its seconds."""
    formula = forms(name)[form]
    formula(*inputs(name, SMALL)).backward()  # libraries load what they use
    student, teacher = inputs(name, FULL)
    if name == "CRD":  # the bank belongs to the run, not to the step
        formula(student, teacher).backward()
        student.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began = time.perf_counter()
    formula(student, teacher).backward()
    return resident("VmHWM") - before, time.perf_counter() - began


def seconds(name: str, running: list[str], rounds: int) -> dict[str, float]:
    """The median time of a forward and backward pass of each form, in turn."""
    made = {form: formula for form, formula in forms(name).items() if form in running}
    student, teacher = inputs(name, FULL)
    taken: dict[str, list[float]] = {form: [] for form in made}
    for turn in range(rounds + 1):
        for form, formula in made.items():
            student.grad = None
            began = time.perf_counter()
            formula(student, teacher).backward()
            if turn:
                taken[form].append(time.perf_counter() - began)
    return {form: statistics.median(times) for form, times in taken.items()}


def child(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def agrees(name: str) -> None:
    values = {form: formula(*inputs(name, SMALL)).double() for form, formula in forms(name).items()}
    torch.testing.assert_close(values["straightforward"], values["tutelage"], rtol=2e-4, atol=1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/loss_memory.json")
    parser.add_argument("--memory", nargs=2, metavar=("METHOD", "FORM"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", nargs="+", metavar="METHOD", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        print(json.dumps(memory(*given.memory)))
        return
    if given.seconds:
        print(json.dumps(seconds(given.seconds[0], given.seconds[1:], given.rounds)))
        return
    table = []
    for name, method in METHODS.items():
        agrees(name)
        size = method.shape(FULL)
        largest = {"straightforward": method.largest(size), "torchdistill": method.theirs_largest(size)}
        running = [form for form in forms(name) if largest.get(form, 0) <= LARGEST]
        peaks, times = {}, {}
        for form in running:
            peaks[form], times[form] = json.loads(child("--memory", name, form))
        rounds = given.rounds if max(times.values()) < 20 else 1  # of what takes minutes that one pass is enough
        if rounds > 1:
            times = json.loads(child("--rounds", str(rounds), "--seconds", name, *running))
        row = {
            "method": name,
            "shape": size,
            "rounds": rounds,
            "inputs_bytes": 2 * elements(*size),
            "not_run": {form: largest[form] for form in forms(name) if form not in running},
            "forms": {
                form: {
                    "peak_bytes": peaks[form],
                    "peak_over_inputs": round(peaks[form] / (2 * elements(*size)), 3),
                    "seconds": times[form],
                    "time_over_ours": round(times[form] / times["tutelage"], 2),
                }
                for form in running
            },
        }
        table.append(row)
        print(json.dumps(row), flush=True)
    versions = {"torchdistill": importlib.metadata.version("torchdistill")} if "torchdistill" in str(table) else {}
    made = {
        "what": "forward and backward to the student's tensor, one thread, float32; medians of interleaved rounds",
        "batch": FULL[0],
        "crd": {"bank": BANK, "negatives": NEGATIVES, "features": FEATURES},
        "rounds": given.rounds,
        "environment": {**environment(), **versions},
        "methods": table,
    }
    os.makedirs(Path(given.out).parent, exist_ok=True)
    with replacing(given.out) as path:
        Path(path).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
