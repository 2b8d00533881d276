"""The networks against the papers' facts: parameter counts, shapes, published weights."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from torch import nn

from tutelage import models
from tutelage.data import load_packed

# Parameters for 100 classes, of the networks of "Contrastive Representation Distillation" (arXiv:1910.10699).
COUNTS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenetv2_half": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}

# Logits that the study's published code gives for `wave_filled` weights and `wave_image`, in float64.
LOGITS = {
    "resnet8": [6.54795654, 58.1419738, 72.966366, 41.6588717],
    "resnet8x4": [-69.7244286, -168.729155, 404.051306, -632.783237],
    "wrn_16_2": [477001.708, 1564957.13, -679082.702, -1477267.79],
    "vgg8": [108.820903, 183.810407, 246.625371, 293.07162],
    "mobilenetv2_half": [11.2981351, -29.4388638, 35.5009145, -27.2652287],
    "shufflenetv1": [118194.81, -62289.1545, -237178.51, -390765.242],
    "shufflenetv2": [10.3547312, 23.5862444, 30.6764073, 29.768182],
}

# Address of a stage -> channels and side of its output for a 32x32 image.
STAGES = {
    "resnet8": {"layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)},
    "resnet8x4": {"conv1": (32, 32), "layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8)},
    "wrn_16_2": {"conv1": (16, 32), "layer1": (32, 32), "layer2": (64, 16), "layer3": (128, 8)},
    "vgg8": {"block1": (64, 32), "block2": (128, 16), "block3": (256, 8), "block4": (512, 4), "block5": (512, 4)},
    "mobilenetv2_half": {
        "stem": (16, 16),
        "stages.1": (12, 16),
        "stages.2": (16, 8),
        "stages.4": (48, 4),
        "stages.6": (160, 2),
        "head": (1280, 2),
    },
    "shufflenetv1": {"conv1": (24, 32), "layer1": (240, 16), "layer2": (480, 8), "layer3": (960, 4)},
    "shufflenetv2": {"conv1": (24, 32), "layer1": (116, 16), "layer2": (232, 8), "layer3": (464, 4), "head": (1024, 4)},
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def wave_filled(model: nn.Module) -> nn.Module:
    """Weights that anyone can rebuild: a sine whose phase is the tensor's number in the state dict."""
    for k, (name, tensor) in enumerate(model.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + k).reshape(tensor.shape)
        if tensor.ndim > 1:
            tensor.copy_(wave * math.sqrt(4 / tensor[0].numel()))
        elif name.endswith(("running_mean", "bias")):
            tensor.copy_(0.1 * wave)
        else:
            tensor.copy_(1 + 0.3 * wave)
    return model


def wave_image() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37).reshape(2, 3, 32, 32)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_count_is_the_studys(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(models.create(name, num_classes=100)) == count


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_the_studys(name: str) -> None:
    model = wave_filled(models.create(name, num_classes=4).double()).eval()
    with torch.no_grad():
        logits = model(wave_image())[1]
    torch.testing.assert_close(logits, torch.tensor(LOGITS[name], dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", STAGES)
def test_stage_shapes(name: str) -> None:
    model = models.create(name, num_classes=7).eval()
    seen: dict[str, tuple[int, ...]] = {}
    for address in STAGES[name]:
        model.get_submodule(address).register_forward_hook(
            lambda _module, _inputs, output, address=address: seen.update({address: tuple(output.shape)})
        )
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert seen == {a: (2, channels, side, side) for a, (channels, side) in STAGES[name].items()}


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2_half", "shufflenetv1", "shufflenetv2"])
def test_grey_images_and_a_training_step(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name, num_classes=3, in_channels=1)
    model(torch.randn(2, 1, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    assert isinstance(model.linear, nn.Linear)


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_padded_shortcuts_add_no_parameters(depth: int, count: int) -> None:
    model = models.CifarResNet(depth, shortcut="padding")
    assert parameters(model) == count
    assert not any("downsample" in name for name in model.state_dict())


def test_padded_shortcut_is_subsampling_and_zeros() -> None:
    block = models.CifarResNet(8, shortcut="padding").layer2[0].eval()
    x = torch.randn(2, 16, 8, 8).relu()
    nn.init.zeros_(block.bn2.weight)  # the residual branch is silent, so that the block is its shortcut
    expected = torch.zeros(2, 32, 4, 4)
    for n in range(2):
        for c in range(16):
            for i in range(4):
                for j in range(4):
                    expected[n, c + 8, i, j] = x[n, c, 2 * i, 2 * j]
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_cifar10_teachers_load_and_agree(depth: int, data_root) -> None:
    path = data_root / "cifar10" / "teachers" / f"resnet{depth}.pt"
    loader = data_root / "kdload.py"
    if not path.is_file() or not loader.is_file():
        pytest.skip("no CIFAR-10 teachers")
    spec = importlib.util.spec_from_file_location("kdload", loader)
    kdload = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kdload)
    ours = models.create(f"resnet{depth}", shortcut="padding").eval()
    assert models.load_weights(ours, path) == ([], [])
    theirs = kdload.cifar_resnet(depth, 10, torch.load(path, weights_only=True)).eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(depth))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_published_resnet20_classifies_cifar10(data_root) -> None:
    path = data_root / "cifar10" / "teachers" / "resnet20.pt"
    if not path.is_file():
        pytest.skip("no CIFAR-10 teachers")
    teacher = models.resnet20(shortcut="padding").eval()
    models.load_weights(teacher, path)
    test = load_packed(data_root / "cifar10" / "test.npz")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = torch.from_numpy(((test["images"][:500] / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        right = teacher(x).argmax(1).numpy() == test["labels"][:500]
    assert right.mean() > 0.88


@pytest.mark.parametrize("depth", [0, 7, 9, 21])
def test_impossible_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        models.CifarResNet(depth)
    with pytest.raises(ValueError, match=rf"6n \+ 4.*got {depth}"):
        models.WideResNet(depth, 1)


def test_other_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="shortcut must be 'projection' or 'padding', got 'pad'"):
        models.resnet8(shortcut="pad")
    with pytest.raises(ValueError, match="five positive counts"):
        models.VGG((1, 1, 1))
    with pytest.raises(ValueError, match="width=0"):
        models.SmallCNN(width=0)


def test_small_networks() -> None:
    student, teacher = models.SmallCNN(width=8), models.SmallCNN(width=64, in_channels=3, num_classes=5)
    assert parameters(student) < 25_000
    assert teacher(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    deep = models.SmallCNN(width=4, depth=2)
    assert sum(isinstance(m, nn.Conv2d) for m in deep.modules()) == 6
    assert student.stage3(torch.randn(1, 16, 7, 7)).shape == (1, 32, 7, 7)


def test_mlp_without_hidden_layers_is_linear() -> None:
    model = models.MLP(12, hidden=(), num_classes=3)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(model(x), x.reshape(5, 12) @ model.linear.weight.T + model.linear.bias)
    assert parameters(models.MLP(784, (50, 20), 10)) == 784 * 50 + 50 + 50 * 20 + 20 + 20 * 10 + 10
