from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, RKD, AttentionTransfer, DeepMutualLearning, Distillation, FitNets, TaskLoss
from tutelage.architecture.branches import Branches, trunk_of
from tutelage.deploy.export import export
from tutelage.models import SmallCNN, resnet8
from tutelage.taps import UnknownTap
from tutelage.views import Inputs


def network(spec: str) -> tuple[nn.Module, str, tuple[int, ...]]:
    """A network, where it forks, and an image's shape."""
    library, name, after = spec.split("/")
    if library == "ours":
        return (
            {"SmallCNN": SmallCNN(width=4), "resnet8": resnet8()}[name],
            after,
            (1, 28, 28) if "S" in name else (3, 32, 32),
        )
    if library == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        return torchvision.models.get_model(name, num_classes=7), after, (3, 64, 64)
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    return timm.create_model(name, num_classes=7, **sizes), after, (3, 32 if sizes else 64, 32 if sizes else 64)


NETWORKS = [
    "ours/SmallCNN/stage2",
    "ours/resnet8/layer2",
    "torchvision/resnet18/layer3",
    "torchvision/densenet121/features.denseblock3",
    "torchvision/mobilenet_v3_small/features.8",
    "torchvision/googlenet/inception4c",
    "timm/vit_tiny_patch16_224/blocks.7",
    "timm/resnet26/layer2",
    "timm/convnext_atto/stages.2",
]


@pytest.mark.parametrize("spec", NETWORKS)
def test_each_branch_says_what_its_network_says_alone(spec):
    torch.manual_seed(0)
    model, after, shape = network(spec)
    branches = Branches(model.eval(), after, 3, example=shape)
    branches.eval()
    x = torch.randn(2, *shape)
    said = branches(x).peers
    for logits, peer in zip(said, branches.peers, strict=True):
        torch.testing.assert_close(logits, peer(x))
    assert not torch.allclose(said[0], said[1])


@pytest.mark.parametrize("spec", NETWORKS)
def test_gradients_are_those_of_the_networks_alone(spec):
    torch.manual_seed(0)
    model, after, shape = network(spec)
    branches = Branches(model, after, 2, example=shape)
    branches.eval()  # batch norms and dropout as they are, whatever runs twice
    alone = copy.deepcopy(branches)
    x = torch.randn(2, *shape)
    sum(z.square().sum() for z in branches(x).peers).backward()
    sum(peer(x).square().sum() for peer in alone.peers).backward()
    checked = 0
    for (name, mine), theirs in zip(branches.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
            checked += 1
    assert checked > 2


def test_the_trunk_runs_once_and_its_statistics_move_once():
    model = resnet8()
    alone = copy.deepcopy(model)
    branches = Branches(model, "layer2", 3, example=(3, 32, 32))
    calls = {"layer1": 0, "layer3": 0}
    for name in calls:
        inner = type(model.get_submodule(name)).forward

        def counted(self, *args, name=name, inner=inner):
            calls[name] += 1
            return inner(self, *args)

        for peer in branches.peers:
            module = peer.get_submodule(name)
            module.forward = counted.__get__(module)
    x = torch.randn(4, 3, 32, 32)
    branches(x)
    assert calls == {"layer1": 1, "layer3": 3}
    alone(x)
    for mine, theirs in zip(branches.peers[0].layer1.buffers(), alone.layer1.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_parameters_of_the_trunk_are_there_once():
    whole, lower = (sum(p.numel() for p in m.parameters()) for m in (resnet8(), nn.ModuleList([resnet8().layer1])))
    model = resnet8()
    branches = Branches(model, "layer1", 3, example=(3, 32, 32))
    stem = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("layer", "linear", "fc")))
    assert sum(p.numel() for p in branches.parameters()) == 3 * whole - 2 * (lower + stem)


def test_a_peer_alone_shares_nothing_and_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    branches = Branches(SmallCNN(width=4), "stage2", 2, example=(1, 28, 28)).eval()
    peer, x = branches.peer(1), torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(peer(x), branches(x).peers[1])
    assert not {id(p) for p in peer.parameters()} & {id(p) for p in branches.parameters()}
    for name, model in (("peer", peer), ("ensemble", branches.ensemble())):
        export(model, x, tmp_path / f"{name}.onnx", data=[(x,)])  # compares the file with the network
    mean = torch.stack([z.softmax(1) for z in branches(x).peers]).mean(0)
    torch.testing.assert_close(branches.ensemble()(x).softmax(1), mean)


class Crossing(nn.Module):
    """Functions that change tensors in place, an activation used on both sides, and a way around the fork."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        early = self.relu(self.a(x)) * self.scale
        middle = self.b(early)
        middle += early
        deep = self.c(self.relu(middle))
        deep += early
        return self.d(F.elu(deep, inplace=True))


@pytest.mark.parametrize("after", ["a", "b", "c"])
def test_in_place_functions_reused_modules_and_ways_around_the_fork(after):
    torch.manual_seed(0)
    branches = Branches(Crossing(), after, 3, example=(4,))
    alone = copy.deepcopy(branches)
    x = torch.randn(5, 4)
    said, expected = branches(x).peers, [peer(x) for peer in alone.peers]
    for mine, theirs in zip(said, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    sum(z.square().sum() for z in said).backward()
    sum(z.square().sum() for z in expected).backward()
    for (name, mine), theirs in zip(branches.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_rescaled_the_trunk_gets_the_mean_and_the_tails_their_own():
    torch.manual_seed(0)
    plain = Branches(SmallCNN(width=4), "stage2", 3, example=(1, 28, 28)).eval()
    rescaled = Branches(copy.deepcopy(plain.peers[0]), "stage2", 3, example=(1, 28, 28), rescale=True).eval()
    rescaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 28, 28)
    for branches in (plain, rescaled):
        sum(z.square().sum() for z in branches(x).peers).backward()
    for name, p in plain.named_parameters():
        q = rescaled.get_parameter(name)
        below = ".stage1" in name or ".stage2" in name
        torch.testing.assert_close(q.grad, p.grad / 3 if below else p.grad, msg=name)


def test_fresh_branches_differ_and_copies_do_not():
    model = SmallCNN(width=4)
    before = copy.deepcopy(model.state_dict())
    fresh = Branches(model, "stage1", 2, example=(1, 28, 28))
    assert all(torch.equal(v, before[k]) for k, v in fresh.peers[0].state_dict().items())
    assert not torch.equal(fresh.peers[1].linear.weight, model.linear.weight)
    copies = Branches(SmallCNN(width=4), "stage1", 2, example=(1, 28, 28), fresh=False)
    assert torch.equal(copies.peers[1].linear.weight, copies.peers[0].linear.weight)
    assert copies.peers[1].linear.weight is not copies.peers[0].linear.weight


def test_any_losses_between_branches_and_one_forward_pass_each():
    torch.manual_seed(0)
    branches = Branches(SmallCNN(width=4), "stage1", 3, example=(1, 28, 28))
    batch = torch.randn(6, 1, 28, 28), torch.arange(6) % 3
    losses = [TaskLoss(), KD(), AttentionTransfer("stage2", "stage3"), RKD("linear:input"), FitNets("stage3")]
    d = Distillation(branches, DeepMutualLearning(), losses=losses).bind(batch)
    calls = [0, 0, 0]
    for i, peer in enumerate(branches.peers):
        peer.stage3.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    d(batch).total.backward()
    assert calls == [1, 1, 1]
    assert all(p.grad is not None for p in branches.parameters())
    assert len(d.apart) == 5  # of the six pairs' regressors, the first is the loss's own


def test_wrong_forks_are_refused_by_name():
    def branch(after, count=2, model=None):
        return Branches(model or SmallCNN(width=4), after, count, example=(1, 28, 28))

    with pytest.raises(UnknownTap, match=r"stage9.*'stage"):
        branch("stage9")
    with pytest.raises(ValueError, match="after='linear': nothing with parameters"):
        branch("linear")
    with pytest.raises(ValueError, match="count=1: expected 2"):
        branch("stage1", count=1)
    with pytest.raises(UnknownTap, match=r"after='stage\*': expected the name of one module"):
        branch("stage*")
    idle = SmallCNN(width=4)
    idle.aux = nn.Linear(2, 2)
    with pytest.raises(UnknownTap, match="after='aux': this module is not called"):
        branch("aux", model=idle)


def test_modules_called_more_than_once_below_the_fork():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    trunk = trunk_of(Again(), "a", Inputs((torch.ones(1, 4),)))
    assert trunk.calls == {"a": 1}  # the fork is after the first call; the second is every branch's
    branches = Branches(Again(), "a", 2, example=(4,))
    x = torch.randn(3, 4)
    for mine, peer in zip(branches(x).peers, branches.peers, strict=True):
        torch.testing.assert_close(mine, peer(x))
