"""Self-training: a network learns once more, from itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Distillation, Frozen, NoTeacher, TaskLoss, TeacherFreeReg, procedures, teacher_free_self
from tutelage.catalogue import methods
from tutelage.models import MLP


def network(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def legs(monkeypatch):
    """Every call of distill, without training."""
    calls = []

    def stand_in(student, teacher, train, validation, **arguments):
        calls.append(SimpleNamespace(student=student, teacher=teacher, **arguments))
        return SimpleNamespace(student=student)

    monkeypatch.setattr(procedures, "distill", stand_in)
    return calls


def test_a_copy_with_other_weights_is_trained_on_the_labels_and_teaches(legs, tmp_path):
    student = network()
    teacher_free_self(student, None, [], out=tmp_path)
    first, second = legs
    assert (first.teacher, first.losses, first.out.name) == (None, None, "pretrained")
    assert (second.student, second.teacher, second.out.name) == (student, first.student, "student")
    assert first.student is not student
    assert not (first.student[0].weight == student[0].weight).any()
    assert [(type(loss), loss.weight) for loss in second.losses] == [(TaskLoss, 0.05), (KD, 0.475)]


def test_the_default_is_the_authors_loss_of_resnet_18():
    # theirs: KLDivLoss's default mean over the batch and its 100 classes, times T², times 50; alpha 0.95 and T 6
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 5, generator=generator), torch.arange(8)
    student, teacher = nn.Linear(5, 100), nn.Linear(5, 100)
    (leg,) = procedures.lay_out(teacher_free_self, procedures.Setting(student, teacher))
    total = Distillation(student, teacher, losses=leg.losses)((x, y)).total
    s, t = student(x), teacher(x)
    kl = (F.softmax(t / 6, 1) * (F.log_softmax(t / 6, 1) - F.log_softmax(s / 6, 1))).mean() * 36 * 50
    torch.testing.assert_close(total, 0.05 * F.cross_entropy(s, y) + 0.95 * kl)


def test_a_trained_network_of_the_same_form_needs_no_first_training(legs):
    student, trained = network(), network()
    teacher_free_self(student, trained, [])
    role = Frozen(trained)
    teacher_free_self(student, role, [], losses=[KD(temperature=2)])
    assert [leg.teacher for leg in legs] == [trained, role]
    assert legs[1].losses[0].temperature == 2
    for other in (network(9), nn.Linear(6, 3), NoTeacher()):
        with pytest.raises(ValueError, match="teacher: expected a trained network of the student's own form"):
            teacher_free_self(student, other, [])


def test_its_likelihood_of_right_labels_rises_and_the_teacher_stays(few_images_with_wrong_labels):
    train, test = few_images_with_wrong_labels
    torch.manual_seed(0)
    how = {"test": test, "epochs": 40, "optimizer": "adamw", "lr": 0.002, "weight_decay": 0.0, "cpu": True}
    how |= {"progress": False, "gradient_shares": False}
    student = MLP(784, (128, 64))
    again = copy.deepcopy(student)
    first, second = teacher_free_self(student, None, train, **how)
    weights = copy.deepcopy(first.student.state_dict())
    assert second.teacher is first.student
    assert second.metrics.nll < first.metrics.nll
    (same,) = teacher_free_self(again, first.student, train, **how)
    assert same.metrics == second.metrics
    assert all(torch.equal(weights[k], v) for k, v in first.student.state_dict().items())


def test_the_catalogue_has_both_halves_of_the_paper():
    entered = {m.name: m for m in methods()}
    mine, virtual = entered["teacher_free_self"], entered["TeacherFreeReg"]
    assert (mine.section, mine.role, mine.recipe) == ("3.3", "procedure", "teacher_free_self.yaml")
    assert (mine.link, mine.paper) == (virtual.link, virtual.paper)
    assert "TeacherFreeReg" in teacher_free_self.__doc__
    assert "teacher_free_self" in TeacherFreeReg.__doc__
