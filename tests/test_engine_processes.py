from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("engine_cases.py")
spec = importlib.util.spec_from_file_location("engine_cases", SCRIPT)
cases = importlib.util.module_from_spec(spec)
sys.modules["engine_cases"] = cases
spec.loader.exec_module(cases)


def launch(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found, and their folder."""
    out = tmp_path_factory.mktemp("two")
    launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT, "shared", out)
    return out, [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def close(a, b, **tolerance):
    torch.testing.assert_close(dict(a), dict(b), **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_two_processes_are_one(name, ranks, tmp_path):
    """The labels are missing unevenly between the processes and the micro-batches."""
    out, found = ranks
    weights, metrics, _ = cases.plain(tmp_path)
    for rank in found:
        close(rank[name][0], weights)
        for two, one in zip(rank[name][1], metrics, strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
            assert two["samples"] == 50
    same(found[0][name][0], found[1][name][0])
    fresh = cases.mlp(5, seed=4)
    fresh.load_state_dict(load_file(out / name / "student-last.safetensors"), strict=True)
    same(fresh.state_dict(), found[0][name][0])


def test_the_history_is_that_of_all_processes(ranks, tmp_path):
    """Every sample has a teacher, so KD's mean over the batches of both is its mean over the whole ones."""
    _, _, losses = cases.plain(tmp_path)
    for rank in ranks[1]:
        for two, one in zip(rank["plain"][2], losses, strict=True):
            assert two["KD"] == pytest.approx(one["KD"], rel=1e-4)


def test_two_processes_with_arrays_are_one(ranks, tmp_path):
    weights, metrics = cases.arrays(tmp_path)
    for rank in ranks[1]:
        close(rank["arrays"][0], weights)
        for two, one in zip(rank["arrays"][1], metrics, strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
            assert two["samples"] == 31


def test_memories_and_critics_are_equal_everywhere(ranks):
    (first, critic, kept, names), (second, other_critic, other_kept, _) = (rank["memories"] for rank in ranks[1])
    assert any("memory_student" in name for name in first)
    buffers = {n for n in first if n not in names and not n.startswith("losses.")}
    assert buffers == {n for n in first if "running" in n or "num_batches" in n}
    same(first, second)
    same(critic, other_critic)
    assert kept
    assert other_kept


def test_the_teacher_is_neither_in_ddp_nor_in_the_checkpoint(ranks):
    out, found = ranks
    (checkpoint,) = (out / "memories" / "checkpoints").iterdir()
    saved = load_file(checkpoint / "model.safetensors")
    same(saved, found[0]["memories"][0])
    assert all(name.startswith(("student.", "losses.")) for name in saved)


def test_running_averages_are_equal_and_those_that_were_validated(ranks):
    (state, last, metrics, mine), (other, other_last, other_metrics, other_mine) = (r["norms"] for r in ranks[1])
    same(state, other)
    same(state, last)
    same(last, other_last)
    assert metrics == other_metrics
    assert mine == other_mine
    assert (metrics["nll"], metrics["accuracy"]) == pytest.approx(mine, rel=1e-5)
    same(load_file(ranks[0] / "norms" / "student-last.safetensors"), state)


def test_a_shared_evaluation_is_the_whole_one(ranks):
    whole = cases.evaluation()
    for rank in ranks[1]:
        for two, one in zip(rank["evaluation"], whole, strict=True):
            assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_two_processes_stop_together_and_resume_exactly(ranks):
    assert len({rank["resumed"][1] for rank in ranks[1]}) == 1
    for rank in ranks[1]:
        (weights, losses), stopped, (again, again_losses) = rank["resumed"]
        assert stopped.startswith("stopped at step 6 of 12")  # only one was asked; they agree at every second step
        close(again, weights)
        for resumed, whole in zip(again_losses, losses, strict=True):
            assert resumed == pytest.approx(whole, rel=1e-5)


def test_fsdp2_trains_the_same_student(ranks, tmp_path):
    weights, metrics, _ = cases.plain(tmp_path, clip=5.0)
    out, (first, _) = ranks
    result, kinds, again = first["fsdp"]
    assert kinds == {"DTensor"}
    close(result[0], weights)
    close(again[0], weights)
    for two, one in zip(result[1], metrics, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    for folder in ("whole", "cut"):
        fresh = cases.mlp(5, seed=4)
        fresh.load_state_dict(load_file(out / "fsdp" / folder / "student-last.safetensors"), strict=True)
        close(fresh.state_dict(), weights)


# a process that is told to end, or just ends


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("killed")
    launch(SCRIPT, "signals", out)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return cases.long_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_killed_run_goes_on_exactly(name, killed, whole):
    folder = killed / name / "checkpoints"
    (checkpoint,) = folder.glob("step-*")
    step, given = int(checkpoint.name.split("-")[1]), (killed / f"{name}.count").stat().st_size - 1
    words = (killed / f"{name}.txt").read_text()
    status = int((killed / f"{name}.status").read_text())
    assert 28 <= step < 150
    if name == "SIGKILL":
        assert status == -signal.SIGKILL
        assert given - 6 <= step <= given
    else:
        assert status == 130
        assert f"Interrupted: stopped at step {step} of 150: a checkpoint is in {killed / name}" in words
        assert "Traceback" not in words
        assert step == given
    weights, history = cases.long_run(killed / name, resume=True)
    same(weights, whole[0])
    assert history == whole[1]
    assert len(list(folder.iterdir())) == 1
