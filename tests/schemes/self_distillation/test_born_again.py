"""Generations of one network: who teaches whom, from which weights, and what the ensemble is."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tutelage import KD, RKD, AveragedEnsemble, FitNets, Stage, TaskLoss, Training, born_again, procedures
from tutelage.catalogue import methods
from tutelage.evaluation import evaluate
from tutelage.models import MLP


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def labelled(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [(a, b) for a, b in zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True)]


@pytest.fixture
def legs(monkeypatch):
    """Every call of distill, without training."""
    calls = []

    def stand_in(student, teacher, train, validation, **arguments):
        calls.append(SimpleNamespace(student=student, teacher=teacher, **arguments))
        return SimpleNamespace(student=student, metrics=None)

    monkeypatch.setattr(procedures, "distill", stand_in)
    return calls


def test_without_a_teacher_the_first_learns_from_labels_and_each_teaches_the_next(legs, tmp_path):
    student = network()
    born_again(student, None, [], generations=3, out=tmp_path, seed=4)
    first, second, third = (leg.student for leg in legs)
    assert third is student
    assert [leg.teacher for leg in legs] == [None, first, second]
    assert [leg.out.name for leg in legs] == ["generation-1", "generation-2", "student"]
    assert legs[0].losses is None  # what distill does without a teacher: the task's loss
    for leg in legs[1:]:
        (kd,) = leg.losses
        assert (type(kd), kd.temperature, kd.weight) == (KD, 1.0, 1.0)
    assert legs[1].losses[0] is not legs[2].losses[0]


def test_a_teacher_teaches_the_first_and_losses_or_stages_are_everybodys(legs):
    teacher = network(16)
    born_again(network(), teacher, [], generations=2, losses=[TaskLoss(), KD(temperature=2)])
    born_again(network(), teacher, [], generations=2, stages=[Stage([KD(temperature=3)], epochs=1)])
    assert [leg.teacher is teacher for leg in legs] == [True, False] * 2
    assert [leg.losses[1].temperature for leg in legs[:2]] == [2, 2]
    assert [(leg.losses, leg.stages[0].losses[0].temperature) for leg in legs[2:]] == [(None, 3)] * 2
    born_again(network(), None, [], generations=2, stages=[Stage([KD()], epochs=1)])
    assert legs[4].stages is None


def test_weights_are_fresh_and_the_seeds_alone(legs):
    student = network()
    weights = student[0].weight.clone()
    for seed in (0, 0, 1):
        born_again(student, None, [], generations=3, seed=seed)
    born_again(student, None, [], generations=2, training=Training(epochs=1, seed=1))
    drawn = [leg.student[0].weight for leg in legs]
    assert torch.equal(weights, student[0].weight)
    for a, b in ((0, 3), (1, 4), (6, 9)):
        assert torch.equal(drawn[a], drawn[b])
    for a, b in ((0, 1), (0, 2), (1, 2), (0, 6)):
        assert not (drawn[a] == drawn[b]).any()
    made = [network() for _ in range(2)]
    born_again(student, None, [], generations=3, fresh=iter(made).__next__)
    assert [leg.student for leg in legs[-3:]] == [*made, student]


def test_impossible_numbers_are_refused(legs):
    for numbers in ({"generations": 0}, {"ensemble": -1}, {"generations": 2, "ensemble": 3}):
        with pytest.raises(ValueError, match="expected 1 generation or more"):
            born_again(network(), None, [], **numbers)
    bound = KD()
    bound.pairs = [("@logits", "@logits")]
    with pytest.raises(ValueError, match="KD was bound"):
        born_again(network(), None, [], losses=[bound])
    assert not legs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("born") / "again"
    train, validation, test = labelled(128), labelled(128, 1), labelled(256, 2)
    student = network()
    start = copy.deepcopy(student)

    def run(**how):
        return born_again(
            copy.deepcopy(start), None, train, validation, generations=3, ensemble=2, test=test, out=out, epochs=3,
            lr=0.1, cpu=True, progress=False, **how,
        )  # fmt: skip

    return run, run(), out, validation, test


def test_the_ensemble_is_the_mean_prediction_of_the_last_generations(trained):
    _, results, out, validation, test = trained
    first, second, third, ensemble = results
    assert [r.teacher for r in results[:3]] == [None, first.student, second.student]
    assert isinstance(ensemble.student, AveragedEnsemble)
    assert list(ensemble.student.members) == [second.student, third.student]
    x = test[0][0]
    mean = (second.student(x).softmax(1) + third.student(x).softmax(1)) / 2
    torch.testing.assert_close(ensemble.student(x).softmax(1), mean)
    # −log is convex, so the mean prediction is never worse than its members are on average
    assert ensemble.metrics.nll <= (second.metrics.nll + third.metrics.nll) / 2
    assert ensemble.metrics == evaluate(ensemble.student, test)
    assert ensemble.validation_accuracy == evaluate(ensemble.student, validation).accuracy
    assert ensemble.step_ms is None
    assert {p.name for p in out.iterdir()} == {"generation-1", "generation-2", "student", "ensemble"}
    assert {p.name for p in (out / "ensemble").iterdir()} == {"student.safetensors", "result.json"}
    assert "ensemble" not in str(third.out)
    assert ensemble.report().rows


def test_resuming_trains_nothing_again_and_gives_the_same(trained):
    run, results, out, _, _ = trained
    written = (out / "generation-2" / "history.json").stat().st_mtime_ns
    torch.manual_seed(77)  # the fresh weights do not depend on where the global generator is
    again = run(resume=True)
    assert (out / "generation-2" / "history.json").stat().st_mtime_ns == written
    for mine, other in zip(results, again, strict=True):
        for name, value in mine.student.state_dict().items():
            assert torch.equal(value, other.student.state_dict()[name])


def test_an_interrupted_procedure_ends_as_it_would_have(trained, tmp_path):
    _, results, _, _, test = trained
    train, validation = labelled(128), labelled(128, 1)
    stop = KeyboardInterrupt("between the generations")
    torch.manual_seed(0)
    student = network()
    how = {"epochs": 3, "lr": 0.1, "cpu": True, "progress": False, "out": tmp_path / "r", "test": test}

    def interrupt(line):
        raise stop

    with pytest.raises(KeyboardInterrupt):
        born_again(copy.deepcopy(student), None, train, validation, generations=3, after_epoch=interrupt, **how)
    torch.manual_seed(5)
    ended = born_again(copy.deepcopy(student), None, train, validation, generations=3, resume=True, **how)
    assert torch.equal(ended[-1].student[0].weight, results[2].student[0].weight)


def test_any_losses_and_the_teacher_stays_as_it_was():
    torch.manual_seed(0)
    teacher = MLP(6, (12, 8), 3)
    before = copy.deepcopy(teacher.state_dict())
    losses = [TaskLoss(), KD(), RKD("hidden.1"), FitNets("hidden.0", weight=1.0)]
    images = [(x.reshape(-1, 6), y) for x, y in labelled(64)]
    results = born_again(
        MLP(6, (12, 8), 3), teacher, images, images, generations=2, losses=losses, epochs=1, cpu=True, progress=False
    )
    assert set(results[-1].history[0]["losses"]) == {"loss", "TaskLoss", "KD", "RKD", "FitNets"}
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad for p in results[0].student.parameters())


def test_generations_see_through_wrong_labels(few_images_with_wrong_labels):
    train, test = few_images_with_wrong_labels
    torch.manual_seed(0)
    results = born_again(
        MLP(784, (128, 64)), None, train, generations=3, test=test, epochs=40, optimizer="adamw", lr=0.002,
        weight_decay=0.0, cpu=True, progress=False, gradient_shares=False,
    )  # fmt: skip
    first, second, third = (result.metrics for result in results)
    assert third.accuracy > first.accuracy
    assert first.nll > second.nll > third.nll


def test_it_is_in_the_catalogue():
    entered = {m.name: (m.section, m.role, m.recipe) for m in methods()}
    assert entered["born_again"] == ("3.3", "procedure", "born_again.yaml")
