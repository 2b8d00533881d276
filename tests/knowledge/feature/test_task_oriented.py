from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tutelage as tl
from tutelage import Distillation, Stage, TaskLoss
from tutelage.knowledge.feature.task_oriented import (
    TaskHead,
    TaskOriented,
    orthogonal_penalty,
    task_feature_distance,
)
from tutelage.models import MLP, SmallCNN

HEADS = "teacher heads"


def batch_of(count=6, size=12):
    torch.manual_seed(0)
    return torch.randn(count, 1, size, size), torch.arange(count) % 10


def trained(d, batch, steps):
    d.bind(batch)
    optimizer = torch.optim.Adam((p for p in d.parameters() if p.requires_grad), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        d(batch).total.backward()
        optimizer.step()
    return d


def both_stages(student, teacher, batch, *taps, steps=2, **options):
    first = trained(Distillation(student, teacher, losses=[TaskOriented(*taps, train=HEADS)]), batch, steps)
    loss = TaskOriented(*taps, **options)
    return Distillation(student, teacher, losses=[loss]).continue_from(first).bind(batch), loss, first


def test_the_distance_is_the_mean_of_the_samples_norms():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    norms = [
        math.sqrt(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert task_feature_distance(student, teacher).item() == pytest.approx(sum(norms) / 5)


def test_its_weight_gives_the_authors_term_and_gradient_at_their_batch_of_128():
    torch.manual_seed(0)
    direction = F.normalize(torch.randn(128, 16, dtype=torch.float64), dim=1)
    teacher = torch.randn(128, 16, dtype=torch.float64)
    values = []
    ours = TaskOriented().feature
    for term in (lambda s: 0.05 * torch.dist(s, teacher), lambda s: ours * task_feature_distance(s, teacher)):
        student = (teacher + 3 * direction).requires_grad_()
        value = term(student)
        values.append((value, torch.autograd.grad(value, student)[0]))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 3)])
def test_the_penalty_is_that_of_both_products(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows, columns = (torch.eye(n, dtype=torch.float64) for n in shape)
    naive = torch.dist(weight @ weight.T, rows) + torch.dist(weight.T @ weight, columns)
    value = orthogonal_penalty(weight)
    torch.testing.assert_close(value, naive)
    torch.testing.assert_close(torch.autograd.grad(value, weight), torch.autograd.grad(naive, weight))


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
def test_orthogonal_projectors_have_the_least_penalty_and_no_gradient(shape):
    torch.manual_seed(0)
    weight = nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64)).requires_grad_()
    value = orthogonal_penalty(weight)
    assert value.item() == pytest.approx(math.sqrt(abs(shape[0] - shape[1])), abs=1e-12)
    exact = torch.eye(*shape, dtype=torch.float64).requires_grad_()
    orthogonal_penalty(exact).backward()
    assert exact.grad.abs().max() == 0
    rotated = nn.init.orthogonal_(torch.empty(shape[1], shape[1], dtype=torch.float64))
    other = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(orthogonal_penalty(other @ rotated), orthogonal_penalty(other))


def test_refusals():
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\)"):
        task_feature_distance(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="expected a matrix"):
        orthogonal_penalty(torch.ones(3))
    for options, message in (
        ({"train": "teacher"}, "train='teacher'"),
        ({"feature": -1}, "feature=-1"),
        ({"orthogonal": -0.1}, r"orthogonal=-0\.1"),
        ({"soft": -2}, "soft=-2"),
        ({"temperature": 0.5}, r"temperature=0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskOriented(**options)
    with pytest.raises(ValueError, match="needs labels"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[TaskOriented(train=HEADS)]).bind(batch_of()[0])
    dense = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 1))
    with pytest.raises(ValueError, match=r"expected logits \(B, K\), found of shape \(6, 10, 10, 10\)"):
        Distillation(dense, SmallCNN(8), losses=[TaskOriented(("1", "stage1"), train=HEADS)]).bind(batch_of())


def test_the_heads_are_the_published_separable_blocks():
    head = TaskHead([8, 16, 32], classes=5)
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.groups) for m in convolutions] == [
        (8, 8, 3, 2, 8), (8, 8, 1, 1, 1), (8, 8, 3, 1, 8), (8, 16, 1, 1, 1),
        (16, 16, 3, 2, 16), (16, 16, 1, 1, 1), (16, 16, 3, 1, 16), (16, 32, 1, 1, 1),
    ]  # fmt: skip
    assert all(m.bias is None for m in convolutions)
    assert head.blocks(torch.zeros(2, 8, 12, 20)).shape == (2, 32, 3, 5)
    assert not list(TaskHead([32], classes=5).blocks.parameters()), "the deepest layer is only averaged"


def test_the_first_stage_is_the_task_of_the_teachers_heads_and_runs_nothing_of_the_student():
    student, teacher, batch = SmallCNN(4), SmallCNN(8), batch_of()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    calls = []
    student.stage1.register_forward_hook(lambda *_: calls.append(1))
    loss = TaskOriented(train=HEADS)
    d = Distillation(student, teacher, losses=[loss]).bind(batch)
    calls.clear()
    value = d(batch)["TaskOriented"]
    with torch.no_grad():
        one = teacher.stage1(batch[0])
        two = teacher.stage2(teacher.pool(one))
        three = teacher.stage3(teacher.pool(two))
        logits = [head(x)[1] for head, x in zip(loss.teacher_heads, (one, two, three), strict=True)]
    torch.testing.assert_close(value, sum(F.cross_entropy(x, batch[1]) for x in logits))
    trained(d, batch, 20)
    assert d(batch)["TaskOriented"] < 0.5 * value
    assert not calls
    assert not list(loss.student_heads.parameters())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_the_second_stage_is_the_sum_of_its_parts(progress):
    student, teacher, batch = SmallCNN(4), SmallCNN(8), batch_of()
    d, loss, _ = both_stages(student, teacher, batch, "stage2", "stage3", feature=0.7, orthogonal=0.2, soft=0.3)
    d.eval().progress = progress
    value, expected, temperature = d(batch)["TaskOriented"], 0.0, 1 + 3 * progress
    with torch.no_grad():
        layers = []
        for model in (student, teacher):
            two = model.stage2(model.pool(model.stage1(batch[0])))
            layers.append((two, model.stage3(model.pool(two))))
        for n, (s, t) in enumerate(zip(*layers, strict=True)):
            (mine, logits), (theirs, soft) = loss.student_heads[n](s), loss.teacher_heads[n](t)
            weight = loss.projectors[n].weight
            p, q = (F.softmax(x / temperature, 1) for x in (soft, logits))
            expected += F.cross_entropy(logits, batch[1]) + 0.3 * (p * (p / q).log()).sum(1).mean()
            expected += 0.7 * (mine @ weight.T - theirs).norm(dim=1).mean()
            expected += 0.2 * orthogonal_penalty(weight)
    torch.testing.assert_close(value, expected)


def test_the_teachers_heads_are_carried_over_frozen_and_never_change():
    student, teacher, batch = SmallCNN(4), SmallCNN(8), batch_of()
    names, frozen = list(student.state_dict()), copy.deepcopy(teacher.state_dict())
    d, loss, first = both_stages(student, teacher, batch)
    before = copy.deepcopy(loss.teacher_heads.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in first.losses["TaskOriented"].teacher_heads.state_dict().items())
    trained(d.train(), batch, 2)
    assert all(torch.equal(v, before[k]) for k, v in loss.teacher_heads.state_dict().items()), "statistics too"
    assert all(p.grad is None for p in [*loss.teacher_heads.parameters(), *teacher.parameters()])
    learned = [*loss.student_heads.parameters(), *loss.projectors.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in learned)
    assert {id(p) for p in learned} <= {id(p) for p in d.parameters()}
    assert all(p.grad is not None for n, p in student.named_parameters() if n.startswith("stage"))
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert list(student.state_dict()) == names


def test_the_second_stage_needs_the_first_and_the_same_layers():
    student, teacher, batch = SmallCNN(4), SmallCNN(8), batch_of()
    with pytest.raises(ValueError, match=r"TaskOriented: its first stage has taught it nothing.*teacher heads"):
        Distillation(student, teacher, losses=[TaskOriented()]).bind(batch)
    _, _, first = both_stages(student, teacher, batch, "stage3")
    with pytest.raises(ValueError, match="cannot go on with what it learned"):
        Distillation(student, teacher, losses=[TaskOriented("stage2")]).continue_from(first).bind(batch)
    d, loss, _ = both_stages(student, teacher, batch)
    with pytest.raises(ValueError, match="taught it nothing"):
        Distillation(student, teacher, losses=[loss]).bind(batch)
    assert len(loss.teacher_heads) == len(loss.student_heads) == len(loss.projectors) == 3
    other, *_ = both_stages(copy.deepcopy(student), teacher, batch)
    other.load_state_dict(d.state_dict())
    torch.testing.assert_close(other.eval()(batch).total, d.eval()(batch).total)


def test_an_unlabelled_batch_teaches_by_the_teachers_heads_alone():
    student, teacher, batch = SmallCNN(4), SmallCNN(8), batch_of()
    d, _, _ = both_stages(student, teacher, batch, feature=0.0, orthogonal=0.0, soft=0.0)
    assert d((batch[0], torch.full((6,), -100))).total == 0
    d, _, _ = both_stages(student, teacher, batch)
    assert d((batch[0], torch.full((6,), -100))).total > 0


def test_vectors_and_a_teacher_of_other_classes():
    torch.manual_seed(0)
    student, teacher = MLP(8, (6, 5), 3), MLP(8, (16, 12), 7)
    batch = torch.randn(6, 8), torch.arange(6) % 3
    d, loss, _ = both_stages(student, teacher, batch, "hidden.0", "hidden.1")
    d(batch).total.backward()
    assert [h.classifier.out_features for h in loss.teacher_heads] == [3, 3]
    assert [tuple(p.weight.shape) for p in loss.projectors] == [(12, 5), (12, 5)]
    assert d((batch[0][:1], batch[1][:1])).total.isfinite()
    double = [m.double() for m in (student, teacher)]
    d, _, _ = both_stages(*double, (batch[0].double(), batch[1]), "hidden.0", "hidden.1")
    assert d((batch[0].double(), batch[1]))["TaskOriented"].dtype == torch.float64


def test_sequences_are_averaged_over_their_tokens():
    torch.manual_seed(0)
    head = TaskHead([4, 6], classes=3, maps=False).eval()
    tokens = torch.randn(2, 5, 4)
    vector, logits = head(tokens)
    assert (vector.shape, logits.shape) == ((2, 6), (2, 3))
    torch.testing.assert_close(head(tokens[:, [3, 0, 4, 1, 2]])[1], logits)


def test_stages_of_distill_carry_the_heads_over():
    batches = [batch_of() for _ in range(2)]
    stages = [
        Stage([TaskOriented("stage3", train=HEADS)], epochs=1),
        Stage([TaskLoss(), TaskOriented("stage3")], epochs=1),
    ]
    result = tl.distill(SmallCNN(4), SmallCNN(8), batches, batches, stages=stages, progress=False)
    terms = [set(line["losses"]) - {"loss"} for line in result.history]
    assert terms == [{"TaskOriented"}, {"TaskOriented", "TaskLoss"}]


def test_the_teachers_task_features_are_closer_on_unseen_samples_than_without():
    torch.manual_seed(0)
    kinds = torch.randn(6, 16)

    def batch(count=64):
        kind = torch.randint(6, (count,))
        return kinds[kind] + 0.8 * torch.randn(count, 16), kind % 3

    def learn(d, steps):
        d.bind(batch())
        optimizer = torch.optim.Adam((p for p in d.parameters() if p.requires_grad), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            d(batch()).total.backward()
            optimizer.step()
        return d.eval()

    layers = ("hidden.0", "hidden.1")
    teacher, taught = MLP(16, (32, 32), 3), MLP(16, (12, 12), 3)
    alone, unseen = copy.deepcopy(taught), batch(256)
    learn(Distillation(teacher), 60)
    first = learn(Distillation(taught, teacher, [TaskOriented(*layers, train=HEADS)]), 40)
    learn(Distillation(taught, teacher, [TaskLoss(), TaskOriented(*layers)]).continue_from(first), 150)
    learn(Distillation(alone), 150)

    def distance(student):
        """Of heads and projectors fitted to a student that does not change any more, on unseen samples."""
        student.requires_grad_(False)
        torch.manual_seed(1)
        loss = TaskOriented(*layers)
        learn(Distillation(student, teacher, [loss]).continue_from(first), 150)
        total, s, t = 0.0, unseen[0], unseen[0]
        with torch.no_grad():
            for n in range(2):
                s, t = student.hidden[n](s), teacher.hidden[n](t)
                mine, theirs = loss.student_heads[n](s)[0], loss.teacher_heads[n](t)[0]
                total += task_feature_distance(loss.projectors[n](mine), theirs).item()
        return total

    assert distance(taught) < 0.9 * distance(alone)
