"""Two runs in one folder: the second is refused, for as long as the first lives and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tutelage import Distillation, TaskLoss, Training, distill
from tutelage.checkpoint import RunFolder
from tutelage.comparison import Comparison, compare
from tutelage.engine import fit
from tutelage.files import locked
from tutelage.schedule import Stage

pytest.importorskip("fcntl", reason="this system has no locks of files that end with the process")

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3


class Waiting(Dataset):
    """Its worker says who it is when it is in the second epoch, and then waits for ever."""

    def __init__(self, said: Path | None = None):
        self.said, self.given = said, 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int):
        self.given += 1
        if self.said is not None and index == 0 and (self.said.parent / "run" / "history.json").exists():
            self.said.with_suffix(".part").write_text(str(os.getpid()))
            self.said.with_suffix(".part").rename(self.said)
            signal.pause()
        return X[index], Y[index]


def train(out: Path, data: Waiting | None = None, **how):
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    loader = DataLoader(data or Waiting(), batch_size=8, shuffle=True, num_workers=1)
    training = Training(epochs=3, progress=False, cpu=True)
    return fit(Distillation(student, teacher), loader, None, training=training, out=out, **how).last


def contents(folder: Path) -> dict[Path, bytes]:
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def first(tmp_path):
    """A run in a process of its own that is in the middle of its work, and the number of its loader's worker."""
    here, said = str(Path(__file__).parent), tmp_path / "worker"
    code = (
        f"import sys; sys.path.insert(0, {here!r})\n"
        "from pathlib import Path\n"
        "from test_one_run_in_a_folder import Waiting, train\n"
        f"train(Path({str(tmp_path / 'run')!r}), Waiting(Path({str(said)!r})))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "words").open("w") as words:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=words, stderr=words)
    end = time.monotonic() + 200
    while not said.exists():
        assert process.poll() is None, (tmp_path / "words").read_text()
        assert time.monotonic() < end, "it did not begin"
        time.sleep(0.05)
    worker = int(said.read_text())
    yield process, worker
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)


def test_the_second_is_refused_until_the_first_is_killed(first, tmp_path):
    process, worker = first
    run = tmp_path / "run"
    before = contents(run)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(BlockingIOError, match=f"^{run}: another process is at work there"):
            train(run, **how)
    assert contents(run) == before
    assert process.poll() is None
    process.kill()
    process.wait()
    os.kill(worker, 0)  # it lives on for a while, and must not hold what its parent held
    weights = train(run, resume=True)
    whole = train(tmp_path / "whole")
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_folder_is_free_after_the_run_and_after_its_errors(tmp_path):
    def fails(line):
        raise ArithmeticError("after an epoch")

    with pytest.raises(ArithmeticError):
        train(tmp_path / "run", after_epoch=fails)
    with locked(tmp_path / "run" / "lock"):
        pass
    train(tmp_path / "run", resume=True)
    with locked(tmp_path / "run" / "lock"):
        pass
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(tmp_path / "run")
    with locked(tmp_path / "run" / "lock"):
        pass


def test_a_run_inside_a_run_is_refused(tmp_path):
    def again(line):
        train(tmp_path / "run", resume=True)

    with pytest.raises(BlockingIOError, match="another process is at work"):
        train(tmp_path / "run", after_epoch=again)


def test_a_chain_of_stages_holds_the_folder_of_all(tmp_path):
    def again(line):
        with pytest.raises(BlockingIOError, match=f"^{tmp_path / 'run'}: another process"):
            chain(overwrite=True)
        seen.append(line.epoch)

    def chain(**how):
        stages = [Stage(losses=[TaskLoss()], epochs=1), Stage(losses=[TaskLoss()], epochs=2)]
        settings = {"progress": False, "cpu": True, "out": tmp_path / "run", **how}
        distill(nn.Linear(4, 3), None, [(X, Y)], stages=stages, **settings)

    seen: list[int] = []
    chain(after_epoch=again)
    assert seen == [0, 1]
    chain(resume=True)


def test_the_lock_is_not_laid_into_a_folder_that_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds other files"):
        RunFolder(tmp_path / "mine", {})
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_comparison_is_locked_too(tmp_path):
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError, match=f"^{tmp_path}: another process"):
        compare(Comparison({}, {}, {}, {}, [0]), out=tmp_path)
