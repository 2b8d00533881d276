from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import Branches, BranchTree
from tutelage.architecture.branches import fork_of
from tutelage.models import SmallCNN, resnet8, resnet14
from tutelage.taps import UnknownTap
from tutelage.views import Inputs

TREES = [
    ("SmallCNN", lambda: SmallCNN(width=4), ["stage1", "stage2"], (1, 28, 28)),
    ("resnet8", resnet8, ["layer1", "layer2"], (3, 32, 32)),
    ("inside a stage", resnet14, ["layer2.0", "layer3.0"], (3, 32, 32)),
    ("three levels", resnet8, ["layer1", "layer2", "layer3"], (3, 32, 32)),
]


@pytest.mark.parametrize(("name", "make", "after", "shape"), TREES)
def test_each_peer_says_and_learns_what_its_network_does_alone(name, make, after, shape):
    torch.manual_seed(0)
    tree = BranchTree(make(), after, 2, example=shape).eval()
    alone = copy.deepcopy(tree)
    x = torch.randn(2, *shape)
    said, expected = tree(x).peers, [peer(x) for peer in alone.peers]
    assert len(said) == 2 ** len(after)
    for mine, theirs in zip(said, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(not torch.allclose(a, b) for i, a in enumerate(said) for b in said[:i])
    sum(z.square().sum() for z in said).backward()
    sum(z.square().sum() for z in expected).backward()
    for (at, mine), theirs in zip(tree.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=at)


def test_what_is_shared_runs_once_for_those_who_share_it():
    tree = BranchTree(SmallCNN(width=4), ["stage1", "stage2"], 2, example=(1, 28, 28))
    calls: dict[str, list[int]] = {}
    for stage in ("stage1", "stage2", "stage3"):
        calls[stage] = []
        inner = {id(peer.get_submodule(stage)[0]): peer.get_submodule(stage)[0] for peer in tree.peers}
        for convolution in inner.values():  # a replayed stage does not call what is inside of it
            convolution.register_forward_hook(lambda *_, stage=stage: calls[stage].append(1))
    tree(torch.randn(2, 1, 28, 28))
    assert [len(calls[stage]) for stage in ("stage1", "stage2", "stage3")] == [1, 2, 4]


def test_rescaled_each_fork_gets_the_mean_of_its_branches():
    torch.manual_seed(0)
    plain = BranchTree(SmallCNN(width=4), ["stage1", "stage2"], 2, example=(1, 28, 28)).eval()
    rescaled = BranchTree(SmallCNN(width=4), ["stage1", "stage2"], 2, example=(1, 28, 28), rescale=True).eval()
    rescaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 28, 28)
    for tree in (plain, rescaled):
        sum(z.square().sum() for z in tree(x).peers).backward()
    for name, p in plain.named_parameters():
        factor = 4 if ".stage1" in name else 2 if ".stage2" in name else 1
        torch.testing.assert_close(rescaled.get_parameter(name).grad, p.grad / factor, msg=name)


def test_one_level_is_branches():
    torch.manual_seed(0)
    tree = BranchTree(SmallCNN(width=4), ["stage2"], 3, example=(1, 28, 28)).eval()
    branches = Branches(copy.deepcopy(tree.peers[0]), "stage2", 3, example=(1, 28, 28)).eval()
    branches.load_state_dict(tree.state_dict())
    x = torch.randn(2, 1, 28, 28)
    for mine, theirs in zip(tree(x).peers, branches(x).peers, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_wrong_trees_are_refused_by_name():
    def tree(after):
        return BranchTree(SmallCNN(width=4), after, 2, example=(1, 28, 28))

    with pytest.raises(ValueError, match=r"after=\['stage2', 'stage1'\]: 'stage1' does not come after 'stage2'"):
        tree(["stage2", "stage1"])
    with pytest.raises(ValueError, match="after='stage1': expected a list of modules"):
        tree("stage1")
    with pytest.raises(ValueError, match=r"after=\[\]: expected a list"):
        tree([])
    with pytest.raises(UnknownTap, match="stage9"):
        tree(["stage9"])
    with pytest.raises(ValueError, match="'stage9' does not come after"):
        tree(["stage1", "stage9"])


@pytest.mark.parametrize(
    ("model", "shape", "after"),
    [(SmallCNN(width=4), (1, 28, 28), "stage2"), (resnet8(), (3, 32, 32), "layer2")],
)
def test_the_fork_may_be_left_out(model, shape, after, capsys):
    assert fork_of(model, Inputs((torch.zeros(2, *shape),))) == after
    branches = Branches(model, None, 2, example=shape)
    assert branches.after == after
    assert f"the branches part after '{after}'" in capsys.readouterr().err


def test_a_network_of_one_stage_must_name_its_fork():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(ValueError, match="after: no stage to part after"):
        Branches(model, None, 2, example=(1, 4, 4))
    with pytest.raises(ValueError, match="name the addresses"):
        Branches(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), None, 2, example=(4,))
