from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import CRD, KD, NKD, RKD, AttentionTransfer, Distillation, FitNets, TaskLoss
from tutelage.data import Indexed, PairedBatch, fashion_loaders, paired, paired_loaders
from tutelage.distilling import distill
from tutelage.models import SmallCNN
from tutelage.run import Interrupted
from tutelage.schemes.self_distillation.class_wise import ClassWise, class_partners
from tutelage.views import Inputs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(n: int = 8, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=g), torch.arange(n) % 4


def pairs() -> PairedBatch:
    (x, y), (other, _) = images(), images(seed=2)
    return PairedBatch(Inputs((x,)), Inputs((other,)), y)


def kl(target, z, t):
    p = (target.detach() / t).softmax(1)
    return F.kl_div((z / t).log_softmax(1), p, reduction="sum") * t**2 / len(z)


def test_pairs_equal_the_two_passes_of_the_paper():
    """Value, gradients and running statistics: first the samples, then their partners without a graph."""
    model, raw = net(), pairs()
    other = copy.deepcopy(model)
    teacher = ClassWise()
    d = Distillation(model, teacher, teacher.losses()).bind(raw)
    total = d(raw).total
    total.backward()
    z = other(raw.student.args[0])
    with torch.no_grad():
        target = other(raw.teacher.args[0])
    expected = F.cross_entropy(z, raw.labels) + kl(target, z, 4.0)
    expected.backward()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(model.conv[1].running_var, other.conv[1].running_var)
    assert model.conv[1].num_batches_tracked == 2


def test_the_partners_pass_has_no_graph_and_no_needless_one_runs():
    model, raw = net(), pairs()
    teacher = ClassWise()
    d = Distillation(model, teacher, [*teacher.losses(), FitNets("conv")]).bind(raw)
    graphs = []
    model.register_forward_hook(lambda m, args, out: graphs.append(out.requires_grad))
    d(raw)
    assert graphs == [True, False]
    graphs.clear()
    alone = Distillation(model, ClassWise(), [TaskLoss()]).bind(raw)
    graphs.clear()
    alone(raw)
    assert graphs == [True]
    # inside a plain batch everybody's own answer is somebody's target: one pass
    plain = Distillation(model, ClassWise(), ClassWise().losses()).bind(images())
    graphs.clear()
    plain(images())
    assert graphs == [True]


def test_a_plain_batch_equals_the_naive_loop():
    model, (x, y) = net(), images()
    y = torch.cat([y[:6], torch.tensor([-100, 7 % 4])])  # classes 0 1 2 3 0 1 - 3: 2 stands alone
    d = Distillation(model, ClassWise(), [KD(temperature=4.0, weight=1.0)]).bind((x, y))
    torch.manual_seed(5)
    losses = d((x, y))
    losses.total.backward()
    other = copy.deepcopy(net())
    z = other(x)
    torch.manual_seed(5)
    who = class_partners(y).tolist()
    assert who == [4, 5, 2, 7, 0, 1, 6, 3]
    expected = sum(kl(z[j : j + 1], z[i : i + 1], 4.0) for i, j in enumerate(who)) / 8
    expected.backward()
    torch.testing.assert_close(losses.total, expected)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_partners_inside_a_batch_are_drawn_evenly():
    labels = torch.tensor([0, 0, 0, 1, -100, -100])
    torch.manual_seed(0)
    counts = torch.zeros(6, 6)
    for _ in range(1000):
        counts[torch.arange(6), class_partners(labels)] += 1
    assert counts[3, 3] == counts[4, 4] == counts[5, 5] == 1000
    assert (counts[:3].diagonal() == 0).all()
    assert ((counts[:3, :3][~torch.eye(3, dtype=torch.bool)] - 500).abs() < 80).all()


@pytest.mark.parametrize("kind", ["pairs", "plain"])
def test_any_losses_can_stand_there(kind):
    model, (x, y) = net(), images()
    ids = torch.arange(8)
    raw = PairedBatch(Inputs((x,)), Inputs((x.flip(0),)), y, ids) if kind == "pairs" else (x, y, ids)
    terms = [
        TaskLoss(),
        KD(),
        NKD(),
        AttentionTransfer("conv"),
        FitNets("conv.1"),
        RKD("fc:input"),
        CRD("fc:input", k=3),
    ]
    d = Distillation(model, ClassWise(), terms).bind(raw, population=8)
    losses = d(raw)
    losses.total.backward()
    assert len(losses.values) == 7
    assert all(torch.isfinite(p.grad).all() for p in d.parameters() if p.grad is not None)


def test_wrong_use_is_refused_by_name():
    x, _ = images()
    with pytest.raises(ValueError, match="no class appears twice among the 8 samples of the first batch"):
        Distillation(net(), ClassWise(), [KD()]).bind((x, torch.arange(8)))
    with pytest.raises(ValueError, match="the batch has no labels"):
        Distillation(net(), ClassWise(), [KD()]).bind(x)
    with pytest.raises(ValueError, match=r"torch.float32 and shape \(8, 4\)"):
        Distillation(net(), ClassWise(), [KD()]).bind((x, torch.ones(8, 4)))
    # a later batch without a pair teaches by its labels alone
    d = Distillation(net(), ClassWise(), ClassWise().losses()).bind(images())
    assert d((x[:4], torch.arange(4)))["KD"].abs() < 1e-6


@pytest.mark.parametrize("kind", ["arrays", "data set"])
def test_an_interrupted_run_goes_on_exactly(tmp_path, kind):
    def train():
        if kind == "arrays":
            return paired_loaders(fashion_loaders(batch_size=16, limit=80, validation=50)).train
        x, y = images(40)
        return paired(DataLoader(Indexed(TensorDataset(x, y)), batch_size=8, shuffle=True))

    def model():
        torch.manual_seed(0)
        return SmallCNN(3)

    def run(student, out, **more):
        how = {"epochs": 2, "lr": 0.05, "progress": False, "cpu": True, "out": out, "checkpoint_every": 1, **more}
        distill(student, ClassWise(), train(), losses=ClassWise().losses(), **how)
        return student.state_dict()

    whole = run(model(), tmp_path / "whole")
    interrupted = model()
    steps = []

    def stop(module, args):
        # the second epoch's second step: passes come two by two
        steps.append(module.training)
        if len(steps) == stop.after:
            raise Interrupted("enough")

    stop.after = 2 * 7 + 2
    handle = interrupted.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        run(interrupted, tmp_path / "part")
    handle.remove()
    for name, value in run(model(), tmp_path / "part", resume=True).items():
        assert torch.equal(value, whole[name]), name


def within_class(losses, teacher, seed: int, in_pairs: bool) -> tuple[float, float]:
    """KL between what is said of two unseen images of a class, and of two classes, after a short training."""
    torch.manual_seed(seed)
    model, data = SmallCNN(6), fashion_loaders(batch_size=64, limit=400, validation=500)
    train = paired_loaders(data).train if in_pairs else data.train
    how = {"epochs": 6, "optimizer": "adamw", "lr": 0.02, "scheduler": "onecycle", "progress": False, "cpu": True}
    distill(model, teacher, train, losses=losses, seed=seed, **how)
    x, y, _ = next(iter(data.validation))
    model.eval()
    with torch.no_grad():
        log_p = model(x).log_softmax(1)
    between = (log_p.exp() * log_p).sum(1)[:, None] - log_p.exp() @ log_p.T
    same = (y[:, None] == y) & ~torch.eye(len(y), dtype=torch.bool)
    return float(between[same].mean()), float(between[y[:, None] != y].mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_predictions_agree_more_within_a_class(seed):
    by_labels, _ = within_class([TaskLoss()], None, seed, in_pairs=False)
    for in_pairs in (True, False):
        agreed, others = within_class(ClassWise().losses(), ClassWise(), seed, in_pairs)
        assert agreed < 0.8 * by_labels
        assert agreed < others
