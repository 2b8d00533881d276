from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Distillation, Loss, TaskLoss
from tutelage.schemes.online.cohort import Cohort, CohortOutput
from tutelage.schemes.online.deep_mutual_learning import DeepMutualLearning
from tutelage.taps import UnknownTap
from tutelage.views import Batch


class Net(nn.Module):
    """Two named stages and a head, of any width and depth."""

    def __init__(self, width: int, depth: int = 1, stage: str = "stage2"):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Linear(6, width), nn.ReLU(inplace=True))
        more = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
        self.add_module(stage, nn.Sequential(*more))
        self.stage = stage
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(getattr(self, self.stage)(self.stage1(x)))


class GramGap(Loss):
    """The smallest relation loss: it compares features of any widths."""

    needs_samples = 2

    def forward(self, student, teacher, batch: Batch):
        return sum((s @ s.T - t.detach() @ t.detach().T).square().mean() for s, t in self.tensors(student, teacher))


def cohort(n: int, seed: int = 0) -> Cohort:
    torch.manual_seed(seed)
    return Cohort([Net(4 + 3 * i, depth=i % 2 + 1) for i in range(n)])


def batch(n: int = 9):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def kl(target, mine):
    return (target.softmax(1) * (target.log_softmax(1) - mine.log_softmax(1))).sum(1).mean()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_total_and_gradients_equal_the_naive_loops(n):
    c = cohort(n)
    naive = copy.deepcopy(c)
    x, y = batch()
    teacher = DeepMutualLearning()
    losses = Distillation(c, teacher, losses=teacher.losses())((x, y))
    losses.total.backward()

    logits = [peer(x) for peer in naive.peers]
    total = sum(F.cross_entropy(z, y) for z in logits)
    for i in range(n):
        total = total + sum(kl(logits[j].detach(), logits[i]) for j in range(n) if j != i) / (n - 1)
    total.backward()
    torch.testing.assert_close(losses.total, total)
    for mine, theirs in zip(c.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_targets_are_detached_and_each_learner_is_not():
    c, x = cohort(3), batch()
    teacher = DeepMutualLearning()
    d = Distillation(c, teacher, losses=[KD("@logits"), GramGap("stage2")]).bind(x)
    record = d.observer(d.views(x).student)
    lessons = teacher.lessons(d.views(x), record)
    assert len(lessons) == 6
    for lesson in lessons:
        assert lesson.weight == 1 / 2
        assert lesson.student.logits.requires_grad
        assert lesson.student["stage2"].requires_grad
        assert not lesson.teacher.logits.requires_grad
        assert not lesson.teacher["stage2"].requires_grad
        assert not torch.equal(lesson.student.logits, lesson.teacher.logits)


@pytest.mark.parametrize("n", [2, 4])
def test_each_peer_runs_once_per_batch(n):
    c, x = cohort(n), batch()
    d = Distillation(c, DeepMutualLearning(), losses=[TaskLoss(), KD(), GramGap("stage1")]).bind(x)
    calls = [0] * n
    for i, peer in enumerate(c.peers):
        peer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    d(x)
    d(x)
    assert calls == [2] * n


def test_the_order_of_the_peers_does_not_matter():
    c, x = cohort(3), batch()
    turned = Cohort([copy.deepcopy(c.peers[i]) for i in (2, 0, 1)])
    teacher = DeepMutualLearning()
    results = []
    for student in (c, turned):
        total = Distillation(student, teacher, losses=[*teacher.losses(), GramGap("stage2")])(x).total
        total.backward()
        results.append((total.detach(), [p.grad for p in student.peers[0].parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(next(iter(c.peers[2].parameters())).grad, results[1][1][0])


def test_equal_peers_have_nothing_to_teach():
    peer = Net(5)
    d = Distillation(
        Cohort([peer, copy.deepcopy(peer)]), DeepMutualLearning(), losses=[KD(), GramGap("stage1", "stage2")]
    )
    losses = d(batch())
    losses.total.backward()
    assert losses.total.item() == pytest.approx(0.0, abs=1e-6)
    assert peer.head.weight.grad.abs().max() < 1e-6


def test_a_feature_loss_between_different_architectures_equals_its_loop():
    c, (x, y) = cohort(3), batch()
    d = Distillation(c, DeepMutualLearning(), losses=[GramGap("stage2")]).bind((x, y))
    features = [getattr(p, p.stage)(p.stage1(x)) for p in c.peers]
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = sum((features[i] @ features[i].T - features[j] @ features[j].T).square().mean() for i, j in pairs) / 2
    losses = d((x, y))
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()
    assert all(p.stage1[0].weight.grad.abs().sum() > 0 for p in c.peers)


def test_taps_that_are_overwritten_in_place_are_read_before():
    c, (x, y) = cohort(2), batch()
    teacher = DeepMutualLearning()
    d = Distillation(c, teacher, losses=[GramGap("stage1.0"), KD()]).bind((x, y))
    lesson = teacher.lessons(d.views((x, y)), d.observer(d.views((x, y)).student))[0]
    torch.testing.assert_close(lesson.student["stage1.0"], c.peers[0].stage1[0](x))
    assert (lesson.student["stage1.0"] < 0).any()


def test_a_peers_own_input_and_output_fields_are_addresses():
    class Wordy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.a(x)
            return {"logits": self.b(h), "hidden": (x, h)}

    torch.manual_seed(0)
    c, (x, y) = Cohort([Wordy(), Wordy()]), batch()
    teacher = DeepMutualLearning()
    d = Distillation(c, teacher, losses=[GramGap("@hidden[-1]"), GramGap(":input", name="same")]).bind((x, y))
    first, second = teacher.lessons(d.views((x, y)), d.observer(d.views((x, y)).student))
    torch.testing.assert_close(first.student["@hidden[-1]"], c.peers[0].a(x))
    torch.testing.assert_close(first.teacher["@hidden[-1]"], c.peers[1].a(x))
    torch.testing.assert_close(second.student[":input"], x)
    assert d((x, y))["same"] == 0


def test_evaluating_a_cohort_evaluates_the_first_peer():
    c, (x, _) = cohort(2), batch()
    output = c(x)
    assert isinstance(output, CohortOutput)
    torch.testing.assert_close(output.logits, c.peers[0](x))


def test_peers_agree_more_after_training_together_than_apart():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] + 0.5 * torch.randn(64, generator=g) > 0.5).long()
    unseen = torch.randn(256, 6, generator=g)

    def disagreement(losses) -> float:
        c = cohort(2, seed=1)
        d = Distillation(c, DeepMutualLearning(), losses=losses).bind((x, y))
        optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            d((x, y)).total.backward()
            optimizer.step()
        with torch.no_grad():
            a, b = c(unseen).peers
        return float(kl(a, b) + kl(b, a))

    assert disagreement(DeepMutualLearning().losses()) < 0.6 * disagreement([TaskLoss()])


def test_wrong_use_is_refused_by_name():
    net = Net(4)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        Cohort([net])
    with pytest.raises(ValueError, match="twice"):
        Cohort([net, net])
    with pytest.raises(TypeError, match=r"peers\[1\]"):
        Cohort([net, "resnet"])
    with pytest.raises(TypeError, match="Cohort"):
        Distillation(net, DeepMutualLearning()).bind(batch())
    with pytest.raises(UnknownTap, match=r"peer 1 .*'stage2'.*'stage3'"):
        Distillation(Cohort([net, Net(4, stage="stage3")]), DeepMutualLearning(), losses=[GramGap("stage2")]).bind(
            batch()
        )
