"""Short trainings beside their controls: what defines ONE, OKDDip, CLILR and FeatureFusion moves as it should.

Labels are noisy, networks large for the data: there peers have something to tell each other.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage import (
    CLILR,
    KD,
    ONE,
    Branches,
    Cohort,
    DeepMutualLearning,
    Distillation,
    DiversePeers,
    FeatureFusion,
    FusedFeatures,
    GatedBranches,
    OKDDip,
    RampUp,
    TaskLoss,
)
from tutelage.data import fashion_subset
from tutelage.models import MLP, SmallCNN


def noisy(labels, share, classes, generator):
    wrong = torch.rand(len(labels), generator=generator) < share
    return torch.where(wrong, torch.randint(0, classes, labels.shape, generator=generator), labels)


def clouds():
    """Five overlapping clouds of points; 200 to learn from, with 30 % wrong labels, and 1000 to judge on."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 12, generator=g)

    def draw(n):
        y = torch.randint(0, 5, (n,), generator=g)
        return centres[y] + 1.3 * torch.randn(n, 12, generator=g), y

    x, y = draw(200)
    return x, noisy(y, 0.3, 5, g), *draw(1000)


def learn(student, teacher, losses, x, y, seed, steps=120):
    torch.manual_seed(seed)
    d = Distillation(student, teacher, losses=losses).bind((x[:50], y[:50]))
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    for step in range(steps):
        d.progress = step / steps
        chosen = torch.randperm(len(x))[:50]
        optimizer.zero_grad()
        d((x[chosen], y[chosen])).total.backward()
        optimizer.step()
    return student.eval()


def made(make, seed=0):
    torch.manual_seed(seed)
    return make()


def network():
    return MLP(12, (32, 32), 5)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


@torch.no_grad()
def spread(peers) -> float:
    """The mean distance of two peers' probabilities."""
    pairs = list(itertools.combinations([z.softmax(1) for z in peers], 2))
    return sum(float((a - b).norm(dim=1).mean()) for a, b in pairs) / len(pairs)


@torch.no_grad()
def test_one_brings_branches_to_their_ensemble():
    x, y, unseen, _ = clouds()

    def away(losses):
        student = made(lambda: GatedBranches(network(), (12,), 3, "hidden.0"))
        before = student.gate.weight.clone()
        with torch.enable_grad():
            learn(student, ONE(), losses, x, y, seed=0)
        said = student(unseen)
        assert (student.gate.weight - before).abs().max() > 0.05
        assert said.gates.std(0).min() > 0.05  # it weighs branches for each sample
        target = said.ensemble.log_softmax(1)
        kl = [F.kl_div(z.log_softmax(1), target, log_target=True, reduction="batchmean") for z in said.peers]
        return float(sum(kl))

    assert away(ONE().losses()) < 0.7 * away([TaskLoss()])


def test_okddip_keeps_its_peers_apart_and_its_leader_gains():
    x, y, unseen, labels = clouds()
    mutual = [TaskLoss(), KD(temperature=3.0, weight=RampUp(1.0, until=80 / 300))]  # the same T, weight and schedule
    said = {}
    for name, teacher, losses in (
        ("labels", DeepMutualLearning(), [TaskLoss()]),
        ("mutual", DeepMutualLearning(), mutual),
        ("diverse", OKDDip(), OKDDip().losses()),
    ):
        student = made(lambda: Cohort([network() for _ in range(4)]))
        if name == "diverse":
            student = DiversePeers(student, (12,))
        with torch.no_grad():
            weights = None if name != "diverse" else student.query.weight.clone()
        learn(student, teacher, losses, x, y, seed=0)
        if weights is not None:
            assert (student.query.weight - weights).abs().max() > 0.05
        said[name] = student(unseen)
    auxiliary = {name: spread(output.peers[1:]) for name, output in said.items()}
    assert auxiliary["diverse"] > 1.15 * auxiliary["mutual"]
    assert accuracy(said["diverse"].logits, labels) > accuracy(said["labels"].logits, labels)
    attention = said["diverse"].attention
    assert (attention - 1 / 3).abs().mean() > 0.1
    assert (attention - attention.transpose(1, 2)).abs().max() > 0.01


def test_clilr_brings_heads_to_a_consensus():
    x, y, unseen, _ = clouds()

    def apart(losses):
        student = made(lambda: Branches(network(), "hidden.0", 4, (12,), rescale=True))
        return spread(learn(student, CLILR(), losses, x, y, seed=0)(unseen).peers)

    assert apart(CLILR().losses()) < 0.95 * apart([TaskLoss(weight=0.5)])


@pytest.fixture(scope="module")
def images():
    """Small fashion images, 40 % of the labels to learn from wrong."""
    parts = fashion_subset()

    def small(part, n):
        pixels = torch.from_numpy(part.images[:n]).reshape(n, 1, 28, 28).float() / 255 - 0.3
        return 3 * F.avg_pool2d(pixels, 2), torch.as_tensor(part.labels[:n]).long()

    x, y = small(parts.train, 400)
    return x, noisy(y, 0.4, 10, torch.Generator().manual_seed(0)), small(parts.test, 500)[0]


@torch.no_grad()
def test_feature_fusion_brings_sub_networks_to_the_fused_classifier(images):
    x, y, unseen = images

    def away(losses):
        student = made(lambda: FusedFeatures(Cohort([SmallCNN(width=6) for _ in range(2)]), (1, 14, 14)))
        with torch.enable_grad():
            learn(student, FeatureFusion(), losses, x, y, seed=0, steps=60)
        said = student(unseen)
        target = said.fused.log_softmax(1)
        kl = [F.kl_div(z.log_softmax(1), target, log_target=True, reduction="batchmean") for z in said.peers]
        return float(sum(kl))

    assert away(FeatureFusion().losses()) < 0.8 * away([TaskLoss()])
