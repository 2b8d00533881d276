"""What holds for every method of branches and groups: ONE, OKDDip, CLILR and FeatureFusion."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import (
    CLILR,
    KD,
    ONE,
    RKD,
    AttentionTransfer,
    Branches,
    BranchTree,
    Cohort,
    DeepMutualLearning,
    Distillation,
    DiversePeers,
    FeatureFusion,
    FitNets,
    FusedFeatures,
    GatedBranches,
    OKDDip,
    SimilarityPreserving,
    TaskLoss,
    Training,
)
from tutelage.data import ArrayLoader, CropFlip, fashion_subset
from tutelage.deploy.export import export
from tutelage.engine import fit
from tutelage.models import SmallCNN

SHAPE = (1, 28, 28)


class WithoutStatistics(nn.Module):
    """A small network without batch-norm, whose pass over a batch is that over its parts."""

    def __init__(self, width=4):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, width, 3, stride=4, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.linear = nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.linear(self.stage2(self.stage1(x)).mean((2, 3)))


def networks(n, make):
    return Cohort([make() for _ in range(n)])


def branches(n, make, **options):
    return Branches(make(), "stage1", n, SHAPE, **options)


METHODS = {
    "ONE": (ONE, lambda make: GatedBranches(make(), SHAPE, after="stage1")),
    "OKDDip networks": (OKDDip, lambda make: DiversePeers(networks(3, make), SHAPE, reduction=2)),
    "OKDDip branches": (OKDDip, lambda make: DiversePeers(branches(4, make), SHAPE, reduction=2)),
    "CLILR": (CLILR, lambda make: branches(3, make, rescale=True)),
    "CLILR tree": (CLILR, lambda make: BranchTree(make(), ["stage1.0", "stage1.1"], 2, SHAPE, rescale=True)),
    "FFL networks": (FeatureFusion, lambda make: FusedFeatures(networks(2, make), SHAPE)),
    "FFL branches": (FeatureFusion, lambda make: FusedFeatures(branches(2, make), SHAPE)),
}


def made(name, make=lambda: SmallCNN(width=4), seed=0):
    torch.manual_seed(seed)
    teacher, student = METHODS[name]
    return student(make), teacher()


def batch(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=g), torch.randint(0, 3, (n,), generator=g)


@pytest.mark.parametrize("name", METHODS)
def test_any_losses_one_pass_each_and_gradients_for_all(name):
    student, teacher = made(name)
    losses = [
        *teacher.losses(),
        KD(name="soft"),
        AttentionTransfer("stage2", "stage3"),
        RKD("linear:input"),
        SimilarityPreserving("stage3"),
        FitNets("stage3"),
    ]
    d = Distillation(student, teacher, losses=losses).bind(batch())
    calls = [0] * len(student.peers)
    for i, peer in enumerate(student.peers):
        peer.linear.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    said = d(batch())
    said.total.backward()
    assert calls == [1] * len(calls)
    assert said.total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in d.parameters())
    # what FitNets owns it owns for each learner
    lessons = teacher.lessons(d.views(batch()), d.observer(d.views(batch()).student))
    taught = [lesson.key for lesson in lessons if lesson.teacher is not None]
    assert len(set(taught)) == len(taught) == len(d.apart) + 1


@pytest.mark.parametrize("name", METHODS)
def test_targets_are_outside_the_graph_for_losses_of_others(name):
    student, teacher = made(name)
    d = Distillation(student, teacher, losses=[KD(), FitNets("stage3")]).bind(batch())
    for lesson in teacher.lessons(d.views(batch()), d.observer(d.views(batch()).student)):
        assert lesson.student.logits.requires_grad
        if lesson.teacher is not None:
            assert not lesson.teacher.logits.requires_grad
            assert not lesson.teacher["stage3"].requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_feature_losses_alone(name):
    """Without logits to read, a forward pass would stop at the last tap: before the gate, the attention, the fusion."""
    student, teacher = made(name)
    d = Distillation(student, teacher, losses=[AttentionTransfer("stage2")]).bind(batch())
    assert d(batch()).total > 0


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    student, teacher = made(name, WithoutStatistics)
    # a batch-norm sees the parts, in the gate and in the fusion as anywhere
    if isinstance(student, GatedBranches):
        student.norm = nn.Identity()
    if isinstance(student, FusedFeatures):
        student.fusion.norms = nn.ModuleList([nn.Identity(), nn.Identity()])
    d = Distillation(student, teacher, losses=[*teacher.losses(), FitNets("stage2", weight=1.0)]).bind(batch())
    x, y = batch(8)
    whole = d((x, y))
    whole.total.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in d.parameters()]
    d.zero_grad()
    shares = {n: torch.tensor(0.5) for n in whole.values}
    for part in (slice(0, 4), slice(4, 8)):
        d((x[part], y[part]), shares).total.backward()
    for p, g in zip(d.parameters(), expected, strict=True):
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact(name, tmp_path):
    images = fashion_subset().train

    class Cut(Exception):
        pass

    def train(out, cut=None, resume=False):
        student, teacher = made(name)
        d = Distillation(student, teacher, losses=[*teacher.losses(), FitNets("stage3")])
        loader = ArrayLoader(
            images.images[:64], images.labels[:64] % 10, batch_size=16, shuffle=True, augment=CropFlip(2)
        )

        def stop(line):
            if line.epoch == cut:
                raise Cut

        training = Training(epochs=2, lr=0.01, progress=False, cpu=True, log_every=2)
        return fit(d, loader, None, training=training, out=out, resume=resume, after_epoch=stop)

    whole = train(tmp_path / "whole")
    with pytest.raises(Cut):
        train(tmp_path / "cut", cut=0)
    resumed = train(tmp_path / "cut", resume=True)
    assert whole.last.keys() == resumed.last.keys()
    assert all(torch.equal(v, resumed.last[k]) for k, v in whole.last.items())


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_registered_twice_and_copies_stand_alone(name):
    student, _ = made(name)
    tensors = list(student.state_dict(keep_vars=True).values())
    trunk = {id(t) for peer in student.peers for t in peer.state_dict(keep_vars=True).values()}
    own = [k for k in student.state_dict() if not k.startswith("peers.")]
    assert len({id(t) for t in tensors}) == len(trunk) + len(own)
    other = copy.deepcopy(student)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    x = batch()[0]
    assert student.eval()(x).logits.abs().sum() > 0
    assert other.eval()(x).logits.abs().sum() == 0


@pytest.mark.parametrize("name", METHODS)
def test_peers_and_ensembles_are_plain_networks_that_share_nothing(name):
    student, _ = made(name)
    student.eval()
    x = batch(3)[0]
    torch.testing.assert_close(student.peer(1)(x), student(x).peers[1])
    for model in (student.peer(1), student.ensemble().eval()):
        assert not {id(p) for p in model.parameters()} & {id(p) for p in student.parameters()}
        assert model(x).shape == (3, 10)


@pytest.mark.parametrize(("name", "answer"), [("ONE", "ensemble"), ("FFL branches", "fused")])
def test_the_group_is_exported_as_one_network(name, answer, tmp_path):
    pytest.importorskip("onnxruntime")
    student, _ = made(name)
    model, x = getattr(student.eval(), answer)(), batch(3)[0]
    torch.testing.assert_close(model(x), getattr(student(x), answer))
    export(model, x, tmp_path / "group.onnx", data=[(x,)])  # compares the file with the network


@pytest.mark.parametrize(("teacher", "kind"), [(ONE, "GatedBranches"), (OKDDip, "DiversePeers"), (CLILR, "Cohort")])
def test_another_student_is_refused_by_name(teacher, kind):
    with pytest.raises(TypeError, match=f"student: {teacher.__name__} teaches a tutelage {kind}, got SmallCNN"):
        Distillation(SmallCNN(width=4), teacher(), losses=[TaskLoss()]).bind(batch())


def test_a_plain_cohort_is_refused_where_more_is_needed():
    for teacher, kind in ((ONE, "GatedBranches"), (OKDDip, "DiversePeers"), (FeatureFusion, "FusedFeatures")):
        with pytest.raises(TypeError, match=f"{kind}, got Cohort"):
            Distillation(networks(3, SmallCNN), teacher(), losses=[TaskLoss()]).bind(batch())


@pytest.mark.parametrize("role", [DiversePeers, FusedFeatures])
def test_what_stands_on_a_cohort_refuses_other_things_by_name(role):
    def small():
        return SmallCNN(width=4)

    with pytest.raises(TypeError, match="cohort: expected a tutelage Cohort or Branches, got SmallCNN"):
        role(small(), SHAPE)
    with pytest.raises(ValueError, match=r"at: peer 0 has no such tap: .*stage9.*stage"):
        role(networks(3, small), SHAPE, at="stage9")
    with pytest.raises(ValueError, match="expected an address for each of the 3 peers"):
        role(networks(3, small), SHAPE, at=["stage2", "stage3"])
    with pytest.raises(ValueError, match=r"expected the address of one module's tensor, got \['stage1', 'stage2'"):
        role(networks(3, small), SHAPE, at="stage*")
    with pytest.raises(ValueError, match=r"same classes from every peer, got \[\(2, 10\), \(2, 7\), \(2, 10\)\]"):
        role(Cohort([small(), SmallCNN(width=4, num_classes=7), small()]), SHAPE)


def test_other_teachers_of_cohorts_stand_beside_these_students_too():
    student, _ = made("OKDDip networks")
    d = Distillation(student, DeepMutualLearning(), losses=DeepMutualLearning().losses())
    d(batch()).total.backward()
    assert all(p.grad is not None for p in student.peers.parameters())
