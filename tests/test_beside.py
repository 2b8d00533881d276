from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import Distillation, Loss, TaskLoss
from tutelage.beside import SideLearner


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.fixture
def critic() -> SideLearner:
    torch.manual_seed(0)
    return SideLearner(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), adam)


class Adversary(Loss):
    """The critic learns to tell teacher from student, and the student to deceive it."""

    def build(self, student, teacher, batch):
        self.critic = SideLearner(nn.Linear(student.logits.shape[1], 1), adam)

    def forward(self, student, teacher, batch):
        if self.training:
            self.critic.update((self.critic(student.logits.detach()) - self.critic(teacher.logits)).mean())
        return -self.critic(student.logits).mean()


def test_it_is_no_part_of_its_owner(critic):
    owner = nn.Module()
    owner.critic = critic
    assert list(owner.parameters()) == []
    assert list(owner.buffers()) == []
    assert owner.state_dict() == {}
    assert critic.module not in list(owner.modules())


def test_an_update_descends_and_reaches_nothing_else(critic):
    student = nn.Linear(2, 3)
    x = torch.randn(16, 2)
    first = critic(student(x)).mean().item()
    for _ in range(20):
        critic.update(critic(student(x)).mean())
    assert critic(student(x)).mean().item() < first
    assert student.weight.grad is None
    assert all(p.grad is None for p in critic.module.parameters())


def test_an_update_is_one_step_of_its_optimiser(critic):
    twin = copy.deepcopy(critic.module)
    optimizer = adam(twin.parameters())
    x = torch.randn(8, 3)
    for _ in range(3):
        critic.update(critic(x).pow(2).mean())
        twin(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(critic.module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_update_only_moves_what_requires_a_gradient(critic):
    critic.module[0].requires_grad_(False)
    frozen = critic.module[0].weight.clone()
    moving = critic.module[2].weight.clone()
    critic.update(critic(torch.randn(8, 3)).mean())
    assert torch.equal(critic.module[0].weight, frozen)
    assert not torch.equal(critic.module[2].weight, moving)


def test_it_follows_its_owners_mode_and_dtype(critic):
    owner = nn.Sequential(critic)
    owner.eval()
    assert not any(m.training for m in critic.module.modules())
    owner.train()
    assert all(m.training for m in critic.module.modules())
    critic.update(critic(torch.randn(8, 3)).mean())
    owner.double()
    assert all(p.dtype == torch.float64 for p in critic.module.parameters())
    critic.update(critic(torch.randn(8, 3, dtype=torch.float64)).mean())
    moments = [v for s in critic.optimizer.state.values() for v in s.values() if v.ndim]
    assert moments
    assert all(m.dtype == torch.float64 for m in moments)


def test_its_state_resumes_exactly(critic):
    x = torch.randn(8, 3)
    critic.update(critic(x).mean())
    saved = copy.deepcopy(critic.own_state())
    critic.update(critic(x).mean())
    torch.manual_seed(1)
    other = SideLearner(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), adam)
    other.load_own_state(saved)
    other.update(other(x).mean())
    for a, b in zip(other.module.state_dict().values(), critic.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_learns_by_itself(critic):
    other = copy.deepcopy(critic)
    before = critic.module[0].weight.clone()
    other.update(other(torch.randn(8, 3)).mean())
    assert torch.equal(critic.module[0].weight, before)
    assert not torch.equal(other.module[0].weight, before)


def test_inside_a_distillation_it_learns_beside_the_student():
    torch.manual_seed(0)
    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))
    d = Distillation(nn.Linear(4, 3), nn.Linear(4, 3), [TaskLoss(), Adversary()]).bind(batch)
    assert list(d.side_learners()) == ["Adversary.critic"]
    critic = d.side_learners()["Adversary.critic"]
    assert {id(p) for p in d.parameters()} == {id(p) for p in d.student.parameters()}
    before = critic.module.weight.clone()
    d.eval()
    d(batch)
    assert torch.equal(critic.module.weight, before), "in eval mode it does not learn"
    d.train()
    d(batch).total.backward()
    assert not torch.equal(critic.module.weight, before)
    assert d.student.weight.grad is not None
    assert critic.module.weight.grad is not None, "what deceives the critic passes through it"
    d.to(torch.float64)
    assert critic.module.weight.dtype == torch.float64
