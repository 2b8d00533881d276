"""Does a long training grow? Resident memory, live tensors and hooks of a run of 10,000 steps, every 500 steps.

The networks are tiny, so that what is left behind at a step would stand out: 100 bytes a step are 1 MB. The method has
all that could hold something: taps (of which some are overwritten and copied), a projector, a memory bank, a critic,
and views that make new inputs at every step; the data are shuffled anew in each of 100 epochs, each is validated and
saved. Growth is counted from the fifth part of the run on, when allocators and caches have found their size.

    python benchmarks/long_run.py                      # -> benchmarks/results/long_run.json
    python benchmarks/long_run.py --steps 1000 --out /tmp/long_run.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tutelage as tl
from tutelage.data import Indexed
from tutelage.engine import fit

EVERY = 500
WARM = 0.2  # of the run


class Watched:
    """A training loader that looks at the process after every so many batches."""

    def __init__(self, loader: Any, *networks: nn.Module):
        self.loader, self.dataset, self.networks = loader, loader.dataset, networks
        self.given = -1  # the first one is to bind with
        self.sampler, self.generator = loader.sampler, loader.generator
        self.samples: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for batch in self.loader:
            if self.given % EVERY == 0:
                self.look()
            self.given += 1
            yield batch

    def look(self) -> None:
        gc.collect()
        live = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        modules = [module for network in self.networks for module in network.modules()]
        hooks = sum(len(v) for m in modules for k, v in vars(m).items() if "hooks" in k and hasattr(v, "__len__"))
        python = tracemalloc.get_traced_memory()[0] / 2**20
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        sample = {"step": self.given, "rss_mb": resident, "python_mb": python, "tensors": len(live), "hooks": hooks}
        self.samples.append(sample)
        print("  ".join(f"{name} {value:.2f}" for name, value in sample.items()), flush=True)


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "long_run.json")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs, labels = torch.randn(1600, 16), torch.arange(1600) % 5
    student, teacher = network(8), network(32)
    losses = [
        tl.TaskLoss(),
        tl.KD(weight=tl.Cosine(1.0, 0.1)),
        tl.FitNets("1", weight=1.0),
        tl.RKD("2"),
        tl.CRD("2", features=8, k=64, weight=0.1),
        tl.LogitCritic(hidden=8),
    ]
    d = tl.Distillation(student, teacher, losses, views=tl.CleanToNoisy(std=0.1))
    data = torch.utils.data.DataLoader(
        Indexed(torch.utils.data.TensorDataset(inputs, labels)), batch_size=16, shuffle=True
    )
    watched, validation = Watched(data, student, teacher), [(inputs[:100], labels[:100])]
    tracemalloc.start()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        training = tl.Training(steps=given.steps, lr=1e-3, progress=False, cpu=True, checkpoint_every=250)
        fit(d, watched, validation, training=training, out=out)
        watched.look()
    late = [s for s in watched.samples if s["step"] >= WARM * given.steps]
    growth = {f"{name}_growth": late[-1][name] - late[0][name] for name in ("rss_mb", "python_mb", "tensors", "hooks")}
    body = {
        "steps": given.steps,
        "seconds": time.monotonic() - began,
        "from_step": late[0]["step"],
        "to_step": late[-1]["step"],
        **growth,
        "rss_bytes_per_step": growth["rss_mb_growth"] * 2**20 / (late[-1]["step"] - late[0]["step"]),
        "samples": watched.samples,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tutelage": tl.__version__,
        },
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps({name: value for name, value in body.items() if name != "samples"}, indent=1))


if __name__ == "__main__":
    main()
