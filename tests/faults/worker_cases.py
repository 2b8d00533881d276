"""What test_workers.py runs, also in a process of its own: ``worker_cases.py FOLDER HOW``.

torch raises the death of a worker from a handler of signals, wherever the main thread is at that moment: in a process
that is to go on afterwards that may be anything.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from tutelage import KD, Distillation, TaskLoss, Training
from tutelage.engine import fit

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 3


class Breaks(TensorDataset):
    """Augments, and breaks at the sixth sample once the run has had an epoch."""

    how = ""
    run: Path

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        if self.how and get_worker_info() is not None and index == 5 and (self.run / "history.json").exists():
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "ends":
                os._exit(3)
            raise ValueError("sample 5 cannot be read")
        return x + 0.1 * torch.randn(x.shape), y


def train(out: Path, how: str = "", **options):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
    data = Breaks(X, Y)
    data.how, data.run = how, out
    loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=2)
    training = Training(epochs=3, checkpoint_every=1, progress=False, cpu=True, log_every=2)
    d = Distillation(student, nn.Linear(4, 3), [TaskLoss(), KD()])
    made = fit(d, loader, None, training=training, out=out, **options)
    return made.last, [line.losses for line in made.history]


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2])
