"""The last linear layer of a network, for losses that judge features by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage import taps
from tutelage.record import in_float32
from tutelage.taps import Observer
from tutelage.views import Inputs


def pooled(features: Tensor) -> Tensor:
    """What a classifier reads of a map (B, C, H, W): its mean over positions; a vector (B, C) as it is.

    Raises:
        ValueError: other numbers of axes.

    >>> pooled(torch.tensor([[[[1.0, 3.0]]]]))
    tensor([[2.]])
    """
    if features.ndim not in (2, 4):
        raise ValueError(
            f"features of shape {tuple(features.shape)}: expected a map (B, C, H, W) or a vector (B, C), "
            "which a linear classifier reads"
        )
    return features.mean((2, 3)) if features.ndim == 4 else features


def last_linear(model: nn.Module, inputs: Inputs) -> tuple[str, nn.Linear]:
    """The name of the last linear layer that a forward pass calls, and the layer.

    Raises:
        ValueError: the model has none.

    >>> name, layer = last_linear(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), Inputs((torch.ones(2, 4),)))
    >>> name, layer
    ('1', Linear(in_features=3, out_features=2, bias=True))
    """
    name = taps.embedding(model, inputs).removesuffix(":input")
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return name, layer


def classifier_of(model: nn.Module, inputs: Inputs, address: str) -> nn.Linear:
    """A network's last linear layer, once it is certain that it makes the logits from what is at ``address``.

    Args:
        model: in eval mode.
        inputs: a few samples.
        address: of the map whose mean over positions the layer reads, or of the vector.

    Raises:
        ValueError: there is no linear layer, it reads something else than ``address``, or something stands after it (an
            adapter, a scale, a cap).

    >>> from tutelage.models import SmallCNN
    >>> classifier_of(SmallCNN(width=4).eval(), Inputs((torch.randn(2, 1, 8, 8),)), "stage3")
    Linear(in_features=16, out_features=10, bias=True)
    """
    name, layer = last_linear(model, inputs)
    with torch.no_grad():
        record = Observer(model, [address, "@logits"]).dry_run(inputs)
    features, logits = pooled(record[address]), record.logits
    if features.shape[1] != layer.in_features:
        raise ValueError(
            f"the classifier {name!r} reads {layer.in_features} features, and {address!r} has {features.shape[1]} "
            f"(shape {tuple(record[address].shape)}): name the map or vector that it reads"
        )
    said = classify(features, layer)
    tolerance = (1e-3 if layer.weight.dtype in (torch.float32, torch.float64) else 0.05) * float(logits.abs().max())
    if said.shape != logits.shape or not torch.allclose(said, logits, rtol=0, atol=tolerance + 1e-6):
        raise ValueError(
            f"the logits are not what the last linear layer {name!r} says of the mean over positions of {address!r}: "
            "name the map or vector that it reads; a head with more than one linear layer cannot be taken over"
        )
    return layer


def classify(features: Tensor, layer: nn.Linear) -> Tensor:
    """The layer applied in the precision of the features, at least float32."""
    features = in_float32(features)
    bias = None if layer.bias is None else layer.bias.to(features)
    return F.linear(features, layer.weight.to(features), bias)


def last_features(model: nn.Module, inputs: Inputs) -> str:
    """The address of the last map whose mean over positions a network's classifier reads; otherwise of the vector.

    >>> from tutelage.models import MLP, SmallCNN
    >>> last_features(SmallCNN(width=4).eval(), Inputs((torch.randn(2, 1, 8, 8),)))
    'stage3'
    >>> last_features(MLP(8, (4,), 3).eval(), Inputs((torch.randn(2, 8),)))
    'linear:input'
    """
    try:
        address = taps.stages(model, inputs)[-1].address
        classifier_of(model, inputs, address)
    except ValueError:  # no maps, or no mean over them
        return taps.embedding(model, inputs)
    return address
