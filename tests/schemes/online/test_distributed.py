"""Two gloo processes: what must be one process's result is, and what must be equal in both is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_cases.py")
spec = importlib.util.spec_from_file_location("distributed_cases", SCRIPT)
cases = importlib.util.module_from_spec(spec)
sys.modules["distributed_cases"] = cases
spec.loader.exec_module(cases)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(SCRIPT), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def close(a, b, **tolerance):
    torch.testing.assert_close(dict(a), dict(b), **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("name", "target"), [("mutual", "each"), ("ensemble", "ensemble")])
def test_mutual_learning_in_two_processes_is_that_in_one(name, target, ranks, tmp_path):
    """Half batches in each of two, with labels missing in the first one's; without batch norm."""
    weights, history = cases.mutual(tmp_path, target)
    for rank in ranks:
        close(rank[name][0], weights)
        for two, one in zip(rank[name][1], history, strict=True):
            assert two["KD"] == pytest.approx(one["KD"], rel=1e-4)
    same(ranks[0][name][0], ranks[1][name][0])


def test_with_batch_norm_the_processes_agree_with_each_other_and_not_with_one(ranks, tmp_path):
    """Each process normalises with its own half of the batch, so it is another training than one with whole batches."""
    same(ranks[0]["norms"][0], ranks[1]["norms"][0])
    weights, _ = cases.mutual(tmp_path, norm=True)
    there = ranks[0]["norms"][0]
    apart = max((there[n] - v).abs().max().item() for n, v in weights.items() if v.is_floating_point())
    assert 1e-4 < apart < 1.0


def test_the_memory_bank_is_equal_on_both_ranks_and_that_of_one_process(ranks):
    """With weights that stand still, after each batch; the half batches of both are written in one order."""
    whole, log_mean = cases.banks()
    for rank in ranks:
        seen, constants = rank["banks"]
        for two, one in zip(seen, whole, strict=True):
            for a, b in zip(two, one, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        # the constant comes from other draws of negatives
        torch.testing.assert_close(constants, log_mean, rtol=0.5, atol=0.5)
    assert torch.equal(ranks[0]["banks"][1], ranks[1]["banks"][1])
    for two, one in zip(ranks[0]["banks"][0], ranks[1]["banks"][0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(two, one, strict=True))
    assert not torch.equal(whole[0][0], whole[-1][0])


def test_the_banks_of_a_cohorts_pairs_are_equal_on_both_ranks(ranks):
    first, names = ranks[0]["indexed"]
    same(first, ranks[1]["indexed"][0])
    banks = [name for name in first if "memory_student" in name and name not in names]
    assert len(banks) == 2  # one for each pair
    assert not torch.equal(first[banks[0]], first[banks[1]])


def test_what_losses_own_for_each_pair_is_in_step_on_both_ranks(ranks, tmp_path):
    """Regressors are trained by DDP, critics by themselves; and both are those of one process with whole batches."""
    (state, critics, names), (other, other_critics, _) = (rank["pairs"] for rank in ranks)
    same(state, other)
    assert len({name.split(".")[1] for name in names if "FitNets" in name}) == 6  # of ordered pairs of three peers
    assert critics.keys() == other_critics.keys()
    assert len(critics) == 6
    for name in critics:
        same(critics[name], other_critics[name])
    alone, alone_critics, _ = cases.pairs(tmp_path)
    close(state, alone, rtol=1e-3, atol=1e-5)
    for name in critics:
        close(critics[name], alone_critics[name], rtol=1e-3, atol=1e-5)


def test_codistillation_in_two_processes_is_that_in_one(ranks):
    """Each rank is a peer in a loop of its own; in one process the engine trains them in turn."""
    results = cases.codistilled_in_one()
    for rank, result in zip(ranks, results, strict=True):
        weights, values, _ = rank["codistilled"]
        close(weights, result.student.state_dict())
        for epoch, line in enumerate(result.history):
            steps = values[4 * epoch : 4 * epoch + 4]
            for name in ("TaskLoss", "KD", "FitNets"):
                there = [step[name] for step in steps if name in step]
                assert len(there) == (4 if name == "TaskLoss" else [0, 3, 4, 4][epoch])
                if there:
                    assert line["losses"][name] == pytest.approx(sum(there) / len(there), rel=1e-4)
    assert ranks[0]["codistilled"][2] == [None, 15]
    assert ranks[1]["codistilled"][2] == [15, None]


def test_the_engine_in_several_processes_is_refused(ranks):
    for rank in ranks:
        assert "the engine runs in 2 processes and averages their gradients" in rank["refused"]
