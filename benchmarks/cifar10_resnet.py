"""A pretrained CIFAR-10 ResNet-56 teaches ResNet-20 and ResNet-8 on 10,000 images, beside the students alone.

    python benchmarks/cifar10_resnet.py --data FOLDER --teacher resnet56.pt

Every run is a packaged recipe (``cifar10_resnet20``, ``cifar10_resnet8``) with ``control: true``. Weights are chosen on
1,000 validation images; the 10,000 test images are looked at when training is over. An interrupted call goes on where
it was.
"""

from __future__ import annotations

import argparse
import json
import time

from tutelage.comparison import mean_interval, paired_interval
from tutelage.deploy.report import environment
from tutelage.files import replacing
from tutelage.recipe import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with the packed CIFAR-10, or torchvision's")
    parser.add_argument("--teacher", required=True, help="state dict of the option-A ResNet-56")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--runs", default="runs/cifar10", help="folder of the runs, to go on in")
    parser.add_argument("--out", default="benchmarks/results/cifar10_resnet.json")
    given = parser.parse_args()

    rows = []
    for student in ("resnet20", "resnet8"):
        figures: dict[str, list[float]] = {name: [] for name in ("taught", "taught last", "alone", "alone last")}
        agreement: dict[str, list[float]] = {"taught": [], "alone": []}
        seconds = []
        for seed in range(given.seeds):
            began = time.monotonic()
            result = load(
                f"cifar10_{student}",
                [
                    f"data.init_args.root={given.data}",
                    f"teacher_weights={given.teacher}",
                    f"training.epochs={given.epochs}",
                    f"training.precision={given.precision}",
                    f"out={given.runs}/{student}-{seed}",
                    f"seed={seed}",
                    "resume=true",
                ],
            )()
            seconds.append(time.monotonic() - began)
            for name, run in (("taught", result), ("alone", result.control)):
                figures[name].append(run.metrics.accuracy)
                figures[f"{name} last"].append(run.last_metrics.accuracy)
                agreement[name].append(run.metrics.agreement)
            print(student, seed, {k: round(v[-1], 4) for k, v in figures.items()}, flush=True)
        rows.append(
            {
                "student": student,
                "parameters": sum(p.numel() for p in result.student.parameters()),
                "teacher_accuracy": result.teacher_metrics.accuracy,
                "accuracy": figures,
                "agreement": agreement,
                "summary": {name: str(mean_interval([100 * v for v in values])) for name, values in figures.items()},
                "gain": str(paired_interval(*([100 * v for v in figures[n]] for n in ("taught", "alone")))),
                "seconds": seconds,
            }
        )
    body = {
        "what": main.__doc__ or __doc__.split("\n")[0],
        "settings": {k: v for k, v in vars(given).items() if k in ("epochs", "seeds", "precision")},
        "environment": environment(),
        "rows": rows,
    }
    with replacing(given.out) as beside:
        beside.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
