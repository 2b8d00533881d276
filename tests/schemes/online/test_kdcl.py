from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, KDCL, RKD, AttentionTransfer, Cohort, Distillation, FitNets, TaskLoss, Training
from tutelage.data.loaders import Loaders
from tutelage.engine import fit
from tutelage.functional import error_correlation, general_weights, linear_weights, min_logit, naive_weights
from tutelage.models import MLP, SmallCNN

RULES = ("naive", "linear", "min_logit")


def peers(count: int, samples: int = 30, classes: int = 5, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(samples, classes, generator=g) for _ in range(count)]
    return logits, torch.randint(0, classes, (samples,), generator=g)


def loss(weights, logits, labels):
    return F.cross_entropy(torch.einsum("nm,mnc->nc", weights, torch.stack(logits)), labels, reduction="none")


def cohort(count: int = 2, seed: int = 0) -> Cohort:
    torch.manual_seed(seed)
    return Cohort([MLP(6, (4 + 3 * i,), 3) for i in range(count)])


def batch(n: int = 9):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def test_naive_takes_each_samples_best_peer():
    logits, labels = peers(3)
    weights = naive_weights(logits, labels)
    for n, label in enumerate(labels):
        costs = [float(F.cross_entropy(z[n : n + 1], label[None])) for z in logits]
        assert weights[n].tolist() == [float(c == min(costs)) for c in costs]


@pytest.mark.parametrize("count", [2, 3])
def test_linear_is_as_good_as_a_grid(count):
    logits, labels = peers(count)
    weights = linear_weights(logits, labels)
    torch.testing.assert_close(weights.sum(1), torch.ones(30))
    assert weights.min() >= 0
    mine, steps = loss(weights, logits, labels), 60
    for i in range(steps + 1):
        for j in range(steps + 1 - i) if count == 3 else [steps - i]:
            point = [i, j, steps - i - j][:count]
            assert (mine <= loss(torch.tensor(point).expand(30, -1) / steps, logits, labels) + 1e-5).all()
    inside = ((weights > 0.01) & (weights < 0.99)).any(1)
    assert 0 < inside.sum() < 30  # both kinds of answers were looked at


def test_min_logit_equals_its_loop_and_is_never_worse_than_the_best_peer():
    logits, labels = peers(3)
    target = min_logit(logits, labels)
    for n, y in enumerate(labels):
        for c in range(5):
            assert target[n, c] == min(z[n, c] - z[n, y] for z in logits)
    costs = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    assert (F.cross_entropy(target, labels, reduction="none") <= costs.amin(0) + 1e-6).all()
    assert (loss(linear_weights(logits, labels), logits, labels) <= costs.amin(0) + 1e-5).all()


def test_rules_do_not_depend_on_the_order_of_peers_or_on_a_constant_in_their_logits():
    logits, labels = peers(3)
    turned = [logits[i] for i in (2, 0, 1)]
    moved = [z + 7 for z in logits]
    for weigh in (naive_weights, linear_weights):
        torch.testing.assert_close(weigh(turned, labels), weigh(logits, labels)[:, [2, 0, 1]], atol=1e-3, rtol=0)
        torch.testing.assert_close(weigh(moved, labels), weigh(logits, labels), atol=1e-3, rtol=0)
    torch.testing.assert_close(min_logit(turned, labels), min_logit(logits, labels))
    torch.testing.assert_close(min_logit(moved, labels), min_logit(logits, labels), atol=1e-5, rtol=0)


def test_degenerate_logits_and_samples_without_a_label():
    same, big = [torch.ones(2, 3)] * 3, [torch.tensor([[500.0, -500.0, 0.0]]), torch.tensor([[-500.0, 500.0, 0.0]])]
    torch.testing.assert_close(linear_weights(same, torch.tensor([0, 1])), torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(linear_weights(big, torch.tensor([2])), torch.tensor([[0.5, 0.5]]))
    assert torch.isfinite(min_logit(big, torch.tensor([2]))).all()
    logits, labels = peers(2)
    labels[4] = -100
    for weigh in (naive_weights, linear_weights):
        assert weigh(logits, labels)[4].tolist() == [0.5, 0.5]
    torch.testing.assert_close(min_logit(logits, labels)[4].softmax(0), ((logits[0] + logits[1]) / 2)[4].softmax(0))
    kept = [i for i in range(30) if i != 4]
    torch.testing.assert_close(
        error_correlation(logits, labels), error_correlation([z[kept] for z in logits], labels[kept])
    )
    soft = F.one_hot(labels.clamp(min=0), 5).float()
    for rule in (naive_weights, linear_weights, min_logit):  # labels as probabilities
        torch.testing.assert_close(rule(logits, soft)[kept], rule(logits, labels)[kept])
    half = min_logit([z.half() for z in logits], labels)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="labels: 29"):
        min_logit(logits, labels[:29])


def test_error_correlation_equals_its_loop():
    logits, labels = peers(3, samples=7)
    c = error_correlation(logits, labels)
    for i in range(3):
        for j in range(3):
            errors = [z.softmax(1) - F.one_hot(labels, 5) for z in (logits[i], logits[j])]
            assert float(c[i, j]) == pytest.approx(float((errors[0] * errors[1]).sum(1).mean()), rel=1e-5)


def test_general_weights_are_the_closed_form_and_the_smallest_error():
    torch.testing.assert_close(general_weights(torch.eye(4)), torch.full((4,), 0.25))
    torch.testing.assert_close(general_weights(torch.ones(3, 3)), torch.full((3,), 1 / 3))  # the same peer thrice
    variances = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(
        general_weights(variances.diag()), (1 / variances) / (1 / variances).sum(), rtol=1e-4, atol=0
    )
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 3, generator=g, dtype=torch.float64)
    c = torch.eye(3) + 0.2 * a @ a.T
    w = general_weights(c)
    inverse = torch.linalg.inv(c)
    torch.testing.assert_close(w, inverse.sum(1) / inverse.sum(), rtol=1e-4, atol=1e-5)
    for other in torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((500,)):
        assert w @ c @ w <= other @ c @ other + 1e-6
    dominated = torch.tensor([[1.0, 1.5], [1.5, 4.0]])  # unbounded, the weights are 1.25 and -0.25
    torch.testing.assert_close(general_weights(dominated), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("rule", RULES)
def test_total_and_gradients_equal_the_naive_formula(rule):
    c, (x, y) = cohort(3), batch()
    naive, teacher = copy.deepcopy(c), KDCL(rule)
    total = Distillation(c, teacher, losses=teacher.losses(temperature=2.0, weight=1.5))((x, y)).total
    total.backward()
    said = [peer(x) for peer in naive.peers]
    logits = [z.detach() for z in said]
    if rule == "min_logit":
        target = min_logit(logits, y)
    else:
        weights = {"naive": naive_weights, "linear": linear_weights}[rule](logits, y)
        target = sum(weights[:, m, None] * z for m, z in enumerate(logits))
    p = (target / 2).softmax(1)
    expected = sum(
        F.cross_entropy(z, y) + 1.5 * 4 * F.kl_div((z / 2).log_softmax(1), p, reduction="batchmean") for z in said
    )
    expected.backward()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(c.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("rule", RULES)
def test_any_losses_stand_beside_it_and_each_peer_runs_once(rule):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 28, 28), torch.arange(6) % 3
    c = Cohort([SmallCNN(width=4), SmallCNN(width=4)])
    losses = [TaskLoss(), KD(), AttentionTransfer("stage2"), FitNets("stage3"), RKD("linear:input")]
    d = Distillation(c, KDCL(rule), losses).bind((images, labels))
    calls = [0, 0]
    for i, peer in enumerate(c.peers):
        peer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    said = d((images, labels))
    said.total.backward()
    assert calls == [1, 1]
    assert all(torch.isfinite(v) for v in said.values.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in d.parameters())


def test_features_are_weighted_as_logits_are():
    c, (x, y) = cohort(2), batch()
    c.peers[1] = MLP(6, (4,), 3)  # features of one width have a mean
    teacher = KDCL("naive")
    d = Distillation(c, teacher, [KD(), FitNets("hidden.0")]).bind((x, y))
    seen = d.views((x, y))
    lessons = teacher.lessons(seen, d.observer(seen.student))
    weights = naive_weights([peer(x) for peer in c.peers], y)
    features = [peer.hidden(x) for peer in c.peers]
    expected = weights[:, :1] * features[0] + weights[:, 1:] * features[1]
    assert len(lessons) == 2
    for lesson in lessons:
        torch.testing.assert_close(lesson.teacher["hidden.0"], expected)
        assert not lesson.teacher.logits.requires_grad
        assert lesson.student.logits.requires_grad


def test_dense_outputs_have_a_target_at_each_position():
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 4, 4), torch.randint(0, 5, (3, 4, 4))
    c = Cohort([nn.Conv2d(2, 5, 1), nn.Conv2d(2, 5, 1)])
    teacher = KDCL("min_logit")
    d = Distillation(c, teacher, teacher.losses()).bind((x, y))
    target = teacher.lessons(d.views((x, y)), d.observer(d.views((x, y)).student))[0].teacher.logits
    said = [peer(x)[1, :, 2, 3].detach() for peer in c.peers]
    expected = torch.stack([z - z[y[1, 2, 3]] for z in said]).amin(0)
    torch.testing.assert_close(target[1, :, 2, 3], expected)


class Shuffled:
    """Validation batches whose loader draws random numbers, and which counts how often it is read."""

    def __init__(self):
        self.times = 0
        g = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(40, 6, generator=g), torch.randint(0, 3, (40,), generator=g)

    def __iter__(self):
        self.times += 1
        order = torch.randperm(40)
        for part in order.split(13):
            yield self.x[part], self.y[part]


def test_general_measures_on_validation_data_as_often_as_it_is_asked():
    c, data = cohort(2), Shuffled()
    teacher = KDCL("general", data, measurements=2)
    d = Distillation(c, teacher, teacher.losses()).bind(batch())
    assert data.times == 1
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    for progress, times in ((0.0, 1), (0.3, 1), (0.5, 2), (0.9, 2)):
        d.progress = progress
        torch.manual_seed(5)
        d(batch()).total.backward()
        assert torch.equal(torch.rand(1), expected_draw)
        assert data.times == times
    with torch.no_grad():
        said = [peer(data.x) for peer in c.peers]
    torch.testing.assert_close(teacher.weights, general_weights(error_correlation(said, data.y)))
    assert c.training
    again = KDCL("general", data, measurements=2)
    Distillation(cohort(2, seed=4), again, again.losses()).bind(batch())
    again.load_own_state(teacher.own_state())
    assert torch.equal(again.weights, teacher.weights)
    loaders = Loaders([], [(data.x, data.y)])
    assert KDCL("general", loaders).validation is loaders.validation


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", RULES)
def test_peers_come_to_their_common_target_which_is_right_as_often_as_the_best(rule, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] + 0.5 * torch.randn(64, generator=g) > 0.5).long()

    def distance(losses) -> float:
        c, teacher = cohort(2, seed), KDCL(rule)
        d = Distillation(c, teacher, losses).bind((x, y))
        optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            d((x, y)).total.backward()
            optimizer.step()
        d = Distillation(c, teacher, [KD(temperature=2.0, weight=1.0)]).bind((x, y))
        with torch.no_grad():
            target = teacher.lessons(d.views((x, y)), d.observer(d.views((x, y)).student))[0].teacher.logits
            best = max(float((peer(x).argmax(1) == y).float().mean()) for peer in c.peers)
            assert float((target.argmax(1) == y).float().mean()) >= best
            return float(d((x, y))["KD"])

    assert distance(KDCL(rule).losses()) < 0.85 * distance([TaskLoss()])


def test_resuming_is_exact(tmp_path):
    x, y = batch(32)
    data = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)]

    def trained(out, stop=None, **how):
        teacher = KDCL("general", Shuffled(), measurements=3)
        d = Distillation(cohort(2), teacher, teacher.losses())
        settings = Training(epochs=4, accumulate=2, progress=False, cpu=True, lr=0.1)
        return fit(d, data, training=settings, out=out, after_epoch=stop, **how).last

    def stop(line):
        if line.epoch == 1:
            raise InterruptedError

    whole = trained(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained(tmp_path / "parts", stop)
    parts = trained(tmp_path / "parts", resume=True)
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match="rule='best'"):
        KDCL("best")
    with pytest.raises(ValueError, match="expected validation data"):
        KDCL("general")
    with pytest.raises(ValueError, match="no other rule"):
        KDCL("linear", [batch()])
    with pytest.raises(ValueError, match="measurements=0"):
        KDCL("general", [batch()], measurements=0)
    with pytest.raises(TypeError, match="KDCL teaches a tutelage Cohort, got MLP"):
        Distillation(MLP(6, (4,), 3), KDCL(), [KD()]).bind(batch())
    with pytest.raises(ValueError, match="same classes"):
        Distillation(Cohort([MLP(6, (4,), 3), MLP(6, (4,), 4)]), KDCL(), [KD()]).bind(batch())
    with pytest.raises(ValueError, match="needs labels"):
        Distillation(cohort(), KDCL(), [KD()]).bind(batch()[0])
    with pytest.raises(ValueError, match="no batch"):
        Distillation(cohort(), KDCL("general", []), [KD()]).bind(batch())
    with pytest.raises(ValueError, match="have no labels"):
        Distillation(cohort(), KDCL("general", [batch()[0]]), [KD()]).bind(batch())
