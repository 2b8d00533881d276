"""What test_ranks.py runs in a process of its own: ``rank_cases.py FOLDER``. Each case is a pair of copies of it.

The two of a pair are one training over gloo. One of them breaks in the middle; then a new pair goes on with the run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # the optimisers' first step imports it, here once for all the copies of this process
import torch.distributed as dist
import torchmetrics  # noqa: F401  (and evaluation this)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import KD, Distillation, TaskLoss, Training
from tutelage.engine import fit
from tutelage.files import locked
from tutelage.knowledge.base import Loss

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 3
STEP, STEPS = 8, 12  # of 4 an epoch
PATIENCE = 20.0  # seconds
MOST = 240.0  # seconds after which a process counts as hanging


class Breaks(Loss):
    """Zero, until something happens in its n-th batch of training."""

    def __init__(self, how: str | None, said: Path):
        super().__init__()
        self.how, self.said, self.count = how, said, 0

    def forward(self, student, teacher, batch):
        if self.training and torch.is_grad_enabled():
            self.count += 1
        if self.how is not None and self.count == STEP:
            self.said.touch()
            if self.how == "raises":
                raise ArithmeticError("a bug in a loss")
            os.kill(os.getpid(), signal.SIGKILL if self.how == "killed" else signal.SIGSTOP)
        return 0 * student.logits.sum()


def train(out: Path, how: str | None, **options) -> dict:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
    d = Distillation(student, nn.Linear(4, 3), [TaskLoss(), KD(), Breaks(how, out.with_suffix(".broken"))])
    training = Training(
        epochs=3,
        checkpoint_every=1,
        progress=False,
        cpu=True,
        gradient_shares=False,
        timeout=options.pop("timeout", None),
    )
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)
    return fit(d, loader, [(X, Y)], training=training, out=out, **options).last


def begin(rank: int, meeting: Path, work, words: Path) -> int:
    """One of a pair; the number of the process."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        file = os.open(words, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # which accelerate wants to see
        # a file to meet at instead of a port, which might be taken
        where = {"init_method": f"file://{meeting}", "rank": rank, "world_size": 2}
        dist.init_process_group = functools.partial(dist.init_process_group, **where)
        work(rank)
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def pair(folder: Path, name: str, work) -> list[dict]:
    """Run a pair to its end; of each how it ended and what it said, and of the stopped ones that they were."""
    words = [folder / f"{name}-{rank}.txt" for rank in (0, 1)]
    processes = [begin(rank, folder / f"{name}.meeting", work, words[rank]) for rank in (0, 1)]
    ends: dict[int, str | int] = {}
    last = time.monotonic() + MOST
    while len(ends) < 2:
        for rank, process in enumerate(processes):
            if rank not in ends:
                number, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED)
                if number and os.WIFSTOPPED(status):
                    ends[rank] = "stopped"
                elif number:
                    ends[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > last:
                    ends[rank] = "hangs"
        time.sleep(0.02)
    for rank, end in ends.items():
        if isinstance(end, str):
            os.kill(processes[rank], signal.SIGKILL)
            os.waitpid(processes[rank], 0)
    return [{"end": ends[rank], "said": words[rank].read_text()} for rank in (0, 1)]


def main(folder: Path) -> None:
    found = {}

    def undisturbed(rank: int) -> None:
        torch.save(train(folder / "whole", None), folder / f"whole-{rank}.pt")

    found["whole"] = pair(folder, "whole", undisturbed)
    for how, which in (("killed", 1), ("killed", 0), ("raises", 1), ("stopped", 1)):
        name = f"{how}-{which}"
        out = folder / name

        def broken(rank: int, how: str = how, which: int = which, out: Path = out) -> None:
            train(out, how if rank == which else None, timeout=PATIENCE if how == "stopped" else None)

        def again(rank: int, out: Path = out) -> None:
            torch.save(train(out, None, resume=True), out.with_name(f"{out.name}-{rank}.pt"))

        found[name] = pair(folder, name, broken)
        found[name].append({"checkpoints": [p.name for p in (out / "checkpoints").glob("step-*")]})
        found[f"{name} again"] = pair(folder, f"{name} again", again)
    # what the first process refuses, both must
    found["there"] = pair(folder, "there", lambda rank: train(folder / "whole", None))
    with locked(folder / "whole" / "lock"):
        found["locked"] = pair(folder, "locked", lambda rank: train(folder / "whole", None, resume=True))
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]))
