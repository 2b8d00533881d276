"""What a teacher's weights are worth: its derived student against the same architecture with fresh weights."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tutelage import KD, FewerLayers, LowRank, Prune, Quantized, Separable, TaskLoss, Training, distill, evaluate
from tutelage.data import Loaders, fashion_loaders
from tutelage.models import SmallCNN, SmallTransformer

SETTINGS = {"optimizer": "adamw", "scheduler": "onecycle", "progress": False}


@functools.cache
def data() -> Loaders:
    return fashion_loaders(limit=1000, validation=400, batch_size=50)


@functools.cache
def trained(layers: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = SmallTransformer(32, 4, 4) if layers else SmallCNN(width=12)
    training = Training(epochs=4, lr=0.003 if layers else 0.01, seed=seed, **SETTINGS)
    distill(network, None, data().train, data().validation, training=training)
    return network


def fresh(student: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    student = copy.deepcopy(student)
    for module in student.modules():
        if parametrize.is_parametrized(module):
            nn.init.kaiming_uniform_(module.parametrizations.weight.original, a=5**0.5)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return student


@pytest.mark.parametrize("builder", [FewerLayers(), Separable(), LowRank(0.25), Prune(0.5), Quantized(4)], ids=str)
def test_the_teachers_weights_are_a_better_start(builder):
    for kind, package in ((Prune, "torch_pruning"), (Quantized, "torchao")):
        if isinstance(builder, kind):
            pytest.importorskip(package)
    for seed in (0, 1):
        teacher = trained(isinstance(builder, FewerLayers), seed)
        student = builder(teacher, torch.zeros(1, 1, 28, 28))
        reached = []
        for network in (student, fresh(student, seed)):
            training = Training(epochs=1, lr=0.003, seed=seed, **SETTINGS)
            distill(
                network,
                teacher,
                data().train,
                losses=[TaskLoss(weight=0.1), KD(temperature=4.0, weight=0.9)],
                training=training,
            )
            reached.append(evaluate(network, data().validation).accuracy)
        assert reached[0] > reached[1] + 0.05
