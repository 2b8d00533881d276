from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import Distillation, Frozen, TaskLoss
from tutelage.knowledge.feature.activation_boundary import ActivationBoundary, activation_boundary
from tutelage.knowledge.feature.pre_activation import pre_activations
from tutelage.models import MLP, SmallCNN, resnet8, resnet20, wrn_16_1
from tutelage.record import Record
from tutelage.views import Inputs


def images(count=4, size=16, channels=1):
    torch.manual_seed(0)
    return torch.randn(count, channels, size, size)


def addresses(model, shape):
    return [t.address for t in pre_activations(model, Inputs((torch.randn(2, *shape),)))]


@pytest.mark.parametrize("margin", [0.3, 1.0, 2.0])
def test_is_the_published_sum_over_neurons(margin):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    teacher[0, 0, 0, 0] = 0.0  # off
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
    assert activation_boundary(student, teacher, margin).item() == pytest.approx(total / 3)


def test_only_the_teachers_signs_count_and_beyond_the_margin_nothing_costs():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, dtype=torch.float64)
    value = activation_boundary(student, teacher)
    torch.testing.assert_close(activation_boundary(student, teacher.sign() * 1e-3), value)
    assert activation_boundary(teacher.sign() * 1.0, teacher) == 0
    assert activation_boundary(50 * teacher.sign(), teacher) == 0
    everything_wrong = activation_boundary(-teacher.sign(), teacher)
    assert everything_wrong.item() == pytest.approx(4 * 8)  # (1 + 1)² for each neuron, mean over samples


def test_the_gradient_pushes_towards_the_teachers_side_and_not_at_all_beyond_the_margin():
    student = torch.tensor([[0.5, 0.5, 1.5, -1.5]], requires_grad=True)
    activation_boundary(student, torch.tensor([[1.0, -1.0, 1.0, -1.0]])).backward()
    assert student.grad.tolist() == [[-1.0, 3.0, 0.0, 0.0]]


def test_refusals(bound):
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\)"):
        activation_boundary(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="margin=0: expected a positive number"):
        activation_boundary(torch.ones(2, 3), torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match="margin=-1"):
        ActivationBoundary(margin=-1)
    for mine, theirs in (((2, 4, 8), (2, 5, 8)), ((2, 4), (2, 4, 3, 3))):
        with pytest.raises(ValueError, match="two sequences of the same tokens"):
            bound(ActivationBoundary(), torch.randn(mine), torch.randn(theirs))


@pytest.mark.parametrize(("taps", "side"), [(("stage2.1", "stage2"), "teacher"), (("stage2", "stage2.1"), "student")])
def test_a_tensor_after_its_activation_is_refused(taps, side):
    with pytest.raises(ValueError, match=rf"ActivationBoundary: 'stage2' of the {side} is nowhere below 0.*batch-norm"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[ActivationBoundary(taps)]).bind(images())


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (SmallCNN(4, depth=2), (1, 16, 16), ["stage1.5:input", "stage2.5:input", "stage3.5:input"]),
        (resnet8(), (3, 16, 16), ["layer1.0.relu#2:input", "layer2.0.relu#2:input", "layer3.0.relu#2:input"]),
        # the batch-norms that the authors read in wide ResNets: the first ones of the next stage, and the last one
        (wrn_16_1(), (3, 16, 16), ["layer2.0.relu:input", "layer3.0.relu:input", "relu:input"]),
        (MLP(8, (6, 5), 3), (8,), ["hidden.0.1:input", "hidden.1.1:input"]),
    ],
)
def test_by_default_it_reads_what_the_last_activation_at_each_resolution_reads(model, shape, expected):
    assert addresses(model, shape) == expected


def test_activations_that_are_functions_are_not_seen_and_it_says_so():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return torch.relu(self.conv(x)).mean((2, 3))

    with pytest.raises(ValueError, match=r"ActivationBoundary: Functional calls no activation module"):
        Distillation(Functional(), SmallCNN(4), losses=[ActivationBoundary()]).bind(images())
    d = Distillation(Functional(), SmallCNN(4), losses=[ActivationBoundary(("conv", "stage1.1"))])
    assert d(images()).total > 0


def test_the_layers_are_matched_from_the_deepest_and_weigh_half_of_the_next():
    student, teacher, inputs = SmallCNN(4), resnet20(in_channels=1), images()
    whole = ActivationBoundary()
    single = [
        ActivationBoundary((f"stage{n}.2:input", f"layer{n}.2.relu#2:input"), name=f"{n}", weight=1.0)
        for n in (1, 2, 3)
    ]
    d = Distillation(student, teacher, losses=[whole, *single]).bind(inputs)
    assert whole.pairs == [loss.pairs[0] for loss in single]
    for n, loss in enumerate(single):
        loss.connectors[0].load_state_dict(whole.connectors[n].state_dict())
    losses = d.eval()(inputs)
    torch.testing.assert_close(losses["ActivationBoundary"], losses["1"] / 4 + losses["2"] / 2 + losses["3"])
    assert losses.weights["ActivationBoundary"] == 3 / 1000


def test_equal_channels_have_no_connector_and_the_value_is_that_of_the_taps():
    student, teacher, inputs = SmallCNN(4), SmallCNN(4), images()
    loss = ActivationBoundary("stage1.1", margin=0.5)
    d = Distillation(student, teacher, losses=[loss]).bind(inputs)
    assert not list(loss.parameters())
    with torch.no_grad():
        value = d.eval()(inputs)["ActivationBoundary"]
        torch.testing.assert_close(
            value, activation_boundary(student.stage1[:2](inputs), teacher.eval().stage1[:2](inputs), 0.5)
        )


def test_connectors_learn_are_saved_and_stay_out_of_the_student():
    student, teacher, inputs = SmallCNN(4), SmallCNN(6), images()
    names = list(student.state_dict())
    loss = ActivationBoundary("stage1.1", "stage2.1")
    d = Distillation(student, teacher, losses=[loss]).bind(inputs)
    d(inputs).total.backward()
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 4, 1, 1), (6,), (6,), (12, 8, 1, 1), (12,), (12,)]
    assert all(p.grad is not None for p in loss.parameters())
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in d.parameters()}
    assert student.stage1[0].weight.grad.abs().sum() > 0
    assert student.stage3[0].weight.grad is None, "both forward passes end at the last boundary"
    assert all(p.grad is None for p in teacher.parameters())
    assert list(student.state_dict()) == names
    other = Distillation(copy.deepcopy(student), teacher, losses=[ActivationBoundary("stage1.1", "stage2.1")])
    other.bind(inputs).load_state_dict(d.state_dict())
    torch.testing.assert_close(other.eval()(inputs).total, d.eval()(inputs).total)
    Distillation(student, teacher, losses=[loss]).bind(inputs)
    assert len(loss.connectors) == 2


@pytest.mark.parametrize(("mine", "theirs"), [((8, 6), (4, 6)), ((4, 4), (8, 8))])
def test_the_students_map_is_brought_to_the_teachers_size(bound, mine, theirs):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, *mine), torch.randn(2, 3, *theirs)
    value = bound(ActivationBoundary(), student, teacher)(student, teacher)
    resized = nn.functional.interpolate(student, theirs, mode="area")
    torch.testing.assert_close(value, activation_boundary(resized, teacher))


@pytest.mark.parametrize("shape", [(4,), (7, 4)])
def test_vectors_and_sequences_have_connectors_over_their_channels(bound, shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, *shape).double(), torch.randn(3, *shape[:-1], 6).double()
    loss = ActivationBoundary()
    call = bound(loss, student, teacher)
    loss.eval()
    value = call(student, teacher)
    assert value.dtype == torch.float64
    projected = student @ loss.connectors[0][0].weight[:, :, 0, 0].T / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(value, activation_boundary(projected, teacher))


def test_a_batch_of_one_vector_is_finite(bound):
    student, teacher = torch.randn(3, 4), torch.randn(3, 6)
    loss = ActivationBoundary()
    call = bound(loss, student, teacher)
    assert call(student[:1], teacher[:1]).isfinite()


def test_an_in_place_activation_does_not_hide_the_boundary():
    student, teacher = SmallCNN(4), SmallCNN(4)
    inputs, plain = images(), ActivationBoundary("stage1.2:input")
    expected = Distillation(student, teacher, losses=[plain]).bind(inputs).eval()(inputs).total
    for model in (student, teacher):
        model.stage1[2].inplace = True
    for address in ("stage1.2:input", "stage1.1"):
        d = Distillation(student, teacher, losses=[ActivationBoundary(address)]).bind(inputs).eval()
        torch.testing.assert_close(d(inputs).total, expected)


def test_the_teacher_may_use_the_batchs_statistics():
    inputs, teacher = images(16), SmallCNN(4)
    with torch.no_grad():
        teacher.stage1[1].running_mean.fill_(9.0)  # by the running averages every neuron is off
    options = {"losses": [ActivationBoundary("stage1.1")]}
    running = Distillation(SmallCNN(4), teacher, **options).bind(inputs)
    by_batch = Distillation(SmallCNN(4), Frozen(teacher, batch_statistics=True), **options).bind(inputs)
    off, both = (d.teacher.lessons(d.views(inputs), Record())[0].teacher["stage1.1"] for d in (running, by_batch))
    assert (off > 0).float().mean() < 0.01
    assert 0.3 < (both > 0).float().mean() < 0.7


def test_the_first_stage_carries_the_boundaries_over_to_unseen_samples():
    torch.manual_seed(1)
    kinds = torch.randn(8, 1, 8, 8)

    def batch(classes=2, count=64):
        kind = torch.randint(8, (count,))
        return kinds[kind] + 0.5 * torch.randn(count, 1, 8, 8), kind % classes

    def trained(d, steps, classes=2):
        d.bind(batch(classes))
        optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            d(batch(classes)).total.backward()
            optimizer.step()

    teacher, taught = SmallCNN(4), SmallCNN(4)
    alone, (unseen, _) = copy.deepcopy(taught), batch(count=128)
    trained(Distillation(teacher), 40, classes=8)
    trained(Distillation(taught, teacher, losses=[ActivationBoundary()]), 60)
    trained(Distillation(alone), 60)

    def same_side(student):
        """The part of the neurons of the second stage that are on the teacher's side, images that nobody has seen."""
        with torch.no_grad():
            mine, theirs = (m.stage2[:2](m.pool(m.eval().stage1(unseen))) for m in (student, teacher))
        return ((mine > 0) == (theirs > 0)).float().mean()

    assert same_side(taught) > 0.8 > same_side(alone)
    # and the stage that follows is plain training, from these weights
    before = same_side(taught)
    trained(Distillation(taught.train(), losses=[TaskLoss()]), 5)
    assert same_side(taught) > before - 0.1
