"""``tutelage gap``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tutelage.commands import Add
from tutelage.commands.common import loaders_of, network_of, print_json

if TYPE_CHECKING:
    from tutelage.architecture.remedies import Gap

_WIDTH = 80


def gap(
    teacher: str,
    student: str,
    data: str = "fashion_loaders",
    root: str | None = None,
    limit: int | None = None,
    epochs: int = 5,
    lr: float = 0.005,
    temperature: list[float] | None = None,
    samples: int = 2000,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Measure the capacity gap of a pair by short trainings and probes, and say what to do about it.

    Args:
        teacher: A trained network as resnet20, SmallCNN(width=32)@FILE (in quotes, for the shell), timm:resnet18,
            torchvision:resnet18 or package.module:function.
        student: A network in the same form; its initial weights are random unless @FILE says otherwise.
        data: Training data to learn from and validation data to judge by: fashion_loaders, cifar10_loaders or
            cifar100_loaders.
        root: Folder of these data (not of fashion_loaders, which are packaged).
        limit: Training images to use; all if not given.
        epochs: Length of each training.
        lr: Learning rate of each training (AdamW, one cycle).
        temperature: At which the teacher's answers are learned, 1 and 4 if not given; repeat it for several.
        samples: Most training and validation samples for the probes.
        seed: Of the student's initial weights, the order of the data and everything else that is random.
        json: Print JSON.
    """
    import torch

    from tutelage.architecture.gap import capacity_gap

    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected 1 or more training images")
    loaders = loaders_of(data, "data", root, limit=limit)
    network = network_of(teacher, None)
    torch.manual_seed(seed)
    found = capacity_gap(
        network_of(student, None),
        network,
        loaders.train,
        loaders.validation,
        temperatures=temperature or (1.0, 4.0),
        samples=samples,
        epochs=epochs,
        lr=lr,
        seed=seed,
    )
    if json:
        from dataclasses import asdict

        print_json({"names": {"teacher": teacher, "student": student}, **asdict(found)})
        return
    console = Console()
    console.width = min(console.width, _WIDTH)
    for part in _shown(found, teacher, student):
        console.print(part, highlight=False)


def _shown(found: Gap, teacher: str, student: str) -> list[Any]:
    reached = Table("training", "accuracy", "agreement", "KL, nats", title=f"{found.samples:,} held-out samples")
    for line in (found.teacher, found.alone, *found.taught):
        nats = "" if line.kl is None else f"{line.kl:.3f}"
        reached.add_row(line.name, f"{line.accuracy:.1%}", _share(line.agreement), nats)
    probes = Table("network", "address", "features", "labels", "choices", title="Linear probes, held out")
    for probe in found.probes:
        probes.add_row(
            probe.network, escape(probe.address), f"{probe.features:,}", f"{probe.labels:.1%}", f"{probe.choices:.1%}"
        )
    probes.caption = f"Teacher's embedding from the student's: R² {found.embedding_r2:.2f}"
    sizes = Table("", "teacher", "student")
    sizes.add_row("network", escape(teacher), escape(student))
    for label, name in (("parameters", "parameters"), ("MACs of a sample", "macs")):
        sizes.add_row(label, *(f"{getattr(size, name):,}" for size in (found.teacher_size, found.student_size)))
    reasons = [f"- {escape(reason)}" for reason in found.reasons]
    return [reached, probes, sizes, f"[bold]{escape(found.recommendation)}[/bold]", *reasons, _HEURISTIC]


_HEURISTIC = "The rules are heuristics; what was measured is a short training's. `--epochs` gives it more."


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def arguments(add: Add) -> None:
    """The command line's grammar of :func:`gap`."""
    add("teacher", metavar="TEACHER")
    add("student", metavar="STUDENT")
    add("--data", default="fashion_loaders", metavar="LOADERS")
    add("--root", metavar="FOLDER")
    add("--limit", type=int, metavar="N")
    add("--epochs", type=int, default=5, metavar="N")
    add("--lr", type=float, default=0.005, metavar="RATE")
    add("--temperature", type=float, action="append", metavar="T")
    add("--samples", type=int, default=2000, metavar="N")
    add("--seed", type=int, default=0, metavar="N")
    add("--json", action="store_true")
