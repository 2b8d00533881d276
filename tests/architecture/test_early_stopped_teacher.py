"""Early-stopped teachers: who is tried, who is chosen, and with what the student ends."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tutelage import KD, TaskLoss, Training, distill, early_stopped_teacher
from tutelage.models import save_weights
from tutelage.teachers import NoTeacher

QUICK = {"cpu": True, "progress": False, "gradient_shares": False}


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def batches(count: int = 128, seed: int = 5):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [(a, b) for a, b in zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True)]


@pytest.fixture
def trained():
    torch.manual_seed(0)
    teacher = network(32)
    distill(teacher, None, batches(), epochs=20, lr=0.1, **QUICK)
    return teacher


def reversed_answers(teacher: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a teacher that says the opposite: nobody should choose it."""
    wrong = copy.deepcopy(teacher)
    with torch.no_grad():
        wrong[2].weight.neg_()
        wrong[2].bias.neg_()
    return wrong.state_dict()


@pytest.mark.parametrize("good", [2, 4])
def test_the_checkpoint_that_teaches_best_is_chosen_whatever_its_place(trained, good, tmp_path):
    best, worse = {k: v.clone() for k, v in trained.state_dict().items()}, reversed_answers(trained)
    last = copy.deepcopy(trained)
    last.load_state_dict(worse)  # the final weights are bad ones too
    checkpoints = {epoch: best if epoch == good else worse for epoch in (2, 4)}
    torch.manual_seed(1)
    student = network(4)
    results = early_stopped_teacher(
        student, last, batches(), batches(64, 6), checkpoints=checkpoints, losses=[KD(weight=1.0)], epochs=6, lr=0.1,
        trial_epochs=2, out=tmp_path / "run", **QUICK,
    )  # fmt: skip
    assert len(results) == 4  # epochs 2, 4 and the last on trial; the student
    choice = json.loads((tmp_path / "run" / "choice.json").read_text())
    assert choice["epoch"] == good
    assert set(choice["trials"]) == {"2", "4", "5"}
    assert all(torch.equal(v, best[k]) for k, v in results[-1].teacher.state_dict().items())
    assert all(torch.equal(v, worse[k]) for k, v in last.state_dict().items())
    assert results[-1].student is student
    assert results[-1].metrics.accuracy > 0.6


def test_it_trains_the_teacher_itself_and_resumes(tmp_path):
    def run(**more):
        torch.manual_seed(0)
        student, teacher = network(4), network(16)
        return early_stopped_teacher(
            student, teacher, batches(), batches(64, 6), teacher_training=Training(epochs=6, keep_every=2, **QUICK),
            training=Training(epochs=3, seed=3, **QUICK), losses=[TaskLoss(weight=0.1), KD()], trial_epochs=1,
            out=tmp_path / "run", test=batches(32, 7), **more,
        )  # fmt: skip

    first = run()
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"teacher", "trial-0002", "student", "choice.json"}
    assert first[-1].metrics.samples == 32
    assert [r.metrics.samples for r in first[:-1]] == [64] * (len(first) - 1)  # nobody else has looked at the test data
    assert first[0].teacher is None
    again = run(resume=True)
    for name, value in first[-1].student.state_dict().items():
        assert torch.equal(value, again[-1].student.state_dict()[name])
    with pytest.raises(FileExistsError):
        run()


def test_files_and_runs_are_checkpoints_and_trials_begin_alike(trained, tmp_path):
    save_weights(trained, tmp_path / "early.safetensors")
    data = batches()
    torch.manual_seed(2)
    student = network(4)
    results = early_stopped_teacher(
        student, trained, data, data, checkpoints={1: tmp_path / "early.safetensors"}, epochs=1, trial_epochs=1, **QUICK
    )
    same = [result.runs[-1].history[-1].losses for result in results]
    assert same[0] == same[1] == same[2]  # equal weights teach equally, and each begins with the student's
    teacher = network(8)
    run = distill(teacher, None, data, data, epochs=4, keep_every=1, **QUICK).runs[-1]
    results = early_stopped_teacher(network(4), teacher, data, data, checkpoints=run, epochs=1, trial_epochs=1, **QUICK)
    assert len(results) == run.best_epoch + 2  # those before the best, the best's and the student


def test_a_mistake_is_named(trained):
    student, data = network(4), batches()
    with pytest.raises(ValueError, match="checkpoints and teacher_training"):
        early_stopped_teacher(student, trained, data, data, epochs=1)
    with pytest.raises(ValueError, match="validation"):
        early_stopped_teacher(student, trained, data, checkpoints={1: trained.state_dict()}, epochs=1)
    with pytest.raises(ValueError, match="got none"):
        early_stopped_teacher(student, trained, data, data, checkpoints={}, epochs=1, **QUICK)
    with pytest.raises(ValueError, match="NoTeacher"):
        early_stopped_teacher(student, NoTeacher(), data, data, checkpoints={1: {}}, epochs=1)
    with pytest.raises(ValueError, match=r"checkpoints\[1\]"):
        early_stopped_teacher(student, trained, data, data, checkpoints={1: network(3).state_dict()}, epochs=1, **QUICK)
    bound = KD()
    bound.pairs = [("@logits", "@logits")]
    with pytest.raises(ValueError, match="KD was bound"):
        early_stopped_teacher(student, trained, data, data, checkpoints={1: {}}, losses=[bound], epochs=1)
