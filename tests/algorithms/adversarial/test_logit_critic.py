from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, TaskLoss
from tutelage.algorithms.adversarial.logit_critic import LogitCritic, critic_term, fooling_term
from tutelage.record import Record
from tutelage.views import read_batch


def networks(seed: int = 0):
    torch.manual_seed(seed)
    return nn.Linear(6, 3), nn.Linear(6, 3)


def batch(n: int = 16):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def bound(student, teacher, x, **kwargs) -> tuple[Distillation, LogitCritic]:
    loss = LogitCritic(**kwargs)
    return Distillation(student, teacher, losses=[loss]).bind(x), loss


def weights(loss: LogitCritic) -> list[torch.Tensor]:
    return [p.detach().clone() for p in loss.critic.module.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_both_terms_equal_their_probabilities():
    torch.manual_seed(0)
    s, t, y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, -100])
    real_s, real_t = s[:, 0].sigmoid(), t[:, 0].sigmoid()
    torch.testing.assert_close(critic_term(s, t), -real_t.log().mean() - (1 - real_s).log().mean())
    torch.testing.assert_close(fooling_term(s), -real_s.log().mean())
    ce_s, ce_t = (F.cross_entropy(z[:4, 1:], y[:4]) for z in (s, t))
    torch.testing.assert_close(critic_term(s, t, y), critic_term(s, t) + ce_s + ce_t)
    torch.testing.assert_close(fooling_term(s, y), fooling_term(s) + ce_s)
    assert fooling_term(torch.tensor([[-500.0]])) == 500
    assert critic_term(torch.tensor([[500.0]]), torch.tensor([[-500.0]])) == 1000
    assert fooling_term(s.double(), y).dtype == torch.float64


def test_the_critic_is_beside_the_student_and_not_in_it():
    student, teacher = networks()
    d, loss = bound(student, teacher, batch())
    mine = {id(p) for p in loss.critic.module.parameters()}
    assert not mine & {id(p) for p in d.parameters()}
    assert len(list(d.parameters())) == 2
    assert d.side_learners() == {"LogitCritic.critic": loss.critic}
    assert not any("critic" in k for k in d.state_dict())


def test_the_students_gradient_goes_to_the_student_only():
    student, teacher = networks()
    d, loss = bound(student, teacher, batch())
    before = weights(loss)
    total = d(batch()).total
    after = weights(loss)
    total.backward()
    assert not same(before, after)
    assert same(after, weights(loss))
    assert all(p.grad is None for p in loss.critic.module.parameters())
    assert teacher.weight.grad is None
    assert torch.isfinite(student.weight.grad).all()
    assert student.weight.grad.abs().sum() > 0


def test_the_students_term_is_the_updated_critics():
    student, teacher = networks()
    x, y = batch()
    d, loss = bound(student, teacher, (x, y))
    value = d((x, y))["LogitCritic"]
    torch.testing.assert_close(value, fooling_term(loss.critic(student(x)), y))


def test_the_critics_update_equals_a_naive_step_on_detached_logits():
    student, teacher = networks()
    x, y = batch()
    d, loss = bound(student, teacher, (x, y), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    naive = copy.deepcopy(loss.critic.module)
    critic_term(naive(student(x).detach()), naive(teacher(x)), y).backward()
    expected = [p - 0.1 * p.grad for p in naive.parameters()]
    d((x, y))
    for p, e in zip(loss.critic.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e)


def test_nothing_changes_in_eval_mode_or_without_gradients_or_when_binding():
    student, teacher = networks()
    d, loss = bound(student, teacher, batch())
    before = weights(loss)
    assert not loss.critic.optimizer.state
    with torch.no_grad():
        d(batch())
    d.eval()
    d(batch()).total.backward()
    assert same(before, weights(loss))
    assert not loss.critic.optimizer.state
    d.train()
    d(batch())
    assert not same(before, weights(loss))


def test_two_calls_before_one_backward_pass():
    student, teacher = networks()
    d, _ = bound(student, teacher, batch())
    (d(batch()).total + d(batch()).total).backward()
    assert torch.isfinite(student.weight.grad).all()


def test_the_critic_tells_fixed_distributions_apart_and_not_equal_ones():
    def trained(shift: float) -> float:
        g = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        loss = LogitCritic(conditional=False, hidden=32, lr=1e-2)
        for step in range(80):
            s, t = torch.randn(128, 3, generator=g) + shift, torch.randn(128, 3, generator=g)
            rows, raw = (Record(s), Record(t)), read_batch((s,))
            if step == 0:
                loss.resolve(nn.Identity(), nn.Identity(), raw)
                loss.build(*rows, raw)
            loss(*rows, raw)
        s, t = torch.randn(2000, 3, generator=g) + shift, torch.randn(2000, 3, generator=g)
        with torch.no_grad():
            return float(critic_term(loss.critic(s), loss.critic(t)))

    assert trained(shift=3.0) < 0.2
    assert trained(shift=0.0) == pytest.approx(2 * math.log(2), abs=0.1)


def test_own_state_comes_back():
    x = batch()
    student, teacher = networks()
    d, loss = bound(student, teacher, x)
    for _ in range(3):
        d(x)
    again, other = bound(*networks(seed=9), x)
    assert not same(weights(loss), weights(other))
    state = {name: learner.own_state() for name, learner in d.side_learners().items()}
    for name, learner in again.side_learners().items():
        learner.load_own_state(copy.deepcopy(state[name]))
    assert same(weights(loss), weights(other))
    again.student.load_state_dict(student.state_dict())
    again.teacher.module.load_state_dict(teacher.state_dict())
    d(x)
    again(x)
    assert same(weights(loss), weights(other))


@pytest.mark.parametrize("conditional", [False, True])
def test_the_students_logits_move_to_the_teachers_distribution(conditional):
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    with torch.no_grad():
        teacher.bias.copy_(torch.tensor([2.0, -2.0, 1.0]))
    x = torch.randn(256, 6)
    y = teacher(x).argmax(1)

    def distance() -> float:
        with torch.no_grad():
            s, t = student(x), teacher(x)
        return float((s.mean(0) - t.mean(0)).norm() + (s.std(0) - t.std(0)).norm())

    d, _ = bound(student, teacher, (x, y), conditional=conditional, hidden=32, lr=5e-3)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02, betas=(0.5, 0.999))
    start = distance()
    for _ in range(200):
        optimizer.zero_grad()
        d((x, y)).total.backward()
        optimizer.step()
    assert distance() < 0.4 * start


@pytest.mark.parametrize("shape", [(1, 3), (4, 3), (2, 5, 3), (2, 3, 4, 4)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 500.0])
def test_finite_for_every_shape_and_size_of_logits(shape, scale):
    torch.manual_seed(0)
    s, t = scale * torch.randn(shape), scale * torch.randn(shape)
    s.requires_grad_()
    positions = shape[:1] if len(shape) == 2 else shape[:2] if len(shape) == 3 else (shape[0], *shape[2:])
    labels = torch.zeros(positions, dtype=torch.long)
    loss, raw = LogitCritic(), read_batch((s, labels))
    loss.resolve(nn.Identity(), nn.Identity(), raw)
    loss.build(Record(s), Record(t), raw)
    value = loss(Record(s), Record(t), raw)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()
    assert all(torch.isfinite(p).all() for p in loss.critic.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    s = torch.randn(4, 3).to(dtype).requires_grad_()
    loss, raw = LogitCritic(conditional=False), read_batch((s,))
    loss.resolve(nn.Identity(), nn.Identity(), raw)
    loss.build(Record(s), Record(s.detach()), raw)
    value = loss(Record(s), Record(torch.randn(4, 3)), raw)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert s.grad.dtype == dtype


def test_the_order_of_the_batch_does_not_matter():
    student, teacher = networks()
    x, y = batch()
    d, _ = bound(student, teacher, (x, y))
    d.eval()
    order = torch.randperm(len(x))
    torch.testing.assert_close(d((x, y)).total, d((x[order], y[order])).total)


def test_wrong_use_is_refused_by_name():
    student, teacher = networks()
    x, _ = batch()
    with pytest.raises(ValueError, match="LogitCritic needs labels"):
        Distillation(student, teacher, losses=[LogitCritic()]).bind(x)
    Distillation(student, teacher, losses=[LogitCritic(conditional=False)]).bind(x)
    with pytest.raises(ValueError, match="classes"):
        Distillation(student, nn.Linear(6, 4), losses=[LogitCritic(), TaskLoss()]).bind(batch())
    with pytest.raises(ValueError, match="one pair"):
        Distillation(student, teacher, losses=[LogitCritic("@logits", "@logits")]).bind(batch())
    with pytest.raises(ValueError, match="hidden=0"):
        LogitCritic(hidden=0)
