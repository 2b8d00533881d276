from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tutelage import Distillation, Frozen, TaskLoss
from tutelage.knowledge.feature.overhaul import (
    Overhaul,
    batch_norm_margin,
    batch_norms_before,
    mean_below_zero,
    partial_l2,
)
from tutelage.models import SmallCNN, resnet8, resnet20, wrn_16_1
from tutelage.views import Inputs


def images(count=4, size=16, channels=1):
    torch.manual_seed(0)
    return torch.randn(count, channels, size, size)


def with_margins(model):
    """Batch-norm layers whose γ and β are not those of the beginning."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def test_is_the_published_sum_over_neurons():
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    margin = -torch.rand(4, dtype=torch.float64)
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for c in range(4):
            for a, b in zip(s[c].flatten().tolist(), t[c].flatten().tolist(), strict=True):
                target = max(b, margin[c].item())
                if not a <= target <= 0:
                    total += (a - target) ** 2
    assert partial_l2(student, teacher, margin).item() == pytest.approx(total / 3)


def test_below_the_teacher_and_zero_nothing_is_asked_for():
    teacher, margin = torch.tensor([[-2.0, -0.3, 0.4]]), torch.full((3,), -0.5)
    student = torch.tensor([[-7.0, -0.4, 0.4]], requires_grad=True)
    value = partial_l2(student, teacher, margin)
    value.backward()
    assert value == 0
    assert student.grad.abs().sum() == 0
    # how far below the margin the teacher is does not matter; where it is positive, the student shall be equal
    assert partial_l2(torch.zeros(1, 1), torch.tensor([[-0.6]]), margin[:1]).item() == pytest.approx(0.25)
    assert partial_l2(torch.zeros(1, 1), torch.tensor([[-90.0]]), margin[:1]).item() == pytest.approx(0.25)
    assert partial_l2(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), margin[:1]).item() == 9


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.0), (2.0, 0.7), (-0.5, -1.0), (1.0, 2.5), (3.0, -20.0)])
def test_the_margin_is_the_mean_of_a_normal_variable_below_zero(weight, bias):
    x = torch.linspace(bias - 12 * abs(weight), 0, 400_001, dtype=torch.float64)
    density = (-((x - bias) ** 2) / (2 * weight**2)).exp()
    expected = (x * density).sum() / density.sum()
    margin = batch_norm_margin(torch.tensor([weight], dtype=torch.float64), torch.tensor([bias], dtype=torch.float64))
    assert margin.item() == pytest.approx(expected.item(), rel=1e-3)


def test_margins_at_the_ends():
    weight = torch.tensor([1.0, -2.0, 0.0, 0.0, 1e-6])
    bias = torch.tensor([3.2, 40.0, -3.0, 3.0, -500.0])
    # below 0.1 % it is three deviations, as the authors have it; a constant channel is what it is, or nothing
    torch.testing.assert_close(batch_norm_margin(weight, bias), torch.tensor([-3.0, -6.0, -3.0, 0.0, -500.0]))
    probability = 0.5 * math.erfc(3.0 / math.sqrt(2))
    assert probability > 0.001
    assert batch_norm_margin(torch.ones(1), torch.tensor([3.0])).item() == pytest.approx(-0.2831, abs=1e-4)


def test_refusals(bound):
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\)"):
        partial_l2(torch.ones(2, 3), torch.ones(2, 4), torch.zeros(3))
    for margin in (torch.zeros(()), torch.zeros(1), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="one number for each channel"):
            partial_l2(torch.ones(2, 3), torch.ones(2, 3), margin)
    with pytest.raises(ValueError, match="expected two maps"):
        bound(Overhaul(), torch.randn(2, 4), torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"Overhaul: 'stage2' of the teacher is nowhere below 0"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[Overhaul(("stage2.1", "stage2"))]).bind(images())


def test_the_batch_norm_of_a_tensor_is_found():
    small, res, wide = SmallCNN(4, depth=2), resnet20(), wrn_16_1()
    inputs = Inputs((torch.randn(2, 3, 16, 16),))
    found = batch_norms_before(
        res, inputs, ["relu:input", "layer1.2.relu#2:input", "layer2.0.relu#1:input", "layer2.0.relu#2:input", "conv1"]
    )
    assert found[0] is res.bn1
    assert found[1] is res.layer1[2].bn2
    assert found[2] is res.layer2[0].bn1
    assert found[3] is res.layer2[0].bn2, "and not the shortcut's, which runs after it"
    assert found[4] is None
    grey = Inputs((torch.randn(2, 1, 16, 16),))
    assert batch_norms_before(small, grey, ["stage1.4", "stage1.2:input"]) == [small.stage1[4], small.stage1[1]]
    found = batch_norms_before(wide, inputs, ["layer2.0.relu:input", "relu:input", "layer3"])
    assert found[:2] == [wide.layer2[0].bn1, wide.bn]
    assert found[2] is None, "a pre-activation network's sum has no batch-norm before it"


def test_a_batch_norm_that_holds_its_activation_is_found():
    class Activated(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    block = nn.Sequential(nn.Conv2d(1, 4, 1), Activated(4), nn.Conv2d(4, 4, 1), Activated(4))
    model = nn.ModuleDict({"block": block})
    model.forward = lambda x: block(x)
    inputs = Inputs((torch.randn(2, 1, 8, 8),))
    addresses = ["block.1.act:input", "block.3.act:input", "block.2"]
    assert batch_norms_before(model, inputs, addresses) == [block[1], block[3], None]


def test_margins_are_those_of_the_teachers_layers_and_are_saved():
    student, teacher, inputs = SmallCNN(4), with_margins(resnet8(in_channels=1)), images()
    loss = Overhaul()
    Distillation(student, teacher, losses=[loss]).bind(inputs)
    assert [t for _, t in loss.pairs] == [f"layer{n}.0.relu#2:input" for n in (1, 2, 3)]
    for n, layer in enumerate((teacher.layer1, teacher.layer2, teacher.layer3)):
        expected = batch_norm_margin(layer[0].bn2.weight, layer[0].bn2.bias)
        torch.testing.assert_close(loss.margins[n].margin, expected)
        assert f"margins.{n}.margin" in loss.state_dict()
    assert "margins.0.margin" not in dict(loss.named_parameters())
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    loss = Overhaul(("stage1.1", "1"))
    Distillation(SmallCNN(4), plain, losses=[loss]).bind(inputs)
    torch.testing.assert_close(loss.margins[0].margin, torch.full((4,), -math.sqrt(2 / math.pi)))


def test_without_batch_norm_the_margins_are_those_of_the_first_batch_and_it_says_so(capsys):
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    inputs, loss = images(), Overhaul(("stage1.1", "1:input"))
    Distillation(SmallCNN(4), teacher, losses=[loss]).bind(inputs)
    with torch.no_grad():
        features = teacher[0](inputs)
    for c, channel in enumerate(features.movedim(1, 0)):
        torch.testing.assert_close(loss.margins[0].margin[c], channel[channel < 0].mean())
    assert "no batch-norm before teacher '1:input'" in capsys.readouterr().err
    assert mean_below_zero(torch.ones(2, 3)).tolist() == [0, 0, 0]


def test_the_value_is_that_of_connected_taps_and_layers_weigh_half_of_the_next():
    student, teacher, inputs = SmallCNN(4), with_margins(SmallCNN(6)), images()
    loss = Overhaul("stage1.1", "stage2.1")
    d = Distillation(student, teacher, losses=[loss]).bind(inputs).eval()
    with torch.no_grad():
        value, expected = d(inputs), 0.0
        mine, theirs = inputs, inputs
        for n, weight in ((0, 0.5), (1, 1.0)):
            stages = [(m.stage1, m.stage2)[n] for m in (student, teacher)]
            mine, theirs = stages[0][:2](mine), stages[1][:2](theirs)
            margin = batch_norm_margin(stages[1][1].weight, stages[1][1].bias)
            expected += weight * partial_l2(loss.connectors[n](mine), theirs, margin)
            mine, theirs = (nn.functional.max_pool2d(x.relu(), 2) for x in (mine, theirs))
    torch.testing.assert_close(value["Overhaul"], expected)
    assert value.weights["Overhaul"] == 1 / 1000


def test_connectors_learn_are_saved_and_stay_out_of_the_student():
    student, teacher, inputs = SmallCNN(4), with_margins(SmallCNN(4)), images()
    names, frozen = list(student.state_dict()), copy.deepcopy(teacher.state_dict())
    loss = Overhaul("stage1.1", "stage2.1")
    d = Distillation(student, teacher, losses=[loss]).bind(inputs)
    d(inputs).total.backward()
    # equal channels have a connector too, as published
    assert [tuple(p.shape) for p in loss.parameters()] == [(4, 4, 1, 1), (4,), (4,), (8, 8, 1, 1), (8,), (8,)]
    assert all(p.grad is not None for p in loss.parameters())
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in d.parameters()}
    assert student.stage1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert list(student.state_dict()) == names
    other = Distillation(copy.deepcopy(student), SmallCNN(4), losses=[Overhaul("stage1.1", "stage2.1")]).bind(inputs)
    other.load_state_dict(d.state_dict())
    torch.testing.assert_close(other.losses["Overhaul"].margins[1].margin, loss.margins[1].margin)
    Distillation(student, teacher, losses=[loss]).bind(inputs)
    assert len(loss.connectors) == len(loss.margins) == 2


def test_a_teacher_on_the_batchs_statistics_has_the_margins_of_its_layers():
    teacher, inputs = with_margins(SmallCNN(4)), images(16)
    with torch.no_grad():
        teacher.stage1[1].running_mean.fill_(2.0)
    loss = Overhaul("stage1.1")
    d = Distillation(SmallCNN(4), Frozen(teacher, batch_statistics=True), losses=[loss]).bind(inputs)
    d(inputs).total.backward()
    torch.testing.assert_close(
        loss.margins[0].margin, batch_norm_margin(teacher.stage1[1].weight, teacher.stage1[1].bias)
    )
    # by the batch's statistics the closed form is close to what the batch really has below zero
    record = d.teacher.lessons(d.views(inputs), None)[0].teacher
    difference = (mean_below_zero(record["stage1.1"]) - loss.margins[0].margin).abs()
    assert (difference < 0.3).all()


@pytest.mark.parametrize("shape", [(6,), (7, 6), (6, 4, 4)])
def test_float64_vectors_sequences_and_maps(bound, shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, *shape).double(), torch.randn(5, *shape).double()
    value = bound(Overhaul(), student, teacher)(student, teacher)
    assert value.dtype == torch.float64
    assert value > 0


def test_beside_the_labels_it_brings_unseen_features_closer_than_the_labels_alone():
    torch.manual_seed(1)
    kinds = torch.randn(8, 1, 8, 8)

    def batch(classes=2, count=64):
        kind = torch.randint(8, (count,))
        return kinds[kind] + 0.5 * torch.randn(count, 1, 8, 8), kind % classes

    def trained(d, steps, classes=2):
        d.bind(batch(classes))
        optimizer = torch.optim.Adam((p for p in d.parameters() if p.requires_grad), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            d(batch(classes)).total.backward()
            optimizer.step()
        return d.eval()

    teacher, taught, unseen = SmallCNN(4), SmallCNN(4), batch(count=256)
    alone = copy.deepcopy(taught)
    trained(Distillation(teacher), 40, classes=8)
    trained(Distillation(taught, teacher, losses=[TaskLoss(), Overhaul("stage2.1")]), 100)
    trained(Distillation(alone), 100)

    def distance(student):
        """On unseen images, of connectors fitted to a student that does not change any more."""
        student.requires_grad_(False)
        torch.manual_seed(2)
        return trained(Distillation(student, teacher, losses=[Overhaul("stage2.1")]), 60)(unseen)["Overhaul"]

    assert distance(taught) < 0.9 * distance(alone)
