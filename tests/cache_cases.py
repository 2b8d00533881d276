"""What test_cache.py shares with the processes that it starts: ``cache_cases.py shared|killed FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import KD, Cached, Distillation, TaskLoss, Training
from tutelage.cache import fill
from tutelage.data import ArrayLoader, CropFlip, replayed
from tutelage.engine import fit
from tutelage.views import read_batch

IMAGES = np.random.default_rng(0).integers(1, 16, (48, 6, 6, 1), dtype=np.uint8)
LABELS = np.arange(48) % 3
STEP_OF_A_PIXEL = 1 / 255  # so that inputs are the pixels' whole numbers


def exact(seed=1, classes=3):
    """A teacher whose every sum is exact in float32, so that it says the same of a sample in whatever batch."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, classes))
    with torch.no_grad():
        for n in (1, 3):
            network[n].weight.copy_(torch.randint(-4, 5, network[n].weight.shape) / 4)
            network[n].bias.copy_(torch.randint(-4, 5, network[n].bias.shape) / 4)
        network[3].weight.mul_(2**-6)
    return network


def student(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def arrays(size=8, views=2, seed=5, **options):
    plain = ArrayLoader(IMAGES, LABELS, batch_size=size, shuffle=True, augment=CropFlip(1), std=STEP_OF_A_PIXEL)
    return replayed(plain, views, seed, **options)


def items(size=8, views=2, workers=0):
    """The same through a DataLoader, whose items are drawn from the global generators."""

    class Shifted(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image.roll(int(torch.randint(6, ())), -1), label

    data = Shifted(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float(), torch.from_numpy(LABELS))
    return replayed(DataLoader(data, batch_size=size, shuffle=True, num_workers=workers), views, 5)


def train(teacher, loader, out=None, resume=False, losses=None, **changes):
    settings = {"epochs": 4, "progress": False, "cpu": True, "lr": 0.002, "log_every": 2, "scheduler": "constant"}
    d = Distillation(student(), teacher, losses or [TaskLoss(weight=0.5), KD(weight=0.5, temperature=2.0)])
    made = fit(d, loader, None, training=Training(**{**settings, **changes}), out=out, resume=resume)
    return made.last, [line.losses for line in made.history]


def shared(out: Path) -> None:
    """Two processes that are one training, live and twice with a cache; every second row is read by the other."""
    import torch.distributed as dist
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    found = {}
    for name, loader in (("arrays", arrays), ("items", items)):
        teachers = [exact()] + [Cached(exact(), str(out / name), "float32") for _ in range(2)]
        found[name] = [train(teacher, loader(4)) for teacher in teachers]
    torch.save(found, out / f"rank{rank}.pt")
    dist.destroy_process_group()


def filled(folder: Path, size: int = 8, codec="float32", count: Path | None = None) -> Cached:
    """A whole cache of both views; ``count`` grows by a byte with each batch."""
    role, loader = Cached(exact(), str(folder), codec), arrays(size)
    Distillation(student(), role, [KD(temperature=1.0)]).bind(next(iter(loader)))

    def batches(view):
        loader.set_epoch(view)
        for raw in loader:
            if count is not None:
                with count.open("ab") as file:
                    file.write(b".")
            yield read_batch(raw)

    torch.manual_seed(os.getpid())
    fill(role, batches, 2)
    return role


def killed(out: Path) -> None:
    """Begin to fill a cache, and be killed, at another moment each time."""
    for n in range(14):
        count = out / f"count-{n}"
        process = os.fork()
        if process == 0:
            filled(out / "killed", size=3, count=count)
            os._exit(0)
        while not count.exists() or count.stat().st_size <= 2 * n:
            time.sleep(0.0002)
        time.sleep(0.0003 * (n % 5))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        with (out / "statuses").open("a") as file:
            file.write(f"{os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    {"shared": shared, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
