from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import (
    KD,
    Altered,
    AttentionTransfer,
    AveragedEnsemble,
    Cohort,
    DeepMutualLearning,
    Distillation,
    Jacobian,
    TaskLoss,
)
from tutelage.engine import fit
from tutelage.gradients import gradient_shares
from tutelage.knowledge.feature.jacobian import input_gradients, jacobian_matching, matched_scores
from tutelage.models import MLP, SmallCNN
from tutelage.training import Training
from tutelage.views import read_batch


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def smooth(width, classes=3):
    """Curved, so that gradients change with the weights and the inputs, and without batch statistics."""
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, classes))


def bound(loss, student, teacher, inputs):
    return Distillation(student, teacher, losses=[loss]).bind(inputs)


def test_is_the_loop_over_samples():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    terms = [((s / s.norm() - t / t.norm()) ** 2).sum() for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(jacobian_matching(student, teacher), sum(terms) / 3)
    cosine = F.cosine_similarity(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(jacobian_matching(student, teacher), (2 - 2 * cosine).mean())


def test_lengths_do_not_matter_and_opposites_cost_four():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    lengths = torch.rand(3, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(jacobian_matching(lengths * student, teacher), jacobian_matching(student, teacher))
    assert jacobian_matching(-2 * teacher, teacher).item() == pytest.approx(4)
    assert jacobian_matching(torch.zeros(3, 4), torch.ones(3, 4)) == 1


def test_input_gradients_are_finite_differences_of_each_samples_own_score():
    torch.manual_seed(0)
    network = smooth(6).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    found = input_gradients(network(x)[:, 1], x)
    with torch.no_grad():
        for i in range(4):
            for j in range(5):
                step = torch.zeros_like(x)
                step[i, j] = 1e-5
                difference = (network(x + step)[i, 1] - network(x - step)[i, 1]) / 2e-5
                assert found[i, j].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-9)
    assert not found.requires_grad


def test_scores_are_taken_where_the_teachers_maximum_is():
    student, teacher = torch.tensor([[5.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 1.0], [7.0, 1.0]])
    s, t = matched_scores(student, teacher)
    assert (s.tolist(), t.tolist()) == ([1, 2], [1, 7])
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, :, 1, 0] = torch.tensor([-3.0, 4.0])
    mine = torch.arange(12.0).reshape(1, 3, 2, 2)
    s, t = matched_scores(mine, maps)
    assert (s.item(), t.item()) == (2**2 + 6**2 + 10**2, 25)
    tokens = maps.flatten(2).transpose(1, 2)
    s, t = matched_scores(mine.flatten(2).transpose(1, 2), tokens)
    assert (s.item(), t.item()) == (2**2 + 6**2 + 10**2, 25)


def test_the_value_is_that_of_linear_networks_weights():
    """The gradient of a linear network's logit is the row of its weights."""
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(5, 3), nn.Linear(5, 3), torch.randn(8, 5)
    d = bound(Jacobian(), student, teacher, x)
    chosen = teacher(x).argmax(1)
    expected = (F.normalize(student.weight[chosen]) - F.normalize(teacher.weight[chosen])).square().sum(1).mean()
    torch.testing.assert_close(d(x).total, expected)


@pytest.mark.parametrize("taps", [(), ("1",)])
def test_the_gradient_of_the_weights_is_that_of_finite_differences(taps):
    torch.manual_seed(0)
    student, teacher = smooth(4).double(), smooth(4).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    d = bound(Jacobian(*taps), student, teacher, x)
    d(x).total.backward()
    weight = student[0].weight
    for i, j in ((0, 0), (3, 4), (2, 1)):
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight[i, j] += step
            values.append(d(x).total.item())
        with torch.no_grad():
            weight[i, j] += 1e-6
        assert weight.grad[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_a_student_equal_to_its_teacher_costs_nothing():
    torch.manual_seed(0)
    teacher, x = SmallCNN(4).eval(), images()
    d = bound(Jacobian("@logits", "stage3"), copy.deepcopy(teacher), teacher, x).eval()
    losses = d(x)
    losses.total.backward()
    assert losses.total.abs() < 1e-8
    assert max(p.grad.abs().max() for p in d.student.parameters() if p.grad is not None) < 1e-3


def test_double_backward_reaches_the_students_weights_and_nothing_of_the_teacher_or_of_the_users_batch():
    torch.manual_seed(0)
    student, teacher, x = SmallCNN(4), SmallCNN(8), images()
    before = copy.deepcopy(teacher.state_dict())
    d = bound(Jacobian(), student, teacher, x)
    d(x).total.backward()
    for name, parameter in student.named_parameters():
        if name.endswith("weight"):  # a bias behind the last curved layer is in no gradient by the inputs
            assert parameter.grad.abs().sum() > 0, name
    assert student.linear.bias.grad is None
    assert d.skips_parameters
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("taps", [("@logits",), ("stage2",), ("stage2", "@logits")])
def test_networks_with_in_place_activations_give_the_same(taps):
    class InPlace(nn.Module):
        def __init__(self, inplace, width):
            super().__init__()
            torch.manual_seed(width)
            self.stage1 = nn.Sequential(nn.Conv2d(1, width, 3, 2), nn.ReLU(inplace=inplace))
            self.stage2 = nn.Sequential(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width))
            self.relu = nn.ReLU(inplace=inplace)
            self.linear = nn.Linear(width, 5)

        def forward(self, x):
            return self.linear(self.relu(self.stage2(self.stage1(x))).mean((2, 3)))

    gradients = []
    for inplace in (False, True):
        student = InPlace(inplace, 4)
        d = bound(Jacobian(*taps), student, InPlace(inplace, 6), images())
        losses = d(images())
        losses.total.backward()
        gradients.append([losses.total.detach(), *(p.grad for p in student.parameters() if p.grad is not None)])
    torch.testing.assert_close(*gradients)
    assert all(g.abs().sum() > 0 for g in gradients[0][:2])


def test_maps_of_different_sizes_meet_at_the_smaller_and_several_layers_are_summed():
    torch.manual_seed(0)
    student, teacher, x = SmallCNN(4), SmallCNN(8), images()
    both = Jacobian(("stage2", "stage3"), "stage1")
    one, other = Jacobian(("stage2", "stage3"), name="one"), Jacobian("stage1", name="other")
    losses = Distillation(student, teacher, losses=[both, one, other])(x)
    torch.testing.assert_close(losses["Jacobian"], losses["one"] + losses["other"])


def test_an_epoch_in_accumulated_batches_is_the_epoch_in_whole_ones_and_evaluation_keeps_nothing():
    def trained(parts, accumulate):
        torch.manual_seed(0)
        student, teacher = MLP(5, (12,), 3), MLP(5, (8,), 3)
        data = [(torch.randn(8, 5), torch.arange(8) % 3) for _ in range(4)]
        if parts == 2:
            data = [(x[i : i + 4], y[i : i + 4]) for x, y in data for i in (0, 4)]
        d = Distillation(student, teacher, losses=[TaskLoss(), KD(), Jacobian()])
        training = Training(epochs=2, accumulate=accumulate, lr=0.1, progress=False, gradient_shares=True)
        run = fit(d, data, data, training=training)
        assert all(p.grad is None for p in teacher.parameters())
        assert not any(x.requires_grad for x, _ in data)
        assert run.history[0].metrics["accuracy"] >= 0
        assert run.history[0].losses["Jacobian"] > 0
        assert run.history[0].shares["Jacobian"] > 0
        return [p.detach() for p in student.parameters()]

    torch.testing.assert_close(trained(1, 1), trained(2, 2))


def test_it_trains_images_in_channels_last_and_bfloat16():
    torch.manual_seed(0)
    data = [(images(8, seed), torch.arange(8) % 10) for seed in range(2)]
    d = Distillation(SmallCNN(4), SmallCNN(8), losses=[TaskLoss(), AttentionTransfer("stage3"), Jacobian()])
    run = fit(d, data, training=Training(epochs=1, channels_last=True, precision="bf16", progress=False))
    assert 0 < run.history[0].losses["Jacobian"] < 4


def test_without_gradients_it_has_its_value_and_no_graph():
    torch.manual_seed(0)
    student, teacher, x = smooth(4), smooth(6), torch.randn(4, 5)
    d = Distillation(student, teacher, losses=[KD(), Jacobian()]).bind(x)
    with torch.no_grad():
        quiet = d(x)
    assert not quiet.total.requires_grad
    torch.testing.assert_close(quiet.total, d(x).total.detach())
    shares = gradient_shares(d, x)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_step_leaves_no_graph_behind():
    torch.manual_seed(0)
    student, teacher, x = smooth(4), smooth(6), torch.randn(4, 5)
    d = bound(Jacobian(), student, teacher, x)
    outputs = []
    for model in (student, teacher):
        model.register_forward_hook(lambda *given: outputs.append(weakref.ref(given[-1])))
    d(x).total.backward()
    gc.collect()
    assert len(outputs) == 2
    assert all(output() is None for output in outputs)


def test_an_ensemble_is_differentiated_as_one_teacher():
    torch.manual_seed(0)
    members = [nn.Linear(5, 3), nn.Linear(5, 3)]
    student, x = nn.Linear(5, 3), torch.randn(4, 5)
    d = bound(Jacobian(), student, AveragedEnsemble(members), x)
    mean = (members[0].weight + members[1].weight) / 2
    chosen = ((members[0](x) + members[1](x)) / 2).argmax(1)
    expected = (F.normalize(student.weight[chosen]) - F.normalize(mean[chosen])).square().sum(1).mean()
    torch.testing.assert_close(d(x).total, expected)


def test_inputs_by_name_and_further_integer_inputs():
    class Named(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.net = nn.Embedding(3, 5), smooth(width)

        def forward(self, kind, x):
            return self.net(x + self.embed(kind))

    torch.manual_seed(0)
    batch = {"kind": torch.tensor([0, 1, 2]), "x": torch.randn(3, 5)}
    d = bound(Jacobian(), Named(4), Named(6), batch)
    d(batch).total.backward()
    assert d.student.net[0].weight.grad.abs().sum() > 0


def test_float64_stays_float64_and_a_batch_of_one_is_finite():
    d = bound(Jacobian(), smooth(4).double(), smooth(6).double(), torch.randn(4, 5).double())
    one = d(torch.randn(1, 5).double())
    assert one.total.dtype == torch.float64
    assert one.total.isfinite()


def test_a_student_that_ignores_its_input_costs_one_and_has_a_finite_gradient():
    student = smooth(4)
    nn.init.zeros_(student[2].weight)
    x = torch.randn(4, 5)
    d = bound(Jacobian(), student, smooth(6), x)
    losses = d(x)
    losses.total.backward()
    assert losses.total == 1
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_what_cannot_be_differentiated_or_compared_is_refused_by_name():
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"Jacobian: the inputs of the student are torch.int64, such as token ids"):
        bound(Jacobian(), words, copy.deepcopy(words), torch.randint(9, (4, 3)))
    wider = Altered(teacher=lambda x: torch.cat([x, x], 1))
    d = Distillation(nn.Linear(5, 3), nn.Linear(10, 3), losses=[Jacobian()], views=wider)
    with pytest.raises(ValueError, match=r"student sees inputs \(4, 5\) and the teacher \(4, 10\)"):
        d.bind(torch.randn(4, 5))
    with pytest.raises(ValueError, match="student has 3 and the teacher 4 classes"):
        bound(Jacobian(), smooth(4), smooth(4, 4), torch.randn(4, 5))
    dense = nn.Conv2d(1, 3, 3)
    with pytest.raises(ValueError, match=r"expected \(B, K\), one answer for each sample"):
        bound(Jacobian(), dense, copy.deepcopy(dense), images())
    with pytest.raises(ValueError, match="expected two vectors"):
        matched_scores(torch.ones(2, 3), torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="gradients differ in shape"):
        jacobian_matching(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="have no gradient with respect to the inputs"):
        input_gradients(torch.ones(2), torch.ones(2, 3))
    cohort = Cohort([smooth(4), smooth(5)])
    with pytest.raises(ValueError, match="keeps no graph; expected a network of its own"):
        Distillation(cohort, DeepMutualLearning(), losses=[Jacobian()]).bind(torch.randn(4, 5))
    blind = nn.Sequential(smooth(4), nn.LayerNorm(3))
    blind[0].register_forward_hook(lambda module, given, output: output.detach().requires_grad_())
    with pytest.raises(ValueError, match="a network that reads them"):
        bound(Jacobian(), smooth(4), blind, torch.randn(4, 5))


def test_only_a_distillation_that_needs_it_gives_inputs_that_require_gradients():
    seen = []

    class Watched(KD):
        def forward(self, student, teacher, batch):
            seen.append((batch.student.tensors()[0].requires_grad, teacher.logits.requires_grad))
            return super().forward(student, teacher, batch)

    x = torch.randn(4, 5)
    Distillation(smooth(4), smooth(6), losses=[Watched()]).bind(x)(x)
    assert not any(any(pair) for pair in seen)
    Distillation(smooth(4), smooth(6), losses=[Watched(), Jacobian()]).bind(x)(x)
    assert seen[-1] == (True, True)
    assert not read_batch(x).differentiable


def test_on_unseen_samples_the_students_gradients_turn_to_the_teachers():
    torch.manual_seed(0)
    teacher = smooth(32)
    inputs, fresh = torch.randn(128, 5), torch.randn(128, 5)

    def angle(*losses):
        torch.manual_seed(1)
        d = Distillation(smooth(12), teacher, losses=[KD(), *losses]).bind(inputs)
        optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            d(inputs).total.backward()
            optimizer.step()
        judge = Distillation(d.student, teacher, losses=[Jacobian()]).bind(fresh)
        with torch.no_grad():
            return judge(fresh)["Jacobian"].item()

    assert angle(Jacobian()) < 0.6 * angle()
