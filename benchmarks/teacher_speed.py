"""A teacher's forward pass in each of its accelerated forms, beside the plain one in float32, and how far they deviate.

    python benchmarks/teacher_speed.py --data FOLDER --teacher resnet56.pt

Two teachers: a trained CIFAR-10 ResNet-56 on test images, and torchvision's ResNet-50 at 224×224, whose weights are
random (its figures of deviation say only that the forms calculate the same function). All forms of a teacher are timed
in turn, in an order drawn anew in each round, under ``no_grad``; ``time`` is the median ratio to the plain form of the
same round, with a 95 % interval. KL(plain ‖ form) and agreement are over ``--images`` images. ``made`` is how long a
form took to make, with its first call: that is where ``torch.compile`` costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.acceleration import AUTO, accelerated
from tutelage.data import cifar10_loaders
from tutelage.deploy.report import environment
from tutelage.deploy.timing import busy, in_turn, ratio
from tutelage.files import replacing
from tutelage.models import load_weights, resnet56
from tutelage.record import Record
from tutelage.speedup import Deviation
from tutelage.taps import Observer
from tutelage.views import Inputs

NAMED = [("fold",), ("channels_last",), ("bf16",), ("bf16", "channels_last"), AUTO]
OTHERS = [("compile",), (*AUTO, "compile"), ("int8",)]
Call = Callable[[Inputs], Record]


def forms(teacher: nn.Module, inputs: Inputs, others: bool) -> tuple[dict[str, Call], dict[str, float | str]]:
    """The forms by name, each called once, with the seconds it took to make them or why there is none."""
    plain = Observer(teacher, ["@logits"])

    def autocast(given: Inputs) -> Record:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(given)

    plain.dry_run(inputs)
    calls: dict[str, Call] = {"plain": plain, "autocast": autocast}
    made: dict[str, float | str] = {"plain": 0.0, "autocast": 0.0}
    for names in (*NAMED, *(OTHERS if others else ())):
        name, began = " + ".join(names), time.monotonic()
        try:
            calls[name] = accelerated(plain, names, inputs)
            calls[name](inputs)
            made[name] = time.monotonic() - began
        except Exception as error:  # tracers, compilers and runtimes have no error in common
            calls.pop(name, None)
            made[name] = " ".join(str(error).split())[:300]
    return calls, made


def in_inference_mode(call: Call) -> Call:
    def run(inputs: Inputs) -> Record:
        with torch.inference_mode():
            return call(inputs)

    return run


def rows(teacher: nn.Module, batches: list[Tensor], rounds: int, others: bool) -> list[dict[str, Any]]:
    """One line a form: its time on the first batch, and its deviation over all batches."""
    teacher.eval().requires_grad_(False)
    inputs = Inputs((batches[0],))
    with torch.no_grad():
        calls, made = forms(teacher, inputs, others)
        fastest = " + ".join(AUTO)
        for name in ("plain", fastest):
            calls[f"{name}, inference mode"] = in_inference_mode(calls[name])
            made[f"{name}, inference mode"] = made[name]
        logits = {name: torch.cat([call(Inputs((x,))).logits for x in batches]) for name, call in calls.items()}
        seconds = in_turn({name: (lambda c=call: c(inputs)) for name, call in calls.items()}, rounds, warmup=1)
    found = []
    for name in made:
        if name not in calls:
            found.append({"form": name, "left_out": made[name]})
            continue
        deviation = Deviation.between(Record(logits["plain"]), Record(logits[name]), ["@logits"])
        found.append(
            {
                "form": name,
                "time": asdict(ratio(seconds[name], seconds["plain"])),
                "seconds": statistics.median(seconds[name]),
                "kl_nats": deviation.divergence,
                "relative_error": deviation.error,
                "agreement": float((logits[name].argmax(1) == logits["plain"].argmax(1)).float().mean()),
                "made_seconds": made[name],
            }
        )
        print(f"  {name:42} {ratio(seconds[name], seconds['plain'])}  {deviation}", flush=True)
    return found


def of_cifar(folder: str, weights: str, batch_size: int, images: int) -> tuple[nn.Module, list[Tensor]]:
    teacher = resnet56(shortcut="padding")
    load_weights(teacher, weights)
    return teacher, _first(cifar10_loaders(folder, limit=100, batch_size=100).test, batch_size, images)


def _first(loader: Iterable[Any], batch_size: int, images: int) -> list[Tensor]:
    taken: list[Tensor] = []
    for raw in loader:
        taken.append(raw[0])
        if sum(map(len, taken)) >= images:
            break
    return list(torch.cat(taken)[: max(images, batch_size)].split(batch_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with the packed CIFAR-10, or torchvision's")
    parser.add_argument("--teacher", required=True, help="state dict of the option-A ResNet-56")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=2000, help="CIFAR-10 test images to compare on")
    parser.add_argument("--batch-size", type=int, default=128, help="of CIFAR-10")
    parser.add_argument("--size", type=int, default=224, help="of ResNet-50's images, 8 in a batch")
    parser.add_argument("--without-others", action="store_true", help="no torch.compile and no int8")
    parser.add_argument("--out", default="benchmarks/results/teacher_speed.json")
    given = parser.parse_args()

    import torchvision

    if warning := busy(torch.get_num_threads()):
        print(warning)
    torch.manual_seed(0)
    cifar, images = of_cifar(given.data, given.teacher, given.batch_size, given.images)
    random = [torch.randn(8, 3, given.size, given.size)]
    found = []
    for name, weights, teacher, batches in (
        ("ResNet-56, CIFAR-10", "trained", cifar, images),
        (f"ResNet-50, {given.size}×{given.size}", "random", torchvision.models.resnet50(), random),
    ):
        print(f"{name}, {weights} weights, batch {len(batches[0])}", flush=True)
        found.append(
            {
                "teacher": name,
                "weights": weights,
                "batch_size": len(batches[0]),
                "images": sum(map(len, batches)),
                "forms": rows(teacher, batches, given.rounds, not given.without_others),
            }
        )
    body = {
        "what": __doc__.split("\n")[0],
        "settings": {"rounds": given.rounds, "images": given.images, "threads": torch.get_num_threads()},
        "environment": environment(),
        "teachers": found,
    }
    with replacing(given.out) as beside:
        beside.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
