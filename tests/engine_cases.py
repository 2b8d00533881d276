"""What test_engine_processes.py runs in processes of its own: ``engine_cases.py shared|signals|kill FOLDER``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import CRD, KD, Distillation, LogitCritic, TaskLoss, Training, evaluate
from tutelage.data import ArrayLoader, CropFlip, Indexed
from tutelage.engine import fit
from tutelage.run import Interrupted

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 6, generator=GENERATOR)
Y = torch.arange(64) % 3
UNEVEN = Y.clone()
UNEVEN[8:16] = -100
UNEVEN[33:37] = -100
IMAGES = np.random.default_rng(0).integers(0, 256, (48, 6, 6, 1), dtype=np.uint8)


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def mlp(width, seed=0, norm=False, drop=0.0):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(6, width), *middle, nn.ReLU(), nn.Dropout(drop), nn.Linear(width, 3))


def cnn(width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3))


def settings(**changes):
    return Training(**{"epochs": 3, "progress": False, "cpu": True, "lr": 0.2, "log_every": 2, **changes})


def plain(out, labels=UNEVEN, accumulate=1, student=None, **options):
    """KD and the task's loss, with labels missing mostly in one process's part."""
    size = 16 // world() // accumulate
    train = DataLoader(TensorDataset(X, labels), batch_size=size)
    validation = DataLoader(TensorDataset(X[:50], Y[:50]), batch_size=8)
    student = student or mlp(5)
    d = Distillation(student, mlp(9, seed=1), [TaskLoss(weight=0.5), KD(weight=0.5)])
    how = {k: options.pop(k) for k in ("resume",) if k in options}
    made = fit(d, train, validation, training=settings(accumulate=accumulate, **options), out=out, **how)
    return made.last, [line.metrics for line in made.history], [line.losses for line in made.history]


def arrays(out):
    """Shuffled images, in shares of every second item."""
    labels = np.arange(48) % 3
    train = ArrayLoader(IMAGES, labels, batch_size=16 // world(), shuffle=True)
    validation = ArrayLoader(IMAGES[:31], labels[:31], batch_size=8)
    d = Distillation(cnn(3), cnn(5, seed=1))
    made = fit(d, train, validation, training=settings(), out=out)
    return made.last, [line.metrics for line in made.history]


def memories(out):
    """Things that learn or remember beside the student; returns everything that must be the same everywhere."""
    train = DataLoader(Indexed(TensorDataset(X, Y)), batch_size=8, shuffle=True)
    teacher = mlp(9, seed=1, norm=True)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    d = Distillation(mlp(5, norm=True), teacher, [TaskLoss(), CRD("4:input", features=4, k=5), LogitCritic(hidden=8)])
    fit(d, train, None, training=settings(), out=out)
    same = all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    critic = d.side_learners()["LogitCritic.critic"].module
    return d.state_dict(), critic.state_dict(), same, [n for n, _ in d.named_parameters()]


def norms(out):
    """Batch norm, whose running averages DDP alone would leave different in each process."""
    train = DataLoader(TensorDataset(X, Y), batch_size=8)
    validation = [(X[:30], Y[:30]), (X[30:60], Y[30:60]), (X[60:], Y[60:])]
    student = mlp(5, norm=True)
    made = fit(Distillation(student, mlp(9, seed=1)), train, validation, training=settings(), out=out)
    with torch.no_grad():
        logits = student.eval()(X)
    mine = torch.nn.functional.cross_entropy(logits, Y).item(), (logits.argmax(1) == Y).float().mean().item()
    return student.state_dict(), made.last, made.history[-1].metrics, mine


def evaluation():
    """One batch for two processes; and three; and a loader that shares itself out."""
    student, teacher = mlp(5), mlp(9, seed=1)
    found = []
    for size in (64, 25, 8):
        loader = [(X[i : i + size], UNEVEN[i : i + size]) for i in range(0, 64, size)]
        found.append(evaluate(student, loader, teacher).known())
    labels = np.arange(48) % 3
    found.append(evaluate(cnn(3), ArrayLoader(IMAGES, labels, batch_size=5), cnn(5, seed=1)).known())
    return found


def resumed(out):
    """Shuffled, with drop-out, stopped inside an epoch by a signal to one process only."""

    class Sends:
        """A batch's transform that sends a signal in the middle."""

        def __init__(self, at):
            self.at, self.count = at, 0

        def __call__(self, items):
            self.count += 1
            if self.count == self.at and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return torch.utils.data.default_collate(items)

    def run(folder, at=None, resume=False):
        train = DataLoader(Indexed(TensorDataset(X, Y)), batch_size=8, shuffle=True, collate_fn=Sends(at))
        d = Distillation(mlp(5, drop=0.3, norm=True), mlp(9, seed=1))
        made = fit(d, train, None, training=settings(epochs=3), out=folder, resume=resume)
        return made.last, [line.losses for line in made.history]

    whole = run(out / "whole")
    try:
        run(out / "cut", at=7)
        stopped = "not at all"
    except Interrupted as stop:
        stopped = str(stop)
    torch.manual_seed(5)
    return whole, stopped, run(out / "cut", resume=True)


def fsdp(out):
    """accelerate chooses FSDP2 for accelerators only; told that this is one, it shards on the processor as well."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    student = mlp(5)
    result = plain(out / "whole", student=student, cpu=False, clip=5.0)
    kinds = {type(p).__name__ for p in student.parameters()}

    class Cut(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            if self.count == 6:
                raise OSError("power cut")
            self.count += 1
            return super().step(closure)

    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "lr": 0.2}
    options = {"cpu": False, "clip": 5.0, "checkpoint_every": 1}
    with contextlib.suppress(OSError):
        plain(out / "cut", optimizer=lambda p: Cut(p, **sgd), **options)
    again = plain(out / "cut", optimizer=lambda p: torch.optim.SGD(p, **sgd), resume=True, **options)
    return result, kinds, again


def shared(out: Path) -> None:
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    found = {
        "plain": plain(out / "plain"),
        "accumulated": plain(out / "accumulated", accumulate=2),
        "arrays": arrays(out / "arrays"),
        "memories": memories(out / "memories"),
        "norms": norms(out / "norms"),
        "evaluation": evaluation(),
        "resumed": resumed(out / "resumed"),
        "fsdp": fsdp(out / "fsdp"),
    }
    torch.save(found, out / f"rank{rank}.pt")
    dist.destroy_process_group()


class Slow(ArrayLoader):
    """Waits a little with each batch, and makes a file a byte longer with each."""

    file: Path | None = None

    def __iter__(self):
        for batch in super().__iter__():
            if self.file is not None:
                with self.file.open("ab") as file:
                    file.write(b".")
                time.sleep(0.01)
            yield batch


def long_run(out, file=None, resume=False):
    """150 steps with augmentation, a checkpoint at every fourth."""
    train = Slow(IMAGES, np.arange(48) % 3, batch_size=8, shuffle=True, augment=CropFlip(1))
    train.file = file
    d = Distillation(cnn(3), cnn(5, seed=1))
    made = fit(d, train, None, training=settings(epochs=25, checkpoint_every=4, lr=0.05), out=out, resume=resume)
    return made.last, [{k: v for k, v in vars(line).items() if k != "seconds"} for line in made.history]


def child(out: Path, name: str) -> None:
    """What is killed: a real run in a process of its own, whose words go to a file."""
    words = os.open(out / f"{name}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(words, 1)
    os.dup2(words, 2)
    try:
        long_run(out / name, out / f"{name}.count")
    except KeyboardInterrupt as stop:
        print(f"{type(stop).__name__}: {stop}", file=sys.stderr, flush=True)
        os._exit(130)
    os._exit(0)


def signals(out: Path) -> None:
    """Start a run for each signal, send it in the middle, and note how the run ended."""
    for name in ("SIGKILL", "SIGINT", "SIGTERM"):
        process = os.fork()
        if process == 0:
            child(out, name)
        count = out / f"{name}.count"
        while not count.exists() or count.stat().st_size <= 30:
            time.sleep(0.005)
        os.kill(process, getattr(signal, name))
        _, status = os.waitpid(process, 0)
        (out / f"{name}.status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    {"shared": shared, "signals": signals}[sys.argv[1]](Path(sys.argv[2]))
