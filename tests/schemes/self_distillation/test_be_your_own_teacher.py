from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Distillation, Loss, TaskLoss
from tutelage.schemes.self_distillation.be_your_own_teacher import BeYourOwnTeacher, ExitHint, Exits, hint_distance
from tutelage.taps import UnknownTap


class ConvNet(nn.Module):
    def __init__(self, inplace: bool = True):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6))
        self.drop = nn.Dropout(0.5, inplace=inplace)
        self.layer3 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.layer3(self.drop(self.layer2(self.layer1(x)))).mean((2, 3)))


class Plain(nn.Module):
    """No drop-out and no batch statistics in the network itself: two forward passes agree."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.block1 = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.block2 = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.block3 = nn.Sequential(nn.Linear(12, 9), nn.ReLU())
        self.fc = nn.Linear(9, classes)

    def forward(self, x):
        return self.fc(self.block3(self.block2(self.block1(x))))


def plain_exits(seed: int = 0) -> Exits:
    torch.manual_seed(seed)
    return Exits(Plain(), at=["block1", "block2"], example=(6,))


def batch(n: int = 10):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, 6, generator=g), torch.randint(0, 4, (n,), generator=g)


@pytest.mark.parametrize(("alpha", "temperature", "hint"), [(0.3, 3.0, 0.03), (0.6, 1.5, 0.5), (0.0, 2.0, 0.1)])
def test_total_and_gradients_equal_the_naive_formula(alpha, temperature, hint):
    student, (x, y) = plain_exits(), batch()
    naive = copy.deepcopy(student)
    teacher = BeYourOwnTeacher(alpha)
    total = Distillation(student, teacher, losses=teacher.losses(temperature, hint))((x, y)).total
    total.backward()

    said = naive(x)
    expected = F.cross_entropy(said.logits, y)
    soft = (said.logits.detach() / temperature).softmax(1)
    for z, f in zip(said.exits, said.features, strict=True):
        kl = (soft * (soft.log() - (z / temperature).log_softmax(1))).sum(1).mean()
        gap = (f - said.feature.detach()).square().sum(1).mean()
        expected = expected + (1 - alpha) * F.cross_entropy(z, y) + alpha * kl + hint * gap
    expected.backward()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(student.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_kl_and_hint_give_no_gradient_above_the_last_exit():
    student, (x, y) = plain_exits(), batch()
    Distillation(student, BeYourOwnTeacher(), losses=[KD(weight=1.0), ExitHint()])((x, y)).total.backward()
    assert student.model.fc.weight.grad is None
    assert student.model.block3[0].weight.grad is None
    assert student.model.block2[0].weight.grad.abs().sum() > 0
    assert student.model.block1[0].weight.grad.abs().sum() > 0
    assert all(b[0].weight.grad.abs().sum() > 0 for b in student.bottlenecks)


def test_the_deepest_exit_is_detached_also_for_losses_that_do_not_detach():
    class Gap(Loss):
        def forward(self, student, teacher, batch):
            return sum((s - t).square().mean() for s, t in self.tensors(student, teacher))

    student, (x, y) = plain_exits(), batch()
    Distillation(student, BeYourOwnTeacher(), losses=[Gap("@logits", "@feature")])((x, y)).total.backward()
    assert student.model.fc.weight.grad is None
    assert student.model.block3[0].weight.grad is None
    assert student.classifiers[0].weight.grad.abs().sum() > 0


def test_the_deepest_exit_learns_from_the_labels_with_weight_one():
    student, (x, y) = plain_exits(), batch()
    teacher = BeYourOwnTeacher()
    Distillation(student, teacher, losses=teacher.losses())((x, y)).total.backward()
    alone = copy.deepcopy(student.model)
    alone.zero_grad()
    F.cross_entropy(alone(x), y).backward()
    torch.testing.assert_close(student.model.fc.weight.grad, alone.fc.weight.grad)
    torch.testing.assert_close(student.model.block3[0].weight.grad, alone.block3[0].weight.grad)


def test_hint_is_zero_for_equal_features_and_its_gradient_is_the_students():
    f = torch.randn(3, 7, requires_grad=True)
    assert hint_distance(f, f.detach()) == 0
    t = torch.randn(3, 7, requires_grad=True)
    hint_distance(f, t).backward()
    assert t.grad is None
    torch.testing.assert_close(f.grad, 2 * (f - t).detach() / 3)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(hint_distance(f[order], t[order]), hint_distance(f, t))
    assert hint_distance(torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2)).dtype == torch.float64
    big = torch.full((2, 4), 500.0, dtype=torch.float16, requires_grad=True)
    value = hint_distance(big, -big)
    value.backward()
    assert value.item() == 4e6
    assert torch.isfinite(big.grad).all()
    with pytest.raises(ValueError, match="shape"):
        hint_distance(f, t[:, :3])


def test_exits_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = ConvNet().train()
    before = copy.deepcopy(model.state_dict())
    names = [n for n, _ in model.named_modules()]
    student = Exits(model, at=["layer*"], example=(1, 16, 16))
    assert student.model is model
    assert student.at == ["layer1", "layer2", "layer3"]
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training
    x = torch.randn(3, 1, 16, 16)
    student.eval()
    said = student(x)
    torch.testing.assert_close(said.logits, model(x))
    torch.testing.assert_close(said.feature, model.layer3(model.layer2(model.layer1(x))).mean((2, 3)))
    strict = ConvNet()
    strict.load_state_dict(student.model.state_dict())
    torch.testing.assert_close(strict.eval()(x), said.logits)


def test_a_tap_before_in_place_drop_out_is_read_before_it():
    torch.manual_seed(0)
    student = Exits(ConvNet(inplace=True), at=["layer2"], example=torch.randn(2, 1, 16, 16)).train()
    seen = []
    student.bottlenecks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kept = []
    student.model.layer2.register_forward_hook(lambda *a: kept.append(a[2].clone()))
    student(torch.randn(4, 1, 16, 16)).exits[0].sum().backward()
    torch.testing.assert_close(seen[0], kept[0])


def test_a_checkpoint_loads_into_fresh_exits():
    first, second = plain_exits(0), plain_exits(1)
    x, _ = batch()
    second.load_state_dict(first.state_dict())
    for a, b in zip(first(x).exits, second(x).exits, strict=True):
        assert torch.equal(a, b)
    duplicate = copy.deepcopy(first)
    with torch.no_grad():
        first.model.block1[0].weight.zero_()
    assert torch.equal(duplicate(x).exits[0], second(x).exits[0])


def test_exits_on_tokens_and_in_half_precision():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.block = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 3)

        def forward(self, input_ids):
            return self.fc(self.block(self.embed(input_ids))[:, 0])

    student = Exits(Tokens().bfloat16(), at=["embed"], example={"input_ids": torch.zeros(2, 7, dtype=torch.long)})
    said = student(input_ids=torch.randint(0, 20, (4, 7)))
    assert said.exits[0].shape == (4, 3)
    assert said.features[0].shape == said.feature.shape == (4, 8)
    teacher = BeYourOwnTeacher()
    d = Distillation(student, teacher, losses=teacher.losses())
    total = d({"input_ids": torch.randint(0, 20, (4, 7)), "labels": torch.tensor([0, 1, 2, 0])}).total
    total.backward()
    assert total.dtype == torch.float32
    assert torch.isfinite(student.bottlenecks[0][1].weight.grad).all()


def trained_gaps(losses, seed: int) -> tuple[float, float]:
    """The exits' KL to the deepest on unseen inputs, and their features' distance to it, after a short training.

    The network itself is trained by labels first and then held, so that the deepest exit is one and the same target
    whatever the losses are; trained along, it differs (and grows) more from run to run than the terms can change.
    """
    g = torch.Generator().manual_seed(seed)
    x, unseen = torch.randn(128, 6, generator=g), torch.randn(256, 6, generator=g)
    rule, head = torch.randn(6, 12, generator=g), torch.randn(12, 4, generator=g)
    y = (torch.relu(x @ rule) @ head).argmax(1)
    student = plain_exits(seed)
    optimizer = torch.optim.Adam(student.model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(student.model(x), y).backward()
        optimizer.step()
    student.model.requires_grad_(False)
    d = Distillation(student, BeYourOwnTeacher(), losses=losses).bind((x, y))
    optimizer = torch.optim.Adam([p for p in d.parameters() if p.requires_grad], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        d((x, y)).total.backward()
        optimizer.step()
    with torch.no_grad():
        said = student(unseen)
    target = said.logits.log_softmax(1)
    kl = sum(F.kl_div(z.log_softmax(1), target, reduction="batchmean", log_target=True) for z in said.exits)
    return float(kl), float(sum(hint_distance(f, said.feature) for f in said.features))


# Each term is held to what it does. Their sum is not held to a smaller KL: in so short a training the hint can cost
# the exits more agreement than the KL wins.
@pytest.mark.parametrize("seed", range(4))
def test_each_term_brings_the_exits_closer_to_the_deepest(seed):
    kl_by_labels, gap_by_labels = trained_gaps([TaskLoss(weight=0.7)], seed)
    teacher = BeYourOwnTeacher()
    kl_without_hint, _ = trained_gaps(teacher.losses(hint=0.0), seed)
    _, gap = trained_gaps(teacher.losses(), seed)
    assert kl_without_hint < 0.95 * kl_by_labels
    assert gap < 0.5 * gap_by_labels


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match=r"alpha=1\.0"):
        BeYourOwnTeacher(1.0)
    with pytest.raises(TypeError, match="Exits"):
        Distillation(Plain(), BeYourOwnTeacher()).bind(batch())
    with pytest.raises(UnknownTap, match=r"'blok1'.*'block1'"):
        Exits(Plain(), at=["blok1"], example=(6,))
    with pytest.raises(ValueError, match="at least one exit"):
        Exits(Plain(), at=[], example=(6,))
    with pytest.raises(UnknownTap, match="'@feature'"):
        Distillation(plain_exits(), BeYourOwnTeacher(), losses=[KD("model.block1")]).bind(batch())
