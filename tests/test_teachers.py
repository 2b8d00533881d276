from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation, Frozen, Lesson, NoTeacher, TaskLoss, Teacher
from tutelage.record import Record
from tutelage.teachers import as_teacher
from tutelage.views import read_batch

BATCH = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(36 * width, 3),
    )


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return network(2), network(4)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_teacher_is_bit_identical_after_training_whatever_others_do_to_it(pair):
    student, teacher = pair
    before = state(teacher)
    d = Distillation(student, teacher).bind(BATCH)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1, weight_decay=1e-3)
    for step in range(20):
        if step % 3 == 0:
            teacher.train()  # somebody's loop does this
        if step == 10:
            teacher.requires_grad_(True)
        d.train()
        d(BATCH).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not any(m.training for m in teacher.modules())
        assert all(p.grad is None for p in teacher.parameters())
    assert same(before, state(teacher))


def test_the_teacher_answers_the_same_every_time_with_dropout_inside(pair):
    student, teacher = pair
    said = []
    role = Frozen(teacher)
    role.bind(student, ["@logits"], ["@logits"])
    for _ in range(3):
        teacher[4].train()  # one layer alone
        said.append(role.lessons(read_batch(BATCH), Record(BATCH[0]))[0].teacher.logits)
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])
    assert torch.equal(said[0], copy.deepcopy(teacher).eval()(BATCH[0]))
    assert not said[0].requires_grad


def test_the_teacher_is_no_part_of_the_distillation(pair):
    student, teacher = pair
    d = Distillation(student, teacher).bind(BATCH)
    theirs = {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    assert not theirs & {id(t) for t in (*d.parameters(), *d.buffers())}
    assert not set(teacher.modules()) & set(d.modules())
    assert {name.split(".")[0] for name in d.state_dict()} == {"student"}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert d.teacher.module is teacher, "frozen, not copied"


def test_the_teacher_moves_with_the_distillation(pair):
    student, teacher = pair
    d = Distillation(student, teacher).bind(BATCH)
    assert d.to(torch.float64) is d
    assert all(p.dtype == torch.float64 for p in teacher.parameters())
    losses = d((BATCH[0].double(), BATCH[1]))
    assert losses.total.dtype == torch.float64
    d.float()
    assert d(BATCH).total.dtype == torch.float32


@pytest.mark.parametrize("shared", ["itself", "part"])
def test_a_student_that_is_its_own_teacher_is_refused_and_stays_trainable(shared):
    student = network()
    student[4].eval()  # a mode that the refusal must not change
    modes = [m.training for m in student.modules()]
    teacher = student if shared == "itself" else nn.Sequential(*list(student)[:5], nn.Linear(144, 3))
    with pytest.raises(ValueError, match=r"teacher: .*(student object itself|shares 4 parameter tensors)"):
        Distillation(student, teacher).bind(BATCH)
    assert all(p.requires_grad for p in student.parameters())
    assert [m.training for m in student.modules()] == modes


def test_a_copy_of_the_student_may_teach_it():
    student = network()
    d = Distillation(student, copy.deepcopy(student), [KD()]).bind(BATCH)
    d.eval()
    assert d(BATCH)["KD"] == 0.0


def test_a_frozen_teacher_answers_once_and_before_the_student(pair):
    student, teacher = pair
    d = Distillation(student, teacher).bind(BATCH)
    ran = []
    for name, network in (("teacher", teacher), ("student", student)):
        network.register_forward_hook(lambda *_, name=name: ran.append(name))
    first = d(BATCH).total
    assert ran == ["teacher", "student"]
    lessons = d.teacher.lessons(read_batch(BATCH), Record())
    torch.testing.assert_close(lessons[0].teacher.logits, teacher(BATCH[0]))
    assert first.isfinite()


def test_what_was_said_of_a_batch_that_failed_is_not_said_of_another(pair):
    student, teacher = pair
    d = Distillation(student, teacher).bind(BATCH)
    wrong = (torch.full_like(BATCH[0], 3.0), BATCH[1])
    handle = student.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        d(wrong)
    handle.remove()
    (lesson,) = d.teacher.lessons(read_batch(BATCH), Record())
    torch.testing.assert_close(lesson.teacher.logits, teacher(BATCH[0]))


def test_batch_statistics_come_from_a_copy_and_change_nothing(pair):
    student, teacher = pair
    before, modes = state(teacher), [m.training for m in teacher.modules()]
    role = Frozen(teacher, batch_statistics=True)
    role.bind(student, ["@logits"], ["1", "@logits"])
    normalised = role.lessons(read_batch(BATCH), Record(BATCH[0]))[0].teacher["1"]
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.var((0, 2, 3), unbiased=False), torch.ones(4), atol=1e-2, rtol=0)
    assert role.module is not teacher
    assert same(before, state(teacher))
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.requires_grad for p in teacher.parameters())
    plain = Frozen(teacher)
    plain.bind(student, ["@logits"], ["1", "@logits"])
    running = plain.lessons(read_batch(BATCH), Record(BATCH[0]))[0].teacher["1"]
    assert not torch.allclose(normalised, running)


def test_roles_from_what_users_give():
    module, role = nn.Linear(2, 2), NoTeacher()
    assert as_teacher(module).module is module
    assert as_teacher(role) is role
    assert isinstance(as_teacher(None), NoTeacher)
    with pytest.raises(TypeError, match=r"teacher: expected an nn.Module or a Teacher, got str"):
        as_teacher("resnet18")


def test_no_teacher_gives_the_student_its_labels_only():
    record = Record(torch.zeros(2, 3))
    (lesson,) = NoTeacher().lessons(read_batch(BATCH), record)
    assert lesson.student is record
    assert lesson.teacher is None


class TwoOpinions(Teacher):
    """The student's own logits, turned over, and nothing: a role in five lines."""

    def __init__(self, weights=(1.0, 1.0)):
        self.weights = weights

    def lessons(self, batch, student):
        turned = Record(student.logits.detach().flip(1), {"@logits": student.logits.detach().flip(1)})
        return [Lesson(student, turned, self.weights[0]), Lesson(student, None, self.weights[1])]


def test_lessons_without_a_teacher_are_passed_over_by_losses_that_need_one(pair):
    d = Distillation(pair[0], TwoOpinions((0.25, 2.0)), [TaskLoss(), KD(weight=3.0)]).bind(BATCH)
    d.eval()
    logits = d.student(BATCH[0])
    task = nn.functional.cross_entropy(logits, BATCH[1])
    kd = KD()
    kd.pairs = [("@logits", "@logits")]
    divergence = kd(Record(logits), Record(logits.flip(1)), read_batch(BATCH))
    losses = d(BATCH)
    torch.testing.assert_close(losses["TaskLoss"], (0.25 + 2.0) * task.detach())
    torch.testing.assert_close(losses["KD"], 0.25 * divergence.detach())
    torch.testing.assert_close(losses.total, 2.25 * task + 0.75 * divergence)


def test_a_role_without_lessons_says_its_name(pair):
    class Silent(Teacher):
        pass

    with pytest.raises(NotImplementedError, match="Silent"):
        Distillation(pair[0], Silent(), [TaskLoss()]).bind(BATCH)
