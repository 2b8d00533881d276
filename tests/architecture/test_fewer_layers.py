"""Fewer layers: which blocks go, and that those that stay are the teacher's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage import FewerLayers
from tutelage.models import SmallCNN, SmallTransformer, resnet8, resnet20, resnet32, wrn_40_1

GREY, COLOUR = torch.randn(2, 1, 28, 28), torch.randn(2, 3, 32, 32)


def kept(builder: FewerLayers, model: nn.Module, example=COLOUR) -> dict[str, list[int]]:
    return {name: stage["kept"] for name, stage in builder.derive(model, example)[1]["stages"].items()}


def same(student: nn.Module, teacher: nn.Module) -> bool:
    mine, theirs = student.state_dict(), teacher.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_evenly_spaced_ones_are_those_that_distilbert_starts_from():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(12))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    assert kept(FewerLayers(6), Deep(), torch.randn(2, 4)) == {"layers": [0, 2, 4, 7, 9, 11]}
    assert kept(FewerLayers(1), Deep(), torch.randn(2, 4)) == {"layers": [0]}
    for count in range(2, 12):
        positions = kept(FewerLayers(count), Deep(), torch.randn(2, 4))["layers"]
        assert len(set(positions)) == count
        assert (positions[0], positions[-1]) == (0, 11)


@pytest.mark.parametrize(
    ("builder", "expected"),
    [
        (FewerLayers(), {"layer1": [0, 2, 4], "layer2": [0, 2, 4], "layer3": [0, 2, 4]}),
        (FewerLayers(2), {"layer1": [0, 4], "layer2": [0, 4], "layer3": [0, 4]}),
        (FewerLayers(2, "first"), {"layer1": [0, 1], "layer2": [0, 1], "layer3": [0, 1]}),
        # a stage's first block changes the shape, except the first stage's
        (FewerLayers(2, "last"), {"layer1": [3, 4], "layer2": [0, 4], "layer3": [0, 4]}),
        (FewerLayers(every=3), {"layer1": [0, 3], "layer2": [0, 3], "layer3": [0, 3]}),
        (FewerLayers([0, 3]), {"layer1": [0, 3], "layer2": [0, 3], "layer3": [0, 3]}),
        (FewerLayers({"layer1": [1], "layer3": 0.25}), {"layer1": [1], "layer3": [0, 4]}),
        (FewerLayers({"layer*": 1}), {"layer1": [0], "layer2": [0], "layer3": [0]}),
    ],
)
def test_which_blocks_stay(builder, expected):
    teacher = resnet32()
    student, structure = builder.derive(teacher, COLOUR)
    assert {name: stage["kept"] for name, stage in structure["stages"].items()} == expected
    for name, positions in expected.items():
        for mine, position in zip(student.get_submodule(name), positions, strict=True):
            assert same(mine, teacher.get_submodule(name)[position])
    assert same(student.conv1, teacher.conv1)
    assert same(student.linear, teacher.linear)


def test_a_block_that_adds_nothing_can_go_without_a_trace():
    """If the last batch norm of every block that goes is 0, a residual network is the same without it."""
    torch.manual_seed(0)
    teacher = resnet20().eval()
    for stage in (teacher.layer1, teacher.layer2, teacher.layer3):
        nn.init.zeros_(stage[1].bn2.weight)
        nn.init.zeros_(stage[1].bn2.bias)
    student = FewerLayers([0, 2])(teacher, COLOUR).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(COLOUR), teacher(COLOUR), rtol=0, atol=0)
        assert not torch.allclose(FewerLayers([0, 1])(teacher, COLOUR).eval()(COLOUR), teacher(COLOUR))


def test_the_plain_smaller_network_takes_its_weights():
    student = FewerLayers({"layer*": 1})(resnet20(), COLOUR)
    resnet8().load_state_dict(student.state_dict())
    shallow = FewerLayers({"layers": 2})(SmallTransformer(16, 4, 2), GREY)
    SmallTransformer(16, 2, 2).load_state_dict(shallow.state_dict())


def test_other_networks():
    assert list(kept(FewerLayers(2), wrn_40_1()).values()) == 3 * [[0, 5]]
    torchvision = pytest.importorskip("torchvision.models")
    assert kept(FewerLayers(), torchvision.resnet18()) == {f"layer{n}": [0] for n in (1, 2, 3, 4)}
    assert kept(FewerLayers(), torchvision.resnet50())["layer3"] == [0, 2, 5]
    # stages inside blocks: the expansion of an inverted residual is none, and neither are lone blocks' insides
    assert list(kept(FewerLayers(), torchvision.mobilenet_v2())) == ["features"]
    assert all(
        name.count(".") == 1 for name in kept(FewerLayers(), torchvision.efficientnet_b0(), torch.randn(2, 3, 64, 64))
    )


def test_a_timm_transformer():
    timm = pytest.importorskip("timm")
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=6)
    student, structure = FewerLayers().derive(teacher, COLOUR)
    assert structure == {"stages": {"blocks": {"of": 6, "kept": [0, 2, 5]}}}
    assert [same(mine, teacher.blocks[n]) for mine, n in zip(student.blocks, (0, 2, 5), strict=True)] == 3 * [True]
    assert student(COLOUR).shape == (2, 10)


def test_transformers_and_their_configurations():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    ids = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    teacher = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=6, **sizes))
    student = FewerLayers(3)(teacher, ids)
    assert (student.config.num_hidden_layers, teacher.config.num_hidden_layers) == (3, 6)
    assert student.config is student.bert.config
    transformers.BertForSequenceClassification(student.config).load_state_dict(student.state_dict())
    assert len(student(**ids, output_hidden_states=True).hidden_states) == 4

    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Qwen3Config(
        num_hidden_layers=4,
        layer_types=kinds,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        use_sliding_window=True,
        **sizes,
    )
    student = FewerLayers([1, 2])(transformers.Qwen3ForCausalLM(config), ids)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    # the layers' numbers are those of their part of the cache: with it and without it the same is said
    student.eval()
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    said = [student.generate(**ids, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*said)


class Branches(nn.Module):
    """Blocks beside each other."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


@pytest.mark.parametrize(
    ("builder", "model", "example", "said"),
    [
        (FewerLayers(), SmallCNN(width=4), GREY, "SmallCNN has no block that could go: expected an nn.Sequential"),
        (FewerLayers(), Branches(), torch.randn(2, 4), "Branches has no block that could go"),
        (FewerLayers([0, 3]), resnet20(), COLOUR, "'layer1' has no block 3; expected 0 to 2"),
        (
            FewerLayers([1, 2]),
            resnet20(),
            COLOUR,
            r"layer2.0 cannot go: it makes \(2, 32, 16, 16\) of \(2, 16, 32, 32\)",
        ),
        (FewerLayers([0, 0]), resnet20(), COLOUR, r"keep=\[0, 0\] of 'layer1': expected different positions"),
        (FewerLayers({"layer1": []}), resnet20(), COLOUR, r"keep=\[\] of 'layer1'"),
        (FewerLayers({"layer4": 1}), resnet20(), COLOUR, "no stage 'layer4' in this CifarResNet; nearest: 'layer"),
        (FewerLayers(0), resnet20(), COLOUR, "keep=0: expected a share"),
        (FewerLayers(1.5), resnet20(), COLOUR, "keep=1.5: expected a share"),
        (
            FewerLayers(3),
            resnet20(),
            COLOUR,
            "keep=3: every block stays; expected fewer than there are in 'layer1' of 3",
        ),
        (FewerLayers(every=1), resnet20(), COLOUR, "every=1: expected 2 or more"),
        (FewerLayers(2, every=2), resnet20(), COLOUR, "every=2: expected 2 or more, and neither keep nor which"),
        (FewerLayers(which="middle"), resnet20(), COLOUR, "which='middle'"),
    ],
)
def test_mistakes_are_named(builder, model, example, said):
    with pytest.raises(ValueError, match=said):
        builder(model, example)
