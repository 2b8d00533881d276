from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import CRD, KD, NKD, RKD, AttentionTransfer, Distillation, FitNets, TaskLoss, evaluate
from tutelage.data import CropFlip, fashion_loaders
from tutelage.distilling import distill
from tutelage.models import SmallCNN
from tutelage.schemes.self_distillation.data_distortion import (
    DataDistortion,
    DistortedBatch,
    Distortions,
    MeanEmbedding,
    mean_embedding_distance,
)


class Net(nn.Module):
    def __init__(self, norm: bool = True):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def batch(n: int = 6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 6, 6, generator=g), torch.randint(0, 4, (n,), generator=g)


def views() -> Distortions:
    return Distortions(lambda x: x.flip(3) + 0.1, lambda x: 1.5 * x)


def net(seed: int = 0, **options) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def naive(model, x, y, temperature, weight, mmd):
    """The paper's sum in one pass, with the discrepancy differentiated as a whole."""
    twice = torch.cat([x.flip(3) + 0.1, 1.5 * x])
    f = model.conv(twice).mean((2, 3))
    (z_a, z_b), (f_a, f_b) = model.fc(f).chunk(2), f.chunk(2)

    def kl(target, z):
        p = (target.detach() / temperature).softmax(1)
        return (p * (p.log() - (z / temperature).log_softmax(1))).sum(1).mean() * temperature**2

    return (
        F.cross_entropy(z_a, y)
        + F.cross_entropy(z_b, y)
        + weight * (kl(z_b, z_a) + kl(z_a, z_b))
        + mmd * ((f_a.mean(0) - f_b.mean(0)) ** 2).sum()
    )


@pytest.mark.parametrize(("temperature", "weight", "mmd"), [(3.0, 1.0, 0.0005), (1.0, 0.5, 2.0)])
def test_the_gradient_is_that_of_the_papers_sum(temperature, weight, mmd):
    model, (x, y) = net(), batch()
    other = copy.deepcopy(model)
    teacher = DataDistortion()
    losses = Distillation(model, teacher, teacher.losses(temperature, weight, mmd), views())((x, y))
    losses.total.backward()
    total = naive(other, x, y, temperature, weight, mmd)
    total.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    # each lesson counts the discrepancy, and half of its gradient
    torch.testing.assert_close(losses.total.detach() - mmd * losses["MeanEmbedding"] / 2, total.detach())


def test_the_distance_of_means():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(5, 3, generator=g, requires_grad=True), torch.randn(5, 3, generator=g).requires_grad_()
    value = mean_embedding_distance(s, t)
    # MMD² with k(x, y) = x·y, pair by pair
    pairs = [[float(a.detach() @ b.detach()) for a in x for b in y] for x, y in ((s, s), (t, t), (s, t))]
    naive_value = sum(pairs[0]) / 25 + sum(pairs[1]) / 25 - 2 * sum(pairs[2]) / 25
    assert value.item() == pytest.approx(naive_value, rel=1e-4)
    value.backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0
    assert float(mean_embedding_distance(s[[2, 0, 1, 4, 3]].detach(), s)) == pytest.approx(0.0, abs=1e-10)
    with pytest.raises(ValueError, match="3 of the student, 2 of the teacher"):
        mean_embedding_distance(s, t[:, :2])


def test_one_pass_of_twice_the_batch_and_detached_targets():
    model, raw = net(), batch()
    teacher = DataDistortion()
    d = Distillation(model, teacher, [TaskLoss(), KD(), FitNets("conv")], views()).bind(raw)
    sizes = []
    model.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    d(raw)
    assert sizes == [12]
    seen = d.views(raw)
    lessons = teacher.lessons(seen, d.observer(seen.student))
    assert len(lessons) == 2
    torch.testing.assert_close(lessons[0].student.logits, lessons[1].teacher.logits)
    torch.testing.assert_close(lessons[0].teacher["conv"], lessons[1].student["conv"])
    assert all(lesson.student.logits.requires_grad and not lesson.teacher.logits.requires_grad for lesson in lessons)


def test_every_input_is_doubled_and_labels_and_ids_stay_the_samples():
    raw = {
        "x": torch.tensor([[1.0], [2.0]]),
        "mask": torch.tensor([[1], [0]]),
        "y": torch.tensor([3, 4]),
        "ids": [7, 8],
    }
    seen = Distortions(lambda x: x + 10, lambda x: -x)({**raw, "ids": torch.tensor([7, 8])})
    assert isinstance(seen, DistortedBatch)
    assert len(seen) == 2
    assert seen.student.kwargs["x"].flatten().tolist() == [11, 12, -1, -2]
    assert seen.student.kwargs["mask"].flatten().tolist() == [1, 0, 1, 0]
    assert (seen.labels.tolist(), seen.ids.tolist()) == ([3, 4], [7, 8])
    # by default random crops and flips, drawn twice from torch's generator
    torch.manual_seed(0)
    x = torch.randn(20, 1, 8, 8)
    first, second = Distortions()(x).student.args[0].chunk(2)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"second: made \(1, 1, 8, 8\)"):
        Distortions(lambda x: x, lambda x: x[:1])(x)


def test_units_are_samples_under_accumulation():
    """Two batches of different numbers of labels are one batch."""
    x, y = batch(8)
    y = torch.cat([y[:3], torch.full((2,), -100), y[5:]])
    whole, parts = net(norm=False), net(norm=False)

    def made(model):
        return Distillation(model, DataDistortion(), [TaskLoss(), KD(temperature=2.0)], views()).bind((x, y))

    made(whole)((x, y)).total.backward()
    d = made(parts)
    windows = [(x[:3], y[:3]), (x[3:], y[3:])]
    units = [d.units(w) for w in windows]
    assert [int(u["TaskLoss"]) for u in units] == [3, 3]
    assert [int(u["KD"]) for u in units] == [3, 5]
    for window, own in zip(windows, units, strict=True):
        d(
            window, {n: torch.tensor(float(u)) / sum(float(other[n]) for other in units) for n, u in own.items()}
        ).total.backward()
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_model_is_judged_on_batches_as_they_are():
    model, raw = net(), batch(50)
    plain, distorted = evaluate(model, [raw]), evaluate(model, [raw], views=views())
    assert distorted == plain
    assert distorted.samples == 50


def test_any_losses_can_stand_there():
    model, (x, y) = net(), batch(6)
    ids = torch.arange(6)
    terms = [TaskLoss(), KD(), NKD(), AttentionTransfer("conv"), FitNets("conv"), RKD("fc:input"), CRD("fc:input", k=3)]
    d = Distillation(model, DataDistortion(), terms, views()).bind((x, y, ids), population=6)
    losses = d((x, y, ids))
    losses.total.backward()
    assert set(losses.values) == {"TaskLoss", "KD", "NKD", "AttentionTransfer", "FitNets", "RKD", "CRD"}
    assert all(torch.isfinite(p.grad).all() for p in d.parameters() if p.grad is not None)
    assert model.conv[0].weight.grad.abs().sum() > 0


def test_without_distortions_it_is_refused():
    with pytest.raises(ValueError, match=r"views=Distortions\(\)"):
        Distillation(net(), DataDistortion(), [KD()]).bind(batch())
    with pytest.raises(ValueError, match="features are"):
        Distillation(net(), DataDistortion(), [MeanEmbedding(("conv", "fc"))], views()).bind(batch())


def disagreement(losses, seed: int) -> float:
    """KL between what is said of two distortions of unseen images, after a short training on distorted ones."""
    torch.manual_seed(seed)
    model, data = SmallCNN(6), fashion_loaders(batch_size=64, limit=400, validation=500)
    how = {"epochs": 6, "optimizer": "adamw", "lr": 0.02, "scheduler": "onecycle", "progress": False, "cpu": True}
    distill(model, DataDistortion(), data.train, losses=losses, views=Distortions(CropFlip(2)), seed=seed, **how)
    model.eval()
    distort, generator_state = CropFlip(2), torch.get_rng_state()
    torch.manual_seed(99)
    with torch.no_grad():
        first, second = (torch.cat([model(distort(x)) for x, _, _ in data.validation]) for _ in range(2))
    torch.set_rng_state(generator_state)
    p = first.log_softmax(1)
    # as a part of how much predictions differ between images, so that a network that says little does not win by it
    mean = p.exp().mean(0).log()
    spread = float((p.exp() * (p - mean)).sum(1).mean())
    return float((p.exp() * (p - second.log_softmax(1))).sum(1).mean()) / spread


@pytest.mark.parametrize("seed", [0, 1])
def test_predictions_depend_less_on_the_distortion(seed):
    by_labels = disagreement([TaskLoss()], seed)
    assert disagreement(DataDistortion().losses(), seed) < 0.95 * by_labels
