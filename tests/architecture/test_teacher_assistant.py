"""The chain of assistants: who teaches whom, and with which losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage import KD, DeepMutualLearning, Frozen, Stage, TaskLoss, procedures
from tutelage.architecture.teacher_assistant import teacher_assistant
from tutelage.catalogue import methods


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def legs(monkeypatch):
    """Every call of distill, without training."""
    calls = []

    def stand_in(student, teacher, train, validation, **arguments):
        calls.append(SimpleNamespace(student=student, teacher=teacher, train=train, validation=validation, **arguments))
        return SimpleNamespace(student=student)

    monkeypatch.setattr(procedures, "distill", stand_in)
    return calls


def test_each_teaches_the_next_from_the_teacher_to_the_student(legs, tmp_path):
    teacher, first, second, student = (network(w) for w in (8, 6, 4, 2))
    results = teacher_assistant(student, [first, second], teacher, "train", "val", out=tmp_path, epochs=3, resume=True)
    assert [leg.teacher for leg in legs] == [teacher, first, second]
    assert [leg.student for leg in legs] == [first, second, student]
    assert [result.student for result in results] == [first, second, student]
    assert [leg.out for leg in legs] == [tmp_path / n for n in ("assistant-1", "assistant-2", "student")]
    assert all((leg.train, leg.validation, leg.epochs, leg.resume) == ("train", "val", 3, True) for leg in legs)


def test_each_leg_has_losses_of_its_own(legs):
    losses, stages = [TaskLoss(), KD(temperature=3)], [Stage([KD(temperature=2)], epochs=1, lr=0.5)]
    teacher_assistant(network(2), [network(4)], network(8), [], losses=losses)
    teacher_assistant(network(2), [network(4)], network(8), [], stages=stages)
    given = [leg.losses[1] for leg in legs[:2]]
    assert [loss.temperature for loss in given] == [3, 3]
    assert len({id(loss) for loss in (*given, losses[1])}) == 3
    given = [leg.stages[0] for leg in legs[2:]]
    assert [(stage.losses[0].temperature, stage.epochs, stage.lr) for stage in given] == [(2, 1, 0.5)] * 2
    assert len({id(stage.losses[0]) for stage in (*given, stages[0])}) == 3
    assert [leg.out for leg in legs] == [None] * 4
    assert legs[0].stages is None
    assert legs[2].losses is None


def test_impossible_chains_are_refused(legs):
    student, teacher = network(2), network(8)
    with pytest.raises(ValueError, match="one network or more"):
        teacher_assistant(student, [], teacher, [])
    for assistants in ([student], [teacher], [network(4)] * 2):
        with pytest.raises(ValueError, match="two places"):
            teacher_assistant(student, assistants, teacher, [])
    with pytest.raises(ValueError, match="two places"):
        teacher_assistant(student, [teacher], Frozen(teacher), [])
    for nobody in (None, DeepMutualLearning()):
        with pytest.raises(ValueError, match="teacher: assistants need a network above them"):
            teacher_assistant(student, [network(4)], nobody, [])
    bound = KD()
    bound.pairs = [("@logits", "@logits")]
    for arguments in ({"losses": [TaskLoss(), bound]}, {"stages": [Stage([bound], epochs=1)]}):
        with pytest.raises(ValueError, match="KD was bound"):
            teacher_assistant(student, [network(4)], teacher, [], **arguments)
    assert not legs


def labelled(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 6)
    return [(a, b) for a, b in zip(x.split(32), (x[:, :3].argmax(1)).split(32), strict=True)]


def test_a_real_chain_trains_every_leg_and_resumes_without_training_again(tmp_path):
    torch.manual_seed(0)
    train, validation = labelled(256), labelled(128)
    teacher = network(32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(20):
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(teacher(x), y).backward()
            optimizer.step()
    weights = {k: v.clone() for k, v in teacher.state_dict().items()}

    def run(**arguments):
        torch.manual_seed(1)
        student, assistants = network(4), [network(16), network(8)]
        return teacher_assistant(
            student, assistants, teacher, train, validation, losses=[TaskLoss(weight=0.1), KD()],
            epochs=8, lr=0.1, out=tmp_path / "chain", cpu=True, progress=False, **arguments,
        )  # fmt: skip

    results = run()
    assert [result.teacher for result in results] == [teacher, results[0].student, results[1].student]
    assert results[-1].metrics.accuracy > 0.7
    assert all(torch.equal(weights[k], v) for k, v in teacher.state_dict().items())
    assert {p.name for p in (tmp_path / "chain").iterdir()} == {"assistant-1", "assistant-2", "student"}
    written = (tmp_path / "chain" / "student" / "history.json").stat().st_mtime_ns
    again = run(resume=True)
    assert (tmp_path / "chain" / "student" / "history.json").stat().st_mtime_ns == written
    for first, second in zip(results, again, strict=True):
        for name, value in first.student.state_dict().items():
            assert torch.equal(value, second.student.state_dict()[name])
    with pytest.raises(FileExistsError):
        run()


def test_it_is_in_the_catalogue():
    entered = {m.name: (m.section, m.role) for m in methods()}
    assert entered["teacher_assistant"] == ("4", "procedure")
