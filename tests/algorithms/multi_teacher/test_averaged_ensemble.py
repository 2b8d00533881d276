from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation, Loss, TaskLoss
from tutelage.algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble, average_logits


class Net(nn.Module):
    def __init__(self, width: int = 6, classes: int = 4):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)))


class MeanSquare(Loss):
    def forward(self, student, teacher, batch):
        return sum((s - t).square().mean() for s, t in self.tensors(student, teacher))


def members(n: int = 3) -> list[Net]:
    torch.manual_seed(0)
    return [Net(4 + i).eval() for i in range(n)]


X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softmax_of_averaged_probabilities_is_their_average(temperature):
    nets = members()
    z = AveragedEnsemble(nets, average="probabilities", temperature=temperature, weights=[1, 2, 5])(X)
    naive = sum(w / 8 * (n(X) / temperature).softmax(1) for w, n in zip((1, 2, 5), nets, strict=True))
    torch.testing.assert_close((z / temperature).softmax(1), naive)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_averaged_logits_are_the_geometric_mean_at_any_temperature(temperature):
    nets = members()
    z = AveragedEnsemble(nets)(X)
    torch.testing.assert_close(z, sum(n(X) for n in nets) / 3)
    mean = torch.stack([(n(X) / temperature).softmax(1) for n in nets]).prod(0) ** (1 / 3)
    torch.testing.assert_close((z / temperature).softmax(1), mean / mean.sum(1, keepdim=True))


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_equal_members_say_what_one_says(average):
    z = members(1)[0](X)
    both = average_logits([z, z, z], weights=[0.2, 0, 3], average=average, temperature=2.5)
    torch.testing.assert_close((both / 2.5).log_softmax(1), (z / 2.5).log_softmax(1))


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 4, 3, 3)])
def test_classes_are_found_in_dense_and_sequence_outputs(shape):
    a, b = torch.randn(shape), torch.randn(shape)
    axis = 1 if len(shape) == 4 else -1
    z = average_logits([a, b], average="probabilities")
    torch.testing.assert_close(z.softmax(axis), (a.softmax(axis) + b.softmax(axis)) / 2)


def test_extreme_logits_and_dtypes():
    a = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    z = average_logits([a, -a], weights=[1, 0], average="probabilities")
    z.sum().backward()
    assert torch.isfinite(z).all()
    assert torch.isfinite(a.grad).all()
    assert average_logits([a.half(), a.half()]).dtype == torch.float32
    assert average_logits([a.double(), a.double()], average="probabilities").dtype == torch.float64


def test_as_a_teacher_it_is_frozen_and_its_members_can_be_tapped():
    nets = members()
    ensemble = AveragedEnsemble(nets)
    before = copy.deepcopy(ensemble.state_dict())
    student = Net(4)
    d = Distillation(
        student, ensemble.train(), losses=[TaskLoss(), KD(), MeanSquare(("layer2.1", "members.0.layer2"), weight=1.0)]
    ).bind((X, Y))
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    losses = d((X, Y))
    losses.total.backward()
    optimizer.step()
    torch.testing.assert_close(
        d.teacher.observer(d.views((X, Y)).teacher)["members.0.layer2"], nets[0].eval().layer2(nets[0].layer1(X))
    )
    assert not any(m.training for m in ensemble.modules())
    assert all(torch.equal(before[k], v) for k, v in ensemble.state_dict().items())
    assert len(list(d.parameters())) == len(list(student.parameters()))


def test_a_student_comes_closer_to_the_average_than_to_its_members():
    nets = members()
    with torch.no_grad():
        for net in nets:
            net.fc.weight.mul_(4)
    ensemble = AveragedEnsemble(nets, average="probabilities", temperature=2.0)
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 4))
    d = Distillation(student, ensemble, losses=[KD(temperature=2.0, weight=1.0)]).bind((X, Y))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        d((X, Y)).total.backward()
        optimizer.step()
    with torch.no_grad():
        p = (student(X) / 2).softmax(1)
        mean = sum((n(X) / 2).softmax(1) for n in nets) / 3
        to_average = (p - mean).abs().sum()
        to_members = [(p - (n(X) / 2).softmax(1)).abs().sum() for n in nets]
    assert to_average < 0.2 * min(to_members)


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match=r"members differ in classes: \[4, 3\]"):
        AveragedEnsemble([Net(), Net(classes=3)])(X)
    with pytest.raises(ValueError, match="weights="):
        AveragedEnsemble([Net(), Net()], weights=[1.0])
    with pytest.raises(ValueError, match="weights="):
        AveragedEnsemble([Net(), Net()], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="average='mean'"):
        AveragedEnsemble([Net()], average="mean")
    with pytest.raises(ValueError, match="temperature=0"):
        AveragedEnsemble([Net()], temperature=0)
    with pytest.raises(ValueError, match="at least one"):
        AveragedEnsemble([])
    with pytest.raises(TypeError, match=r"members\[0\]"):
        AveragedEnsemble([3])
