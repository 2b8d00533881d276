from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from tutelage import CLILR, Branches, BranchTree, Distillation, FitNets
from tutelage.models import MLP


def heads(count=3, seed=0, **options) -> Branches:
    torch.manual_seed(seed)
    return Branches(MLP(6, (8, 8), 3), "hidden.0", count, (6,), **options)


def batch(n=7):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_equal_those_of_the_paper_s_objective(count):
    student = heads(count)
    naive = copy.deepcopy(student)
    x, y = batch()
    d = Distillation(student, CLILR(), losses=CLILR().losses(temperature=2.0, beta=0.3)).bind((x, y))
    d((x, y)).total.backward()
    logits = [peer(x) for peer in naive.peers]
    total = torch.zeros(())
    for h, z in enumerate(logits):
        q = (sum(other for j, other in enumerate(logits) if j != h) / (count - 1) / 2.0).softmax(1).detach()
        soft = -(q * (z / 2.0).log_softmax(1)).sum(1).mean()
        total = total + 0.3 * F.cross_entropy(z, y) + 0.7 * soft
    total.backward()
    for (name, mine), theirs in zip(student.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("tree", [False, True])
def test_rescaled_the_shared_layers_learn_at_the_pace_of_one_head(tree):
    """Equal heads get equal gradients: rescaled, the trunk's is that of one head alone, and otherwise their sum."""

    def gradient(rescale):
        torch.manual_seed(0)
        model, options = MLP(6, (8, 8, 8), 3), {"fresh": False, "rescale": rescale}
        student = (
            BranchTree(model, ["hidden.0", "hidden.1"], 2, (6,), **options)
            if tree
            else Branches(model, "hidden.0", 4, (6,), **options)
        )
        d = Distillation(student, CLILR(), losses=CLILR().losses()).bind(batch())
        d(batch()).total.backward()
        return student.peers[0].hidden[0][0].weight.grad

    torch.manual_seed(0)
    alone = MLP(6, (8, 8, 8), 3)
    (0.5 * F.cross_entropy(alone(batch()[0]), batch()[1])).backward()  # equal heads have nothing to teach
    torch.testing.assert_close(gradient(True), alone.hidden[0][0].weight.grad)
    torch.testing.assert_close(gradient(False), 4 * alone.hidden[0][0].weight.grad)


def test_each_head_learns_from_all_others_and_not_from_itself():
    student, teacher = heads(3), CLILR()
    d = Distillation(student, teacher, losses=[FitNets("hidden.1")]).bind(batch())
    seen = d.views(batch())
    lessons = teacher.lessons(seen, d.observer(seen.student))
    features = [lesson.student["hidden.1"] for lesson in lessons]
    for h, lesson in enumerate(lessons):
        expected = sum(f for j, f in enumerate(features) if j != h) / 2
        torch.testing.assert_close(lesson.teacher["hidden.1"], expected.detach())
    assert [lesson.key for lesson in lessons] == ["0_from_others", "1_from_others", "2_from_others"]


def test_beta_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"CLILR: beta=1\.5: expected 0 <= beta <= 1"):
        CLILR().losses(beta=1.5)
    assert [loss.weight for loss in CLILR().losses(beta=1.0)] == [1.0, 0.0]
