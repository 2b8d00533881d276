"""Small reference networks of the papers, in plain torch; models by name; weights from and to files."""

from __future__ import annotations

from tutelage.models.cifar_resnet import (
    CifarResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from tutelage.models.dense import Detected, Joined, SmallDetector, SmallKeypoints
from tutelage.models.loading import create, load_weights, save_weights
from tutelage.models.mobilenetv2 import MobileNetV2, mobilenetv2_half
from tutelage.models.shufflenet_v1 import ShuffleNetV1, shufflenetv1
from tutelage.models.shufflenet_v2 import ShuffleNetV2, shufflenetv2
from tutelage.models.small import MLP, SmallCNN
from tutelage.models.small_language import SmallLanguageModel, SmallLSTM
from tutelage.models.small_transformer import SmallTransformer, TransformerOutput
from tutelage.models.vgg import VGG, vgg8, vgg11, vgg13, vgg16, vgg19
from tutelage.models.wide_resnet import WideResNet, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "MLP",
    "VGG",
    "CifarResNet",
    "Detected",
    "Joined",
    "MobileNetV2",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SmallCNN",
    "SmallDetector",
    "SmallKeypoints",
    "SmallLSTM",
    "SmallLanguageModel",
    "SmallTransformer",
    "TransformerOutput",
    "WideResNet",
    "create",
    "load_weights",
    "mobilenetv2_half",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
    "save_weights",
    "shufflenetv1",
    "shufflenetv2",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
