from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from tutelage import KD, RKD, Cohort, DenseMutual, Distillation, Exits, FitNets, Loss, TaskLoss, Training
from tutelage.engine import fit
from tutelage.models import MLP
from tutelage.taps import UnknownTap


def network(width: int, exits: int = 2, classes: int = 3) -> Exits:
    return Exits(MLP(6, [width] * (exits + 1), classes), at=[f"hidden.{i}" for i in range(exits)], example=(6,))


def cohort(count: int = 2, seed: int = 0) -> Cohort:
    torch.manual_seed(seed)
    return Cohort([network(5 + 3 * i) for i in range(count)])


def batch(n: int = 9):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def kl(target, mine):
    return (target.softmax(1) * (target.log_softmax(1) - mine.log_softmax(1))).sum(1).mean()


def test_total_and_gradients_equal_the_published_sum():
    c, (x, y) = cohort(), batch()
    naive, teacher = copy.deepcopy(c), DenseMutual()
    total = Distillation(c, teacher, teacher.losses()).bind((x, y))((x, y)).total
    total.backward()
    said = [naive.peers[p](x) for p in range(2)]
    one, two = ([*z.exits, z.logits] for z in said)
    expected = sum(F.cross_entropy(z, y) for z in one + two)
    for a in one:
        for b in two:  # 9 pairs, each in both directions
            expected = expected + kl(b.detach(), a) + kl(a.detach(), b)
    expected.backward()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(c.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_more_networks_with_other_numbers_of_exits_count_as_means():
    torch.manual_seed(0)
    c, (x, y) = Cohort([network(5, 1), network(6, 2), network(7, 3)]), batch()
    values = Distillation(c, DenseMutual(), [TaskLoss(), KD(temperature=1.0, weight=1.0)])((x, y)).values
    all_said = [[*z.exits, z.logits] for z in c(x).peers]
    torch.testing.assert_close(
        values["TaskLoss"], sum(F.cross_entropy(z, y) for said in all_said for z in said).detach()
    )
    expected = 0.0
    for p, mine in enumerate(all_said):
        for a in mine:
            for q in {0, 1, 2} - {p}:
                expected += sum(kl(b, a).item() for b in all_said[q]) / len(all_said[q]) / 2
    assert values["KD"].item() == pytest.approx(expected, rel=1e-4)


def test_one_network_teaches_nothing_to_itself_and_targets_are_detached():
    class Gap(Loss):  # does not detach by itself
        def forward(self, student, teacher, batch):
            return sum((s - t).square().mean() for s, t in self.tensors(student, teacher))

    c, x = cohort(), batch()
    teacher = DenseMutual()
    d = Distillation(c, teacher, [Gap("@logits")]).bind(x)
    lessons = teacher.lessons(d.views(x), d.observer(d.views(x).student))
    assert len(lessons) == 18
    assert all(lesson.key[0] != lesson.key[-3] for lesson in lessons)  # "0_2_from_1_0"
    assert len({lesson.key for lesson in lessons}) == 18
    assert not any(lesson.teacher.logits.requires_grad for lesson in lessons)
    assert all(lesson.student.logits.requires_grad for lesson in lessons)
    c.peers[1].requires_grad_(False)
    d(x).total.backward()
    assert all(p.grad is not None for p in c.peers[0].parameters())
    assert all(p.grad is None for p in c.peers[1].parameters())


def test_each_network_runs_once_and_any_losses_stand_beside_it():
    c, x = cohort(), batch()
    losses = [TaskLoss(), KD(), FitNets("@feature"), RKD("@feature")]
    d = Distillation(c, DenseMutual(), losses).bind(x)
    calls = [0, 0]
    for i, peer in enumerate(c.peers):
        peer.model.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    said = d(x)
    said.total.backward()
    assert calls == [1, 1]
    assert all(torch.isfinite(v) and v > 0 for v in said.values.values())
    assert all(torch.isfinite(p.grad).all() for p in d.parameters())


def test_without_exits_in_the_losses_it_is_the_plain_network_that_stays():
    c, (x, _) = cohort(), batch()
    plain = c.peer(1).model
    assert isinstance(plain, MLP)
    torch.testing.assert_close(plain(x), c(x).peers[1].logits)


def test_resuming_is_exact(tmp_path):
    x, y = batch(32)
    data = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)]

    def trained(out, stop=None, **how):
        d = Distillation(cohort(), DenseMutual(), [*DenseMutual().losses(), FitNets("@feature", weight=0.1)])
        settings = Training(epochs=4, accumulate=2, progress=False, cpu=True, lr=0.05)
        return fit(d, data, training=settings, out=out, after_epoch=stop, **how).last

    def stop(line):
        if line.epoch == 1:
            raise InterruptedError

    whole = trained(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained(tmp_path / "parts", stop)
    parts = trained(tmp_path / "parts", resume=True)
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


@pytest.mark.parametrize("seed", range(3))
def test_classifiers_of_different_networks_agree_more_than_by_labels_alone(seed):
    g = torch.Generator().manual_seed(seed)
    x, unseen = torch.randn(96, 6, generator=g), torch.randn(256, 6, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] + 0.5 * torch.randn(96, generator=g) > 0.5).long()

    def disagreement(losses) -> float:
        c = cohort(seed=seed)
        d = Distillation(c, DenseMutual(), losses).bind((x, y))
        optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            d((x, y)).total.backward()
            optimizer.step()
        with torch.no_grad():
            one, two = ([*z.exits, z.logits] for z in c(unseen).peers)
        return sum(float(kl(a, b) + kl(b, a)) for a in one for b in two)

    assert disagreement(DenseMutual().losses()) < 0.5 * disagreement([TaskLoss()])


def test_wrong_use_is_refused_by_name():
    torch.manual_seed(0)
    with pytest.raises(TypeError, match=r"peers\[1\]: DenseMutual teaches tutelage Exits, got MLP"):
        Distillation(Cohort([network(4), MLP(6, (4,), 3)]), DenseMutual(), [KD()]).bind(batch())
    with pytest.raises(TypeError, match="DenseMutual teaches a tutelage Cohort, got Exits"):
        Distillation(network(4), DenseMutual(), [KD()]).bind(batch())
    with pytest.raises(UnknownTap, match="'@feature'"):
        Distillation(cohort(), DenseMutual(), [RKD("model.hidden.0")]).bind(batch())
    with pytest.raises(ValueError, match="3 classes"):
        Distillation(Cohort([network(4), network(4, classes=4)]), DenseMutual(), [KD()]).bind(batch())
