from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Branches, Cohort, Distillation, DiversePeers, FitNets, OKDDip, TaskLoss, evaluate
from tutelage.functional import attended_divergence, kd_divergence, peer_attention
from tutelage.models import MLP
from tutelage.schemes.online.okddip import AttendedKD


def peers(n=4, seed=0, **options) -> DiversePeers:
    torch.manual_seed(seed)
    return DiversePeers(Cohort([MLP(6, (16,), 3) for _ in range(n)]), (6,), **options)


def batch(n=7):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def bound(student, losses=None):
    d = Distillation(student, OKDDip(), losses=losses or OKDDip().losses()).bind(batch())
    d.progress = 1.0
    return d


def kl(target, mine, t=3.0):
    p, log_q = (target / t).softmax(1), (mine / t).log_softmax(1)
    return t * t * (p * (p.log() - log_q)).sum(1).mean()


def test_total_and_gradients_equal_the_naive_loops():
    student = peers()
    naive = copy.deepcopy(student)
    x, y = batch()
    said = bound(student)((x, y))
    said.total.backward()

    hidden = [p.hidden(x) for p in naive.peers]
    logits = [p.linear(h) for p, h in zip(naive.peers, hidden, strict=True)]
    total = F.cross_entropy(logits[0], y) + kl(sum(logits[1:]) / 3, logits[0])
    for a in (1, 2, 3):
        energy = [(naive.query(hidden[a]) * naive.key(hidden[b])).sum(1) for b in (1, 2, 3)]
        alpha = torch.stack(energy, 1).softmax(1)
        target = sum(alpha[:, b - 1 : b] * logits[b] for b in (1, 2, 3))
        total = total + F.cross_entropy(logits[a], y) + kl(target, logits[a])
    total.backward()
    torch.testing.assert_close(said.total, total)
    for (name, mine), theirs in zip(student.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_who_gets_a_gradient_from_whose_target():
    def gradients(detach, losses):
        student = peers(detach=detach)
        d = bound(student, losses)
        # only the leader's lesson: what reaches the others came through its target
        lessons = d.teacher.lessons
        d.teacher.lessons = lambda *given: [lesson for lesson in lessons(*given) if lesson.key == "leader"]
        d(batch()).total.backward()
        return [
            None if p.linear.weight.grad is None else float(p.linear.weight.grad.abs().sum()) for p in student.peers
        ]

    as_published = gradients(False, [AttendedKD()])
    assert all(g > 0 for g in as_published)
    for fixed in (gradients(True, [AttendedKD()]), gradients(False, [KD()])):
        assert fixed[0] > 0
        assert fixed[1:] == [None, None, None]


@pytest.mark.parametrize("detach", [False, True])
def test_the_attention_learns_by_the_methods_own_loss_alone(detach):
    for losses, learns in (([AttendedKD()], True), ([TaskLoss(), KD(), FitNets("linear:input")], False)):
        student = peers(detach=detach)
        bound(student, losses)(batch()).total.backward()
        for layer in (student.query, student.key):
            assert (layer.weight.grad is not None and bool(layer.weight.grad.abs().sum() > 0)) == learns


def test_detached_only_the_learner_learns_from_its_target():
    """With detach the published loss is KD for the peers: the same gradients as with KD in its place."""
    own, plain = peers(detach=True), peers(detach=True)
    bound(own, [AttendedKD()])(batch()).total.backward()
    bound(plain, [KD(temperature=3.0, weight=1.0)])(batch()).total.backward()
    for mine, theirs in zip(own.peers.parameters(), plain.peers.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_attention_is_a_distribution_and_not_symmetric():
    torch.manual_seed(0)
    q, k = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    attention = peer_attention(q, k)
    torch.testing.assert_close(attention.sum(2), torch.ones(5, 3))
    assert not torch.allclose(attention, attention.transpose(1, 2))
    order = [2, 0, 1]
    torch.testing.assert_close(peer_attention(q[:, order], k[:, order]), attention[:, order][:, :, order])
    naive = torch.stack([torch.stack([(q[:, a] * k[:, b]).sum(1) for b in range(3)], 1) for a in range(3)], 1)
    torch.testing.assert_close(attention, naive.softmax(2))
    assert peer_attention(torch.zeros(2, 3, 4).half(), torch.ones(2, 3, 4).half()).dtype is torch.float32


def test_the_order_of_the_auxiliary_peers_does_not_matter():
    student = peers()
    turned = copy.deepcopy(student)
    for at, name in enumerate(("0", "3", "1", "2")):
        turned.peers[at].load_state_dict(student.peers[int(name)].state_dict())
    a, b = bound(student)(batch()), bound(turned)(batch())
    torch.testing.assert_close(a.total, b.total)


def test_divergence_reaches_both_and_has_the_value_of_kd():
    torch.manual_seed(0)
    s, t = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    value = attended_divergence(s, t, 2.0)
    torch.testing.assert_close(value, kd_divergence(s, t, 2.0))
    value.backward()
    assert s.grad.abs().sum() > 0
    assert t.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(attended_divergence, (s.double(), t.double()))
    assert attended_divergence(s, s).item() == pytest.approx(0.0, abs=1e-6)
    for big in (torch.full((1, 3), 500.0), torch.tensor([[500.0, -500.0, 0.0]]), torch.zeros(0, 3)):
        z = big.clone().requires_grad_()
        attended_divergence(z, big.flip(1).requires_grad_()).backward()
        assert z.grad.isfinite().all()
    with pytest.raises(ValueError, match="temperature=0"):
        attended_divergence(s, t, 0)
    with pytest.raises(ValueError, match="differ in shape"):
        attended_divergence(s, t[:, :3])


def test_the_leader_is_what_is_evaluated_and_may_be_another_network():
    torch.manual_seed(0)
    student = DiversePeers(Cohort([MLP(6, (9, 5), 3), MLP(6, (16,), 3), MLP(6, (12, 16), 3)]), (6,))
    x, y = batch()
    assert evaluate(student, [(x, y)]).accuracy == evaluate(student.peer(0), [(x, y)]).accuracy
    torch.testing.assert_close(student(x).logits, student.peers[0](x))
    mean = torch.stack([p(x) for p in student.peers[1:]]).mean(0)
    torch.testing.assert_close(student(x).mean, mean)
    torch.testing.assert_close(student.ensemble()(x), mean)
    bound(student)((x, y)).total.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match="a leader and at least 2 auxiliary peers, got 2 peers"):
        peers(2)
    with pytest.raises(ValueError, match=r"embeddings are \[\(2, 16\), \(2, 8\)\]; expected \(B, D\) of the same D"):
        DiversePeers(Cohort([MLP(6, (16,), 3), MLP(6, (16,), 3), MLP(6, (8,), 3)]), (6,))
    with pytest.raises(ValueError, match="reduction=0"):
        peers(reduction=0)
    with pytest.raises(ValueError, match="AttendedKD: temperature=0"):
        AttendedKD(temperature=0)
    with pytest.raises(ValueError, match="AttendedKD: expected OKDDip's targets; beside another teacher use KD"):
        Distillation(nn.Linear(6, 3), nn.Linear(6, 3), losses=[AttendedKD()]).bind(batch())
    with pytest.raises(TypeError, match="teaches a tutelage DiversePeers, got Branches"):
        Distillation(Branches(MLP(6, (8, 8), 3), "hidden.0", 3, (6,)), OKDDip(), losses=[TaskLoss()]).bind(batch())
