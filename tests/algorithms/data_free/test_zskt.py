"""ZSKT: the generator raises the disagreement; the student learns without data."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage import KD, Distillation
from tutelage.algorithms.data_free.dafl import DAFL
from tutelage.algorithms.data_free.generator import Generator
from tutelage.algorithms.data_free.zskt import ZSKT, belief_divergence
from tutelage.catalogue import methods
from tutelage.engine import fit
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.run import Interrupted
from tutelage.training import Training


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 4),
    )


def quadrants(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with one bright quadrant in noise; its number is the class."""
    labels = torch.arange(count) % 4
    images = 0.6 * torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    for number, (row, column) in enumerate(((0, 0), (0, 6), (6, 0), (6, 6))):
        images[labels == number, :, row : row + 6, column : column + 6] += 1.5
    return (images - images.mean()) / images.std(), labels


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    images, labels = quadrants(512, seed=0)
    model = network(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(5):
        for x, y in zip(images.split(64), labels.split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.98
    return model


def test_it_is_the_divergence_of_kd_with_a_gradient_to_both():
    torch.manual_seed(0)
    s, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    value = belief_divergence(s, t)
    torch.testing.assert_close(value, kd_divergence(s, t, temperature=1.0))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(value, (s, t)))
    assert torch.autograd.gradcheck(belief_divergence, (s.double(), t.double()))


def test_it_is_zero_for_equal_beliefs_and_finite_for_extreme_ones():
    z = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    assert belief_divergence(z, z) == 0
    value = belief_divergence(z, -z.detach())
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, z)[0]).all()
    half = belief_divergence(torch.randn(2, 3, dtype=torch.float16), torch.randn(2, 3, dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    assert belief_divergence(torch.randn(2, 3).double(), torch.randn(2, 3).double()).dtype == torch.float64
    with pytest.raises(ValueError, match="shape"):
        belief_divergence(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("mode", [True, False])
def test_steps_of_the_generator_raise_the_divergence_on_the_same_noise(teacher, mode):
    torch.manual_seed(1)
    student = network(4).train(mode)
    data = ZSKT(Generator((1, 12, 12), latent=16, width=16), steps=1, batch_size=32, generator_steps=5)
    data.attach(student, teacher)
    z = torch.randn(32, 16)
    data.noise = lambda: z
    before = data.disagreement(z).item()
    data.generate()
    one = data.disagreement(z).item()
    for _ in range(5):
        data.generate()
    assert before < one < data.disagreement(z).item()


def test_the_student_is_given_the_same_fresh_images_student_steps_times(teacher):
    torch.manual_seed(1)
    data = ZSKT(Generator((1, 12, 12), latent=16, width=16), steps=7, batch_size=8, student_steps=3)
    data.attach(network(4), teacher)
    batches = list(data)
    first, second, third = batches[0:3], batches[3:6], batches[6:]
    assert all(torch.equal(images, part[0]) for part in (first, second, third) for images in part)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(second[0], third[0])


def test_the_images_come_from_the_generator_after_its_step(teacher):
    torch.manual_seed(1)
    data = ZSKT(Generator((1, 12, 12), latent=16, width=16), steps=1, batch_size=8, lr=0.1)
    data.attach(network(4), teacher)
    z = torch.randn(8, 16)
    data.noise = lambda: z
    with torch.no_grad():
        old = data.learner(z)
    (given,) = data
    with torch.no_grad():
        torch.testing.assert_close(given, data.learner(z))
    assert not torch.allclose(given, old, atol=1e-3)


@pytest.mark.parametrize("kind", ["ZSKT", "DAFL"])
def test_a_student_learns_to_agree_with_the_teacher_on_real_images_it_never_saw(teacher, kind):
    torch.manual_seed(0)
    generator = Generator((1, 12, 12), latent=16, width=16, tanh=kind == "DAFL")
    if kind == "ZSKT":
        data = ZSKT(generator, steps=150, batch_size=32)
    else:
        data = DAFL(generator, steps=60, batch_size=64, lr=2e-3)
    student = network(4)
    real, _ = quadrants(400, seed=1)

    @torch.no_grad()
    def agreement() -> float:
        student.eval()
        return float((student(real).argmax(1) == teacher(real).argmax(1)).float().mean())

    start = agreement()
    weights = {k: v.clone() for k, v in teacher.state_dict().items()}
    distillation = Distillation(student, teacher, losses=[KD(temperature=1.0, weight=1.0)])
    data.attach(student, teacher)
    distillation.bind(next(iter(data))).train()
    optimizer = torch.optim.Adam(distillation.parameters(), lr=5e-3)
    for images in data:
        distillation(images).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert start < 0.5
    assert agreement() > 0.9
    assert all(torch.equal(weights[k], v) for k, v in teacher.state_dict().items())


class Stopping(KD):
    """KD that asks the run to stop, as Ctrl-C does, at its n-th training batch."""

    stop_at, seen = 0, 0

    def forward(self, student, teacher, batch):
        self.seen += self.training
        if self.training and self.seen == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(student, teacher, batch)


def test_a_run_of_the_engine_that_was_interrupted_goes_on_exactly(teacher, tmp_path):
    def run(out, stop: int = 0, resume: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        student, loss = network(2), Stopping(temperature=1.0, weight=1.0)
        data = ZSKT(Generator((1, 12, 12), latent=8, width=8), steps=6, batch_size=8, student_steps=4)
        loss.stop_at = stop
        settings = Training(epochs=2, lr=0.01, cpu=True, progress=False)
        fit(Distillation(student, teacher, [loss]), data, training=settings, out=out, resume=resume)
        return student.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", stop=9)  # the third batch of the second epoch, in the middle of its four
    resumed = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("name", ["student_steps", "generator_steps"])
def test_counts_that_are_not_positive_are_named(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        ZSKT(Generator((1, 4, 4), width=4), steps=1, **{name: 0})


def test_both_are_in_the_catalogue_as_data():
    entered = {m.name: (m.section, m.role) for m in methods()}
    assert entered["ZSKT"] == entered["DAFL"] == ("5.6", "data")
