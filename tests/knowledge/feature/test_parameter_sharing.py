from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Distillation, FitNets, Loss, ParameterSharing, Rocket, TaskLoss, Training, distill, evaluate
from tutelage.engine import fit
from tutelage.knowledge.response.logit_regression import LogitRegression
from tutelage.models import SmallCNN
from tutelage.taps import UnknownTap

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
DATA = [(x, y) for x, y in zip(X.split(16), Y.split(16), strict=True)]


class Net(nn.Module):
    def __init__(self, *widths: int):
        super().__init__()
        sizes = zip((6, *widths), widths, strict=False)
        self.block = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in sizes))
        self.fc = nn.Linear(widths[-1], 3)

    def forward(self, x):
        return self.fc(self.block(x))


def rocket(seed: int = 0, **changes) -> Rocket:
    torch.manual_seed(seed)
    return Rocket(Net(8, 5), Net(8, 12, 20), **{"shared": ["block.0"], **changes})


def test_total_and_gradients_equal_the_naive_formula():
    student, teacher = rocket(), ParameterSharing()
    naive = copy.deepcopy(student)
    (x, y) = DATA[0]
    total = Distillation(student, teacher, losses=teacher.losses(classes=3, hint=0.2))((x, y)).total
    total.backward()
    light, booster = naive.light(x), naive.booster(x)
    hint = (light - booster.detach()).square().sum() / len(x)
    expected = F.cross_entropy(light, y) + F.cross_entropy(booster, y) + 0.2 * hint
    expected.backward()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(student.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("loss", [LogitRegression(), KD(), FitNets(("block.1", "block.2"))], ids=lambda loss: loss.name)
def test_whatever_stands_for_the_hint_reaches_shared_layers_through_the_light_network_alone(loss):
    student = rocket()
    d = Distillation(student, ParameterSharing(), losses=[copy.deepcopy(loss)]).bind(DATA[0])
    d(DATA[0]).total.backward()
    own = [*student.booster.block[1:].parameters(), *student.booster.fc.parameters()]
    assert all(p.grad is None for p in own)
    shared = student.light.block[0][0].weight.grad
    assert shared.abs().sum() > 0
    # the gradient that it would have if the booster were another network that never changes
    apart = copy.deepcopy(student)
    apart.zero_grad()
    frozen = copy.deepcopy(apart.booster)
    other = Distillation(apart.light, frozen, losses=[copy.deepcopy(loss)]).bind(DATA[0])
    other.losses.load_state_dict(d.losses.state_dict())
    other(DATA[0]).total.backward()
    torch.testing.assert_close(apart.light.block[0][0].weight.grad, shared)


def test_the_block_holds_for_losses_that_do_not_detach():
    class Gap(Loss):
        def forward(self, student, teacher, batch):
            return sum((s - t).square().mean() for s, t in self.tensors(student, teacher))

    student = rocket()
    Distillation(student, ParameterSharing(), losses=[Gap("@logits")])(DATA[0]).total.backward()
    assert student.booster.fc.weight.grad is None
    assert student.light.fc.weight.grad.abs().sum() > 0


def test_shared_layers_are_one_and_the_rest_is_not():
    light, booster = Net(8, 5), Net(8, 12, 20)
    both = Rocket(light, booster, shared=["block.0"])
    assert both.light is light
    assert both.booster is booster
    assert booster.block[0] is light.block[0]
    separate = sum(p.numel() for p in (*Net(8, 5).parameters(), *Net(8, 12, 20).parameters()))
    assert sum(p.numel() for p in both.parameters()) == separate - (6 * 8 + 8)
    named = Rocket(Net(8, 8, 5), Net(8, 8, 8, 7), shared=[("block.1", "block.2"), "block.0.0"])
    assert named.booster.block[2] is named.light.block[1]
    assert named.booster.block[1] is not named.light.block[1]
    assert named.booster.block[0][0] is named.light.block[0][0]
    x = X[:4]
    said = named(x)
    torch.testing.assert_close(said.logits, named.light(x))
    torch.testing.assert_close(said.booster, named.booster(x))


def test_evaluating_a_rocket_evaluates_the_plain_light_network():
    student = rocket()
    teacher = ParameterSharing()
    result = distill(student, teacher, DATA, DATA, losses=teacher.losses(3), epochs=3, lr=0.2, progress=False, cpu=True)
    plain = Net(8, 5)
    plain.load_state_dict(result.student.light.state_dict())
    metrics = evaluate(plain, DATA)
    assert (metrics.accuracy, metrics.nll) == (result.metrics.accuracy, pytest.approx(result.metrics.nll))
    assert result.teacher is None
    whole = Net(8, 12, 20)
    whole.load_state_dict(result.student.booster.state_dict())
    assert torch.equal(whole.block[0][0].weight, plain.block[0][0].weight)
    assert torch.equal(whole(X), result.student.booster(X))


def test_a_resumed_run_still_shares_and_ends_alike(tmp_path):
    def train(out, cut=None, resume=False):
        class Cut(torch.optim.SGD):
            count = 0

            def step(self, closure=None):
                if self.count == cut:
                    raise OSError("power cut")
                self.count += 1
                return super().step(closure)

        student, teacher = rocket(), ParameterSharing()
        how = Training(epochs=3, optimizer=lambda p: Cut(p, lr=0.1, momentum=0.9), progress=False, cpu=True)
        run = fit(Distillation(student, teacher, teacher.losses(3)), DATA, DATA, training=how, out=out, resume=resume)
        return student, run

    expected, whole = train(tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        train(tmp_path / "cut", cut=6)
    got, resumed = train(tmp_path / "cut", resume=True)
    assert got.booster.block[0] is got.light.block[0]
    for name, value in expected.state_dict().items():
        assert torch.equal(value, got.state_dict()[name]), name
    for name, value in whole.best.items():
        assert torch.equal(value, resumed.best[name]), name


def test_a_loss_without_a_teacher_reads_both_networks():
    class Size(Loss):
        needs_teacher = False

        def forward(self, student, teacher, batch):
            return sum(s.square().mean() for s, _ in self.tensors(student, student))

        def tensors(self, student, teacher):
            return [(student[s], student[s]) for s, _ in self.pairs]

    student = rocket()
    total = Distillation(student, ParameterSharing(), losses=[Size("block.1")])(DATA[0]).total
    x = DATA[0][0]
    both = student.light.block[:2](x).square().mean() + student.booster.block[:2](x).square().mean()
    torch.testing.assert_close(total, both)


def test_taps_of_shared_layers():
    student = rocket()

    def bound(*losses):
        return Distillation(student, ParameterSharing(), losses=list(losses)).bind(DATA[0])

    with pytest.raises(UnknownTap, match=r"'block\.0' is a shared layer"):
        bound(FitNets(("block.1", "block.0")))
    with pytest.raises(UnknownTap, match="later call of a shared layer"):
        bound(FitNets(("block.0#2", "block.1")))
    d = bound(FitNets(("block.0", "block.1")), TaskLoss())  # the light one's own call is the first
    d(DATA[0]).total.backward()
    with pytest.raises(UnknownTap, match="teacher tap"):
        bound(FitNets(("block.0", "nothing")))


def test_refusals():
    with pytest.raises(ValueError, match=r"no module 'blok.0'; nearest: 'block.0'"):
        rocket(shared=["blok.0"])
    with pytest.raises(ValueError, match=r"'block.1' of the light network has .*\(5, 8\).* of the booster .*\(12, 8\)"):
        rocket(shared=["block.1"])
    for nothing in ([], "block.0"):
        with pytest.raises(ValueError, match="at least one layer"):
            rocket(shared=nothing)
    with pytest.raises(TypeError, match="booster: expected an"):
        Rocket(Net(8), "booster", shared=["block.0"])
    one = Net(8)
    with pytest.raises(ValueError, match="shares modules with the light network already"):
        Rocket(one, nn.Sequential(one), shared=["block.0"])
    with pytest.raises(TypeError, match="teaches a tutelage Rocket, got Net"):
        Distillation(Net(8), ParameterSharing(), losses=[TaskLoss()]).bind(DATA[0])


def test_a_refused_rocket_leaves_both_networks_as_they_were():
    light, booster = Net(8, 5), Net(8, 12, 20)
    before = booster.block[0]
    with pytest.raises(ValueError, match=r"'block\.1'"):
        Rocket(light, booster, shared=["block.0", "block.1"])
    assert booster.block[0] is before


def test_batch_norms_of_their_own_beside_shared_convolutions():
    light, booster = SmallCNN(width=4), SmallCNN(width=4, depth=2)
    student = Rocket(light, booster, shared=["stage1.0", "stage2.0"])
    x = torch.randn(8, 1, 12, 12)
    student.train()(x)
    assert student.booster.stage1[1] is not student.light.stage1[1]
    torch.testing.assert_close(student.booster.stage1[1].running_mean, student.light.stage1[1].running_mean)
    assert not torch.allclose(student.booster.stage2[1].running_mean, student.light.stage2[1].running_mean)


def test_the_hint_brings_the_light_network_to_the_booster_on_fresh_samples():
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    train = list(zip(x[:256].split(32), y[:256].split(32), strict=True))
    fresh = x[256:]

    def apart(hint):
        student, teacher = rocket(seed=2), ParameterSharing()
        losses = teacher.losses(3, hint=hint)
        distill(student, teacher, train, losses=losses, epochs=8, lr=0.05, progress=False, cpu=True)
        with torch.no_grad():
            said = student(fresh)
        return (said.light - said.booster).square().sum(1).mean()

    assert apart(0.3) < 0.6 * apart(0.0)
