"""Pruning: the network that is left is the original without the channels that went."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tutelage.architecture.channels import Kept, Pruning
from tutelage.architecture.pruning import choose_channels, keep_channels, load_pruned, prune_channels
from tutelage.models import (
    MLP,
    SmallCNN,
    create,
    mobilenetv2_half,
    resnet8,
    resnet14,
    save_weights,
    shufflenetv1,
    shufflenetv2,
    vgg8,
    wrn_16_1,
)

pytest.importorskip("torch_pruning")

GREY, COLOUR = torch.randn(2, 1, 28, 28), torch.randn(2, 3, 32, 32)
NETWORKS = {
    "SmallCNN": (lambda: SmallCNN(width=8, depth=2), GREY),
    "MLP": (lambda: MLP(28 * 28, hidden=(64, 32)), GREY),
    "projections": (resnet14, COLOUR),
    "padding": (lambda: resnet14(shortcut="padding"), COLOUR),
    "pre-activation": (wrn_16_1, COLOUR),
    "VGG": (vgg8, COLOUR),
    "depthwise": (mobilenetv2_half, COLOUR),
}


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def stirred(model: nn.Module) -> nn.Module:
    """With batch norms that are not the identity, as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.fixture(params=NETWORKS)
def network(request):
    build, example = NETWORKS[request.param]
    torch.manual_seed(0)
    return stirred(build()), example


# What is left


def test_it_computes_the_original_in_which_nobody_reads_the_channels_that_went(network):
    """Written here by hand, in another way than the check inside: hooks zero what removed channels carry."""
    model, example = network
    pruning = choose_channels(model, example, 0.5)
    small = keep_channels(model, pruning)
    whole = copy.deepcopy(model).eval()

    def silence(kept: Kept):
        gone = torch.ones(kept.of, dtype=torch.bool)
        gone[list(kept.channels)] = False

        def hook(module, args):
            shape = [1, -1] + [1] * (args[0].ndim - 2)
            return (args[0].masked_fill(gone.view(shape), 0.0),)

        return hook

    for name, kept in pruning.inputs.items():
        whole.get_submodule(name).register_forward_pre_hook(silence(kept))
    torch.testing.assert_close(outputs(small, example), outputs(whole, example), rtol=1e-3, atol=1e-4)


def test_weights_of_channels_that_stay_are_the_originals(network):
    model, example = network
    pruning = choose_channels(model, example, 0.4)
    small = keep_channels(model, pruning)
    assert pruning.outputs
    for name, layer in small.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        before = model.get_submodule(name).weight
        made, read = pruning.outputs.get(name), pruning.inputs.get(name)
        rows = list(made.channels) if made else range(before.shape[0])
        columns = list(read.channels) if read else range(before.shape[1])
        assert torch.equal(layer.weight, before[list(rows)][:, list(columns)])


def test_the_original_is_untouched(network):
    model, example = network
    model.train().requires_grad_(False)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    prune_channels(model, example, 0.5)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_every_weight_of_the_copy_learns_also_where_the_original_is_frozen(network):
    model, example = network
    small = prune_channels(model.requires_grad_(False), example, 0.5).train()
    assert small.training
    small(example).square().sum().backward()
    # A bias before a batch norm has none; everything else has.
    dead = [n for n, p in small.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert all(n.endswith("bias") for n in dead)
    assert {id(p) for p in small.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_parameters_fall_with_the_square_of_what_stays(ratio):
    model = vgg8()
    small = prune_channels(model, COLOUR, ratio)
    assert weights(small) / weights(model) == pytest.approx((1 - ratio) ** 2, rel=0.05)
    assert outputs(small, COLOUR).shape == (2, 10)


def test_ratio_0_changes_nothing():
    model = stirred(SmallCNN(width=4))
    assert choose_channels(model, GREY, 0.0) == Pruning()
    assert torch.equal(outputs(prune_channels(model, GREY, 0.0), GREY), outputs(model, GREY))


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_the_smallest_channels_go(importance):
    model = SmallCNN(width=4)
    for module in (model.stage1[0], model.stage2[0]):
        nn.init.ones_(module.weight)
    with torch.no_grad():
        for module in (model.stage1[0].weight, model.stage2[0].weight.transpose(0, 1)):
            module[torch.tensor([0, 2])] *= 0.01
    assert choose_channels(model, GREY, 0.5, importance=importance).outputs["stage1.0"] == Kept(4, (1, 3))


def test_l1_and_l2_differ_where_they_should():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 0, 0], [1.0, 1, 1, 1]]))  # |w|: 3, 4; w²: 9, 4
        model[1].weight.zero_()
    x = torch.randn(2, 4)
    assert choose_channels(model, x, 0.5, importance="l1").outputs["0"].channels == (1,)
    assert choose_channels(model, x, 0.5, importance="l2").outputs["0"].channels == (0,)


def test_random_importance_follows_its_seed_alone():
    model = SmallCNN(width=8)
    first = choose_channels(model, GREY, 0.5, importance="random", seed=1)
    torch.rand(3)
    assert choose_channels(model, GREY, 0.5, importance="random", seed=1) == first
    assert choose_channels(model, GREY, 0.5, importance="random", seed=2) != first


def test_what_stays_is_rounded_up():
    small = prune_channels(SmallCNN(width=8), GREY, 0.6, round_to=4)
    assert [stage[0].out_channels for stage in (small.stage1, small.stage2, small.stage3)] == [4, 8, 16]
    assert prune_channels(SmallCNN(width=2), GREY, 0.9).stage1[0].out_channels == 1  # never none


def test_keep_holds_with_everything_that_depends_on_it():
    model = resnet8()
    pruning = choose_channels(model, COLOUR, 0.5, keep=["layer1.0.conv2", "layer2.*.conv1"])
    # conv2 of the first stage is added to what the stem made, and read by the second stage
    for name in ("conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2", "layer2.0.conv1"):
        assert name not in pruning.outputs
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"):
        assert name not in pruning.inputs
    assert len(pruning.outputs["layer1.0.conv1"].channels) == 8
    assert "linear" not in pruning.outputs


def test_inputs_and_outputs_are_never_pruned(network):
    model, example = network
    small = prune_channels(model, example, 0.9)
    assert outputs(small, example).shape == outputs(model, example).shape


def test_padded_shortcuts_keep_their_channels_and_the_blocks_lose_theirs():
    model = resnet14(shortcut="padding")
    small = prune_channels(model, COLOUR, 0.5)
    for stage, width in ((small.layer1, 16), (small.layer2, 32), (small.layer3, 64)):
        for block in stage:
            assert (block.conv1.out_channels, block.conv2.out_channels) == (width // 2, width)


def test_memory_formats_and_types_stay():
    model = resnet8().to(memory_format=torch.channels_last).double()
    assert prune_channels(model, COLOUR.double(), 0.5)(COLOUR.double()).dtype == torch.float64


def test_named_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, *, x, scale):
            return {"logits": self.b(torch.relu(self.a(x)) * scale)}

    small = prune_channels(Named(), {"x": torch.randn(2, 4), "scale": torch.ones(2, 1)}, 0.5)
    assert small.a.out_features == 4


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_networks_of_libraries(name):
    pytest.importorskip(name.split(":")[0])
    model, x = create(name, num_classes=10), torch.randn(1, 3, 64, 64)
    small = prune_channels(model, x, 0.5)
    assert 0.24 < weights(small) / weights(model) < 0.27
    assert outputs(small, x).shape == (1, 10)


def test_grouped_convolutions_lose_the_same_positions_of_each_group():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    small = prune_channels(model, COLOUR, 0.5)
    assert small[1].weight.shape == (4, 2, 3, 3)
    assert outputs(small, COLOUR).shape == (2, 2)


def test_several_networks_read_by_one_layer():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x):
            return self.head(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))

    pruning = choose_channels(Joined(), COLOUR, 0.5)
    a, b = pruning.outputs["a"].channels, pruning.outputs["b"].channels
    assert pruning.inputs["head"] == Kept(10, (*a, *(4 + c for c in b)))


# Files


def test_round_trip_through_files(network, tmp_path):
    model, example = network
    pruning = choose_channels(model, example, 0.5)
    small = keep_channels(model, pruning)
    pruning.save(tmp_path / "channels.json")
    save_weights(small, tmp_path / "small.safetensors")

    def factory() -> nn.Module:
        return copy.deepcopy(model).apply(_forget)

    again = load_pruned(factory, tmp_path / "channels.json", tmp_path / "small.safetensors")
    assert torch.equal(outputs(again, example), outputs(small, example))
    assert Pruning.load(tmp_path / "channels.json") == pruning
    assert json.loads((tmp_path / "channels.json").read_text())["format"] == 1


def _forget(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.zero_()


def test_pruned_networks_are_pruned_further_and_tapped():
    from tutelage import KD, Distillation, FitNets

    teacher = SmallCNN(width=8)
    half = prune_channels(teacher, GREY, 0.5)
    quarter = prune_channels(half, GREY, 0.5)
    assert quarter.stage1[0].out_channels == 2
    batch = (GREY, torch.tensor([0, 1]))
    d = Distillation(quarter, teacher, losses=[KD(), FitNets("stage2")]).bind(batch)
    d(batch).total.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_files_of_another_network_are_refused(tmp_path):
    choose_channels(SmallCNN(width=8), GREY, 0.5).save(tmp_path / "channels.json")
    save_weights(SmallCNN(width=4), tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match=r"'stage1.0' has 4 output channels; the file keeps 4 of 8"):
        load_pruned(lambda: SmallCNN(width=4), tmp_path / "channels.json", tmp_path / "four.safetensors")
    with pytest.raises(ValueError, match=r"CifarResNet has no layer 'stage1.0'"):
        load_pruned(resnet8, tmp_path / "channels.json", tmp_path / "four.safetensors")
    (tmp_path / "channels.json").write_text('{"format": 1, "outputs": []}')
    with pytest.raises(ValueError, match=r"channels.json is no file of pruned channels"):
        load_pruned(resnet8, tmp_path / "channels.json", tmp_path / "four.safetensors")


@pytest.mark.parametrize("channels", [(), (0, 8), (2, 1), (1, 1)])
def test_impossible_channels_are_refused(channels):
    with pytest.raises(ValueError, match=r"'stage1.0' has 8 output channels"):
        keep_channels(SmallCNN(width=8), Pruning({"stage1.0": Kept(8, channels)}))


# Refusals


def test_wrong_arguments_are_named():
    model = SmallCNN(width=4)
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"ratio={ratio}: expected a share from 0 to below 1"):
            prune_channels(model, GREY, ratio)
    with pytest.raises(ValueError, match=r"importance='l3': expected l2, l1 or random"):
        prune_channels(model, GREY, 0.5, importance="l3")
    with pytest.raises(ValueError, match=r"keep: no module 'stage9' in this SmallCNN; nearest: 'stage"):
        prune_channels(model, GREY, 0.5, keep=["stage9"])
    with pytest.raises(TypeError, match="keep='stage1': expected a list"):
        prune_channels(model, GREY, 0.5, keep="stage1")
    with pytest.raises(ValueError, match="round_to=0"):
        prune_channels(model, GREY, 0.5, round_to=0)


def test_nothing_to_prune_is_said():
    with pytest.raises(ValueError, match="no channel of this Linear can go"):
        prune_channels(nn.Linear(4, 3), torch.randn(2, 4), 0.5)
    with pytest.raises(ValueError, match="no channel of this SmallCNN can go"):
        prune_channels(SmallCNN(width=4), GREY, 0.5, keep=["stage*"])


@pytest.mark.parametrize("build", [shufflenetv1, shufflenetv2])
def test_shuffled_channels_are_refused_and_not_returned_wrong(build):
    with pytest.raises(ValueError, match=f"{type(build()).__name__}: .*shuffle"):
        prune_channels(build(), COLOUR, 0.5)


def test_a_hidden_mixing_of_channels_is_found_and_the_layer_named():
    class Turned(nn.Module):
        """What looks channelwise to the graph swaps the channels: cut, it would run, and say something else."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.a(x).flip(1) + self.b(x)).mean((2, 3))

    with pytest.raises(ValueError, match=r"Turned: the channels of '[ab]' are mixed .* name it in keep"):
        prune_channels(Turned(), COLOUR, 0.5)
    with pytest.raises(ValueError, match="no channel"):
        prune_channels(Turned(), COLOUR, 0.5, keep=["a"])


def test_layers_that_cannot_be_cut_are_named():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"'1' is a LayerNorm, which cannot be cut; .* '0' in keep"):
        prune_channels(model, torch.randn(2, 4), 0.5)


def test_a_parameter_outside_of_layers_is_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.b(self.a(x) * self.scale)

    with pytest.raises(ValueError, match=r"'a': its channels are read by a parameter of shape \(8,\)"):
        prune_channels(Scaled(), torch.randn(2, 4), 0.5)


def test_parametrised_networks_are_refused():
    model = SmallCNN(width=4)
    weight_norm(model.stage1[0])
    with pytest.raises(ValueError, match=r"stage1.0 is parametrised"):
        prune_channels(model, GREY, 0.5)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'tutelage\[compress\]'"):
        prune_channels(SmallCNN(width=4), GREY, 0.5)
