"""The transformer against torch's own attention and encoder layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import models
from tutelage.deploy.export import export
from tutelage.models import SmallTransformer, TransformerOutput
from tutelage.models.small_transformer import SelfAttention
from tutelage.taps import stages
from tutelage.views import Inputs


def test_attention_is_torchs() -> None:
    torch.manual_seed(0)
    attention, x = SelfAttention(12, heads=3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    found, probabilities = attention(x)
    torch_own = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    torch_own.in_proj_weight.data, torch_own.in_proj_bias.data = attention.qkv.weight.data, attention.qkv.bias.data
    torch_own.out_proj.load_state_dict(attention.out.state_dict())
    expected, weights = torch_own(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(probabilities, weights)


def test_the_network_is_torchs_encoder_on_patches_and_a_class_token() -> None:
    torch.manual_seed(0)
    model, images = SmallTransformer(8, depth=2, heads=2, patch=4, image_size=8).double(), torch.randn(3, 1, 8, 8)
    images = images.double()
    output = model(images)
    assert isinstance(output, TransformerOutput)
    cut = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(1, 3).flatten(2)  # (3, 4 patches, 16 pixels)
    tokens = F.linear(cut, model.patches.weight.flatten(1), model.patches.bias)
    x = torch.cat([model.class_token.expand(3, 1, 8), tokens], dim=1) + model.positions
    torch.testing.assert_close(output.hidden_states[0], x)
    for n, layer in enumerate(model.layers):
        own = nn.TransformerEncoderLayer(
            8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        own.self_attn.in_proj_weight.data = layer.attention.qkv.weight.data
        own.self_attn.in_proj_bias.data = layer.attention.qkv.bias.data
        own.self_attn.out_proj.load_state_dict(layer.attention.out.state_dict())
        own.linear1.load_state_dict(layer.mlp[0].state_dict())
        own.linear2.load_state_dict(layer.mlp[2].state_dict())
        own.norm1.load_state_dict(layer.norm1.state_dict())
        own.norm2.load_state_dict(layer.norm2.state_dict())
        x = own(x)
        torch.testing.assert_close(output.hidden_states[n + 1], x)
    torch.testing.assert_close(output.logits, model.linear(model.norm(x)[:, 0]))


def test_shapes_and_a_training_step() -> None:
    torch.manual_seed(0)
    model = models.create("SmallTransformer", width=16, depth=3, heads=4, in_channels=3, image_size=14, num_classes=5)
    output = model(torch.randn(2, 3, 14, 14))
    assert output.logits.shape == (2, 5)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 5, 16)] * 4
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 5, 5)] * 3
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 5))
    output.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = model.train()(torch.ones(2, 3, 14, 14))
    assert torch.equal(again.logits, model.eval()(torch.ones(2, 3, 14, 14)).logits)


def test_its_stages_are_its_layers() -> None:
    found = stages(SmallTransformer(8, depth=3, heads=2), Inputs((torch.rand(2, 1, 28, 28),)))
    assert [line.address for line in found] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_its_logits_are_exported_for_any_batch(suffix, tmp_path) -> None:
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    data = [(torch.rand(n, 1, 28, 28),) for n in (3, 5)]
    model = SmallTransformer(8, depth=1, heads=2)
    exported = export(model, (data[0][0][:1],), tmp_path / f"model.{suffix}", data=data)
    assert exported.samples == 8
    assert exported.max_abs_error < 1e-4
    assert isinstance(model(data[0][0]), TransformerOutput), "the model itself is as it was"


@pytest.mark.parametrize("sizes", [{"width": 9}, {"image_size": 30}, {"depth": 0}, {"heads": 0}])
def test_sizes_that_do_not_fit_are_named(sizes) -> None:
    (name, value), *_ = sizes.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*a multiple of heads"):
        SmallTransformer(**sizes)
