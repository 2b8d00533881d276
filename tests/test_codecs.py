"""What comes back of logits: within the bound that each codec states, and measured as it is."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tutelage.cache_folder import Cache
from tutelage.codecs import Codec
from tutelage.functional import kd_divergence, top_k_kd


def back(codec, logits):
    kept = codec.encode(logits)
    shape = tuple(logits.shape[1:])
    for name, kind, inner in codec.fields(shape):
        assert kept[name].shape == (len(logits), *inner)
        assert kept[name].dtype == np.dtype(kind)
    return codec.decode({name: torch.from_numpy(value) for name, value in kept.items()}, shape)


def peaked(rows=400, classes=1000, seed=0):
    """A sure teacher of 1,000 classes: Gaussian logits of standard deviation 1.5, the right class raised by 16 ± 2, two
    of its neighbours by 11 ± 2. The likeliest class has 90 % in the mean, the ten likeliest 99.9 %."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, classes, generator=generator)
    places = torch.stack([torch.randperm(classes, generator=generator)[:3] for _ in range(rows)])
    raised = torch.tensor([16.0, 11.0, 11.0]) + 2 * torch.randn(rows, 3, generator=generator)
    return logits.scatter_add(1, places, raised)


SHAPES = [(7, 5), (7, 4, 5), (7, 5, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_the_logits_bit_for_bit(shape):
    logits = 100 * torch.randn(shape)
    assert torch.equal(back(Codec("float32"), logits), logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_float16_is_the_nearest_number(shape):
    logits = 100 * torch.randn(shape)
    assert torch.equal(back(Codec("float16"), logits), logits.half().float())


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_wrong_by_half_a_step_of_its_own_row(shape):
    logits = torch.randn(shape) * torch.logspace(-3, 2, 7).reshape(-1, *[1] * (len(shape) - 1)) + 50
    found, axis = back(Codec("int8"), logits), 1 if len(shape) == 4 else -1
    step = (logits.amax(axis, keepdim=True) - logits.amin(axis, keepdim=True)) / 255
    assert ((found - logits).abs() <= 0.5 * step + 1e-5).all()
    assert torch.equal(back(Codec("int8"), torch.full((3, 4), 7.0)), torch.full((3, 4), 7.0))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_keeps_masses_at_its_temperature_and_spreads_the_rest(temperature):
    logits = 3 * torch.randn(6, 9)
    p = (logits / temperature).softmax(1)
    q = (back(Codec("top_k", 4, temperature), logits) / temperature).softmax(1)
    order = p.argsort(1, descending=True)
    torch.testing.assert_close(q.gather(1, order[:, :4]), p.gather(1, order[:, :4]))
    rest = q.gather(1, order[:, 4:])
    torch.testing.assert_close(rest, (1 - p.gather(1, order[:, :4]).sum(1, keepdim=True)).expand(6, 5) / 5)
    assert torch.equal(q.argmax(1), p.argmax(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_of_every_class_is_the_distribution(shape):
    logits = torch.randn(shape)
    axis = 1 if len(shape) == 4 else -1
    torch.testing.assert_close(back(Codec("top_k", 99), logits), logits.log_softmax(axis))


def test_the_error_is_the_divergence_and_has_a_formula():
    """KL(full ‖ even tail) = tail · (log(C − k) − the tail's own entropy)."""
    logits, codec = 2 * torch.randn(5, 30), Codec("top_k", 6, 2.0)
    found = codec.nats(logits, back(codec, logits))
    p = (logits.double() / 2).softmax(1).sort(1, descending=True).values[:, 6:]
    tail = p.sum(1)
    entropy = -(p / tail[:, None] * (p / tail[:, None]).log()).sum(1)
    torch.testing.assert_close(found, tail * (math.log(24) - entropy), rtol=1e-4, atol=1e-7)
    rounded = Codec("int8")
    back_of = back(rounded, logits)
    whole = kd_divergence(back_of.double(), logits.double(), temperature=1.0)
    assert float(rounded.nats(logits, back_of).mean()) == pytest.approx(float(whole), rel=1e-4)


def test_more_classes_are_never_worse():
    logits = 2 * torch.randn(50, 40)
    found = [Codec("top_k", k).nats(logits, back(Codec("top_k", k), logits)) for k in (1, 3, 10, 30, 40)]
    assert all((later <= earlier + 1e-9).all() for earlier, later in pairwise(found))
    assert float(found[-1].max()) < 1e-12


def test_losses_on_the_bucket_are_exact_and_mass_that_leaks_out_of_the_k_is_not_free():
    student, logits = torch.randn(40, 50), 3 * torch.randn(40, 50)
    kept = back(Codec("top_k", 10, 2.0), logits)
    torch.testing.assert_close(top_k_kd(student, kept, 10, 2.0), top_k_kd(student, logits, 10, 2.0))
    inside = logits.argsort(1, descending=True)[:, :10]
    leaking = (kept + 4).scatter(1, inside, kept.gather(1, inside))
    assert float(kd_divergence(leaking, kept, temperature=2.0)) > 0.05
    assert float(kd_divergence(kept, kept, temperature=2.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["float32", "float16", "int8", "top_k"])
def test_extreme_logits_come_back_finite(name):
    logits = torch.tensor([[500.0, -500.0, 0.0, 499.0], [0.0, 0.0, 0.0, 0.0], [-500.0] * 3 + [500.0]])
    codec = Codec(name, k=2)
    found = back(codec, logits)
    assert torch.isfinite(found).all()
    assert torch.isfinite(codec.nats(logits, found)).all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec.encode(torch.tensor([[0.0, float("inf")]]))


def test_ten_of_a_thousand_classes_are_small_and_true_for_a_sure_teacher(tmp_path):
    """5 % of the size in float32 and 0.01 nats, as whole rows on disk with their checksums."""
    logits = peaked()
    held = Cache(tmp_path, {"teacher": {}, "seed": 0, "views": 1, "codec": Codec("top_k", 10).about})
    held.write("@logits", np.arange(400), logits, np.zeros(400, np.uint32))
    (line,) = held.held()
    assert line.row_bytes <= 0.05 * line.float32_bytes
    assert line.nats <= 0.01
    assert line.mass >= 0.99
    records, _ = held.read(["@logits"], np.arange(400))
    whole = kd_divergence(held.decode("@logits", records["@logits"]).double(), logits.double(), temperature=1.0)
    assert line.nats == pytest.approx(float(whole), rel=1e-4)
    unsure = Cache(tmp_path / "b", {"teacher": {}, "seed": 0, "views": 1, "codec": Codec("top_k", 10).about})
    unsure.write("@logits", np.arange(400), logits / 4, np.zeros(400, np.uint32))
    assert unsure.held()[0].nats > 0.01  # a diffuse teacher's tail is not: the number says so


@pytest.mark.parametrize("name", ["float16", "int8"])
def test_half_and_quarter_of_the_size(name, tmp_path):
    held = Cache(tmp_path, {"teacher": {}, "seed": 0, "views": 1, "codec": {"name": name}})
    held.write("@logits", np.arange(400), peaked(), np.zeros(400, np.uint32))
    (line,) = held.held()
    assert line.row_bytes / line.float32_bytes == pytest.approx({"float16": 0.503, "int8": 0.255}[name], abs=1e-6)
    assert line.nats < {"float16": 1e-5, "int8": 1e-3}[name]


def test_many_classes_have_wide_indices():
    codec, logits = Codec("top_k", 2), torch.zeros(1, 70_000)
    logits[0, 69_999], logits[0, 66_000] = 9, 8
    assert codec.encode(logits)["classes"].tolist() == [[69_999, 66_000]]
    assert back(codec, logits).argmax() == 69_999
