"""What a training step costs above the bare limit, in time and memory, for twenty methods.

    pip install -e ".[benchmark,vision]"
    OMP_NUM_THREADS=1 python benchmarks/step_time.py

The bare limit is the teacher's forward pass in inference mode and the student's forward and backward pass of the
cross-entropy with an optimiser step: what no distillation can do without. Each round times one step of each form in
turn, in one process: the limit, ``tutelage.fit`` as users call it (everything that its loop does between two batches
is in it), a loop written by hand around the paper's formula, and torchdistill's ``DistillationBox``, where it has the
method without projectors of its own. The ratio is the median over rounds of a form's seconds ÷ the limit's of the
same round; its interval is the order statistics' of 95 %.

Memory is the most that one step's tensors hold beyond what was there before it (benchmarks/peaks.py), as a
difference to the limit's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.metadata
import importlib.util
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import loss_memory
import torch
import torch.nn.functional as F
from peaks import peak_bytes
from torch import Tensor, nn

import tutelage as tl
from tutelage import models
from tutelage.deploy.report import environment
from tutelage.engine import fit
from tutelage.files import replacing

SAMPLES, NEGATIVES = 50_000, 16_384
LR = 1e-6  # the networks have their first weights, from which some losses diverge at real rates
SLOWEST = 4.0  # forms that take longer than so many limits are stepped twice, and not in every round
Step = Callable[[], object]
Tensors = list[Tensor]


@dataclass(frozen=True)
class Pair:
    """Two networks and a batch.

    Args:
        teacher, student: made afresh by each call.
        batch: samples of a step.
        pixels, classes: of the images.
        stages: names of the modules that end a stage, in both networks.
        pool: of the module that gives the embedding, in both.
        rounds: how often each form is timed.
    """

    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    batch: int
    pixels: int
    classes: int
    stages: tuple[str, ...]
    pool: str
    rounds: int


def imagenet(name: str) -> Callable[[], nn.Module]:
    return lambda: models.create(f"torchvision:{name}", num_classes=1000)


PAIRS = {
    "resnet56-resnet20": Pair(
        lambda: models.resnet56(num_classes=100),
        lambda: models.resnet20(num_classes=100),
        64,
        32,
        100,
        ("layer1", "layer2", "layer3"),
        "avgpool",
        31,
    ),
    "resnet50-resnet18": Pair(
        imagenet("resnet50"),
        imagenet("resnet18"),
        8,
        224,
        1000,
        ("layer1", "layer2", "layer3", "layer4"),
        "avgpool",
        7,
    ),
}


@dataclass(frozen=True)
class Method:
    """One method in its three forms, each beside the cross-entropy of the labels.

    Args:
        group: whose target it has.
        loss: ours, for a pair.
        reads: what a loop by hand and torchdistill tap.
        hand: the formula as it stands, of the student's and the teacher's tapped tensors, or ``None``.
        theirs: name and arguments of torchdistill's class, or ``None``.
    """

    group: str
    loss: Callable[[Pair], tl.Loss]
    reads: Callable[[Pair], tuple[str, ...]] = lambda pair: ("",)
    hand: Callable[[Tensors, Tensors], Tensor] | None = None
    theirs: Callable[[Pair], dict] | None = None


TARGETS = {"response": 1.03, "one layer": 1.08, "NST and FSP": 1.12, "CRD": 1.20}


def last(pair: Pair) -> tuple[str, ...]:
    return pair.stages[-1:]


def pooled(pair: Pair) -> tuple[str, ...]:
    return (pair.pool,)


def stages(pair: Pair) -> tuple[str, ...]:
    return pair.stages


def places(path: str) -> dict[str, str]:
    """Where torchdistill's losses of one tensor look for it."""
    return {
        f"{who}_module_{what}": v for who in ("student", "teacher") for what, v in (("path", path), ("io", "output"))
    }


def soft(logits: Tensors, temperature: float) -> Tensor:
    return F.log_softmax(logits[0] / temperature, dim=1)


def kd(s: Tensors, t: Tensors) -> Tensor:
    return 16 * F.kl_div(soft(s, 4), soft(t, 4).exp(), reduction="batchmean")


def standardized(s: Tensors, t: Tensors) -> Tensor:
    (mine,), (theirs,) = ([(x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in z] for z in (s, t))
    return 9 * 4 * F.kl_div(soft([mine], 2), soft([theirs], 2).exp(), reduction="batchmean")


def correlation(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), dim=1).mean()


def dist(s: Tensors, t: Tensors) -> Tensor:
    p, q = s[0].softmax(1), t[0].softmax(1)
    return 2 * (1 - correlation(p, q)) + 2 * (1 - correlation(p.T, q.T))


def attention(s: Tensors, t: Tensors) -> Tensor:
    def attended(x: Tensor) -> Tensor:
        return F.normalize(x.square().mean(1).flatten(1))

    return 1000 * torch.stack([(attended(x) - attended(y)).square().mean() for x, y in zip(s, t, strict=True)]).sum()


def relational(s: Tensors, t: Tensors) -> Tensor:
    def distances(x: Tensor) -> Tensor:
        x = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return x / x[x > 0].mean()

    s, t = [x.flatten(1) for x in s], [x.flatten(1) for x in t]
    return 25 * F.smooth_l1_loss(distances(s[0]), distances(t[0])) + 50 * loss_memory.rkd(s[0], t[0])


def of_one(formula: Callable[[Tensor, Tensor], Tensor], weight: float, flat: bool = False) -> Callable:
    def hand(s: Tensors, t: Tensors) -> Tensor:
        return weight * formula(*(x[0].flatten(1) if flat else x[0] for x in (s, t)))

    return hand


def of_each(formula: Callable[[Tensor, Tensor], Tensor], weight: float) -> Callable:
    def hand(s: Tensors, t: Tensors) -> Tensor:
        return weight * torch.stack([formula(x, y) for x, y in zip(s, t, strict=True)]).sum()

    return hand


def flows(s: Tensors, t: Tensors) -> Tensor:
    def flow(first: Tensor, second: Tensor) -> Tensor:
        first = F.adaptive_max_pool2d(first, second.shape[2:]).flatten(2)
        return first @ second.flatten(2).mT / first.shape[2]

    steps = range(len(s) - 1)
    return torch.stack([(flow(*s[n : n + 2]) - flow(*t[n : n + 2])).square().mean() for n in steps]).sum()


def their_flows(pair: Pair) -> dict:
    def step(n: int) -> dict:
        ends = zip(("first", "second"), pair.stages[n : n + 2], strict=True)
        both = {end: {"io": "output", "path": path} for end, path in ends}
        return {f"{who}_{end}": place for who in ("student", "teacher") for end, place in both.items()}

    return {"key": "FSPLoss", "kwargs": {"fsp_pairs": {f"step{n}": step(n) for n in range(len(pair.stages) - 1)}}}


def their_attention(reads: Callable[[Pair], tuple[str, ...]]) -> Callable[[Pair], dict]:
    def criterion(pair: Pair) -> dict:
        both = {path: {who: {"io": "output", "path": path} for who in ("student", "teacher")} for path in reads(pair)}
        return {"key": "ATLoss", "kwargs": {"at_pairs": both}}

    return criterion


def of_logits(key: str, **options: float) -> Callable[[Pair], dict]:
    return lambda pair: {"key": key, "kwargs": {**places("."), **options}}


def of_maps(pair: Pair) -> dict:
    ends = {"student_output_path": pair.stages[-1], "teacher_output_path": pair.stages[-1]}
    return {"key": "SPKDLoss", "kwargs": {**ends, "reduction": "batchmean"}}


METHODS = {
    "KD": Method(
        "response", lambda p: tl.KD(temperature=4), hand=kd, theirs=of_logits("KDLoss", temperature=4, beta=16)
    ),
    "DKD": Method("response", lambda p: tl.DKD()),
    "DIST": Method("response", lambda p: tl.DIST(), hand=dist, theirs=of_logits("DISTLoss", beta=2, gamma=2)),
    "LogitStd": Method(
        "response",
        lambda p: tl.LogitStd(),
        hand=standardized,
        theirs=of_logits("LogitStdKDLoss", temperature=2, beta=9),
    ),
    "NKD": Method("response", lambda p: tl.NKD()),
    "WSLD": Method("response", lambda p: tl.WSLD()),
    "LogitRegression": Method("response", lambda p: tl.LogitRegression(), hand=of_one(F.mse_loss, 1)),
    "FitNets": Method("one layer", lambda p: tl.FitNets(*last(p))),
    "AttentionTransfer, last stage": Method(
        "one layer", lambda p: tl.AttentionTransfer(*last(p)), last, attention, their_attention(last)
    ),
    "VID, last stage": Method("one layer", lambda p: tl.VID(*last(p))),
    "ChannelWise": Method("one layer", lambda p: tl.ChannelWise(*last(p))),
    "PKT": Method("one layer", lambda p: tl.PKT(), pooled, of_one(loss_memory.pkt, 30_000, flat=True)),
    "SimilarityPreserving": Method(
        "one layer", lambda p: tl.SimilarityPreserving(*last(p)), last, of_one(loss_memory.sp, 3000), of_maps
    ),
    "RKD": Method("one layer", lambda p: tl.RKD(), pooled, relational),
    "CorrelationCongruence": Method(
        "one layer", lambda p: tl.CorrelationCongruence(), pooled, of_one(loss_memory.cc, 1, flat=True)
    ),
    "AttentionTransfer, all stages": Method(
        "several layers", lambda p: tl.AttentionTransfer(*p.stages), stages, attention, their_attention(stages)
    ),
    "VID, all stages": Method("several layers", lambda p: tl.VID(*p.stages)),
    "NeuronSelectivity": Method(
        "NST and FSP", lambda p: tl.NeuronSelectivity(*p.stages), stages, of_each(loss_memory.nst, 50)
    ),
    "FSP": Method("NST and FSP", lambda p: tl.FSP(*p.stages), stages, flows, their_flows),
    "CRD": Method("CRD", lambda p: tl.CRD(k=NEGATIVES)),
}


def tapped(model: nn.Module, reads: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, Tensors]]:
    """The model with hooks as one writes them by hand: its logits, and what was read ("" reads the logits)."""
    held: dict[str, Tensor] = {}
    for name in filter(None, reads):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: held.__setitem__(name, out))

    def run(x: Tensor) -> tuple[Tensor, Tensors]:
        logits = model(x)
        return logits, [held[name] if name else logits for name in reads]

    return run


def limit_step(pair: Pair, teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = tl.Training(steps=1, lr=LR).make_optimizer(student.train().parameters())

    def step() -> None:
        with torch.inference_mode():
            teacher(x)
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def hand_step(method: Method, pair: Pair, teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor) -> Step | None:
    """A training loop's step as one writes it around one formula; ``None`` where there is none or it does not fit."""
    if method.hand is None or (method.hand is flows and pair is not PAIRS["resnet56-resnet20"]):
        return None  # flows of unequal channels need projectors
    optimizer = tl.Training(steps=1, lr=LR).make_optimizer(student.train().parameters())
    mine, theirs = (tapped(model, method.reads(pair)) for model in (student, copy.deepcopy(teacher)))

    def step() -> None:
        with torch.no_grad():
            t = theirs(x)[1]
        logits, s = mine(x)
        (F.cross_entropy(logits, y) + method.hand(s, t)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchdistill_step(
    method: Method, pair: Pair, teacher: nn.Module, student: nn.Module, x: Tensor, y: Tensor
) -> Step | None:
    """``None`` where it has no such class, wants projectors or is not installed."""
    unequal = method.theirs is their_flows and pair is not PAIRS["resnet56-resnet20"]
    if method.theirs is None or unequal or not importlib.util.find_spec("torchdistill"):
        return None
    from torchdistill.core.distillation import DistillationBox

    hooks = {"output": list(filter(None, method.reads(pair)))}
    of_labels = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                "target": {"uses_label": True},
            },
        },
        "weight": 1.0,
    }
    terms = {"task": of_labels, "distillation": {"criterion": method.theirs(pair), "weight": 1.0}}
    networks = {"forward_proc": "forward_batch_only", **({"forward_hook": hooks} if hooks["output"] else {})}
    config = {
        "num_epochs": 1,
        "teacher": {**networks, "requires_grad": False},
        "student": dict(networks),
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": LR, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    logging.disable(logging.CRITICAL)
    box = DistillationBox(copy.deepcopy(teacher), student, {}, config, torch.device("cpu"), None, False, 1)
    logging.disable(logging.NOTSET)
    # what its pre-epoch process does with the two networks, which otherwise wants a loader
    box.teacher_model.eval()
    box.student_model.train()

    def step() -> None:
        box.post_forward_process(box.forward_process(x, targets=y, supp_dict={}))

    return step


class Rounds:
    """A loader for ``fit`` that runs a round of the other forms before it hands the batch over, and watches the clock.

    The time from handing a batch over until the next is asked for is a whole step of ``fit``'s own loop.
    """

    def __init__(self, batch: tuple, others: dict[str, Step], rounds: int):
        self.batch, self.others, self.rounds = batch, others, rounds
        self.dataset = range(SAMPLES)
        self.seconds: dict[str, list[float]] = {name: [] for name in (*others, "tutelage")}

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[tuple]:
        for turn in range(self.rounds):
            taken = {name: timed(step) for name, step in self.others.items()}
            began = time.perf_counter()
            yield self.batch
            taken["tutelage"] = time.perf_counter() - began
            if turn > 1:  # the first steps make buffers, and look at gradients
                for name, value in taken.items():
                    self.seconds[name].append(value)


def timed(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def ratio(form: list[float], limit: list[float]) -> dict[str, float]:
    """The median ratio and the 95 % interval of a median by order statistics."""
    ratios = sorted(a / b for a, b in zip(form, limit, strict=True))
    n = len(ratios)
    reach = math.ceil(1.96 * math.sqrt(n) / 2)
    low, high = ratios[max(0, n // 2 - reach)], ratios[min(n - 1, n // 2 + reach)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "seconds": round(statistics.median(form), 5),
    }


def measure(name: str, pair: Pair, rounds: int) -> dict:
    method = METHODS[name]
    torch.manual_seed(0)
    teacher = pair.teacher().eval().requires_grad_(False)
    first = pair.student()
    x = torch.randn(pair.batch, 3, pair.pixels, pair.pixels)
    y = torch.randint(pair.classes, (pair.batch,))
    made = {
        "limit": limit_step(pair, teacher, copy.deepcopy(first), x, y),
        "by hand": hand_step(method, pair, teacher, copy.deepcopy(first), x, y),
        "torchdistill": torchdistill_step(method, pair, teacher, copy.deepcopy(first), x, y),
    }
    others = {form: step for form, step in made.items() if step is not None}
    once = {form: min(timed(step) for _ in range(2)) for form, step in others.items()}
    too_slow = {form: round(once[form] / once["limit"], 2) for form in once if once[form] > SLOWEST * once["limit"]}
    others = {form: step for form, step in others.items() if form not in too_slow}
    student = copy.deepcopy(first)
    d = tl.Distillation(student, teacher, losses=[tl.TaskLoss(), method.loss(pair)])
    loader = Rounds((x, y, torch.arange(pair.batch)), others, rounds + 2)
    gc.collect()
    with contextlib.redirect_stderr(None):
        fit(d, loader, training=tl.Training(epochs=1, lr=LR, cpu=True, progress=False))
    limit = loader.seconds["limit"]
    optimizer = tl.Training(steps=1, lr=LR).make_optimizer(p for p in d.parameters() if p.requires_grad)

    def ours() -> None:
        d((x, y, torch.arange(pair.batch))).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    ours()
    peaks = {form: peak_bytes(step) for form, step in (*others.items(), ("tutelage", ours))}
    forms = {}
    for form in peaks:
        forms[form] = ratio(loader.seconds[form], limit) | {
            "peak_bytes": peaks[form],
            "peak_above_limit": peaks[form] - peaks["limit"],
        }
    target = TARGETS.get(method.group)
    return {"method": name, "group": method.group, "target": target, "forms": forms, "one_step_only": too_slow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/step_time.json")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="others' rows stay")
    parser.add_argument("--rounds", type=int, help="of each form; by default the pair's own")

    given = parser.parse_args()
    torch.set_num_threads(1)
    out, again = Path(given.out), {(pair, name) for pair in given.pairs for name in given.methods}
    there = json.loads(out.read_text())["rows"] if out.exists() else []
    rows = [row for row in there if (row["pair"], row["method"]) not in again]
    for pair in given.pairs:
        for name in given.methods:
            rows.append({"pair": pair, **measure(name, PAIRS[pair], given.rounds or PAIRS[pair].rounds)})
            forms = {
                form: (v["ratio"], v["low"], v["high"]) for form, v in rows[-1]["forms"].items() if form != "limit"
            }
            above = rows[-1]["forms"]["tutelage"]["peak_above_limit"] / 2**20
            print(f"{pair} {name}: {forms}, {above:+.1f} MiB", flush=True)
    places = [(pair, name) for pair in PAIRS for name in METHODS]
    rows.sort(key=lambda row: places.index((row["pair"], row["method"])))
    installed = importlib.util.find_spec("torchdistill")
    content = {
        "what": "seconds of a training step ÷ the bare limit's of the same round, one thread, float32; memory above it",
        "batch": {name: pair.batch for name, pair in PAIRS.items()},
        "crd": {"bank": SAMPLES, "negatives": NEGATIVES},
        "torchdistill": importlib.metadata.version("torchdistill") if installed else None,
        "environment": environment(),
        "rows": rows,
    }
    with replacing(out) as beside:
        beside.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
