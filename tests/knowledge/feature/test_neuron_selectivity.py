from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage import Distillation
from tutelage.knowledge.feature import neuron_selectivity as file
from tutelage.knowledge.feature.neuron_selectivity import NeuronSelectivity, neuron_selectivity, selectivity_patterns
from tutelage.models import SmallCNN

KERNELS = ["linear", "polynomial", "gaussian"]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and 0 not in value.stride():
                self.numbers = max(self.numbers, value.numel())
        return result


def naive(student, teacher, kernel):
    """The definition, sample by sample and pair by pair."""

    def unit(channel):
        norm = sum(v * v for v in channel) ** 0.5
        return [v / norm for v in channel]

    def squared(x, y):
        return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = ([unit(c) for c in x.flatten(1).tolist()] for x in (s, t))
        sigma2 = sum(squared(x, y) for x in s + t for y in s + t) / len(s + t) ** 2

        def k(x, y, sigma2=sigma2):
            product = sum(a * b for a, b in zip(x, y, strict=True))
            if kernel == "gaussian":
                return math.exp(-squared(x, y) / (2 * sigma2))
            return product**2 if kernel == "polynomial" else product

        total += sum(
            sign * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))
            for sign, a, b in ((1, s, s), (1, t, t), (-2, s, t))
        )
    return total / len(student)


def test_reference_value_without_a_factor(agrees):
    agrees("nst_poly", neuron_selectivity)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", [2, 9])
def test_is_the_loop_over_samples_and_pairs_of_channels(kernel, channels):
    torch.manual_seed(0)
    student = torch.randn(2, channels, 2, 3, dtype=torch.float64)
    teacher = torch.randn(2, channels + 1, 2, 3, dtype=torch.float64)
    assert neuron_selectivity(student, teacher, kernel).item() == pytest.approx(naive(student, teacher, kernel))


def test_both_ways_of_the_polynomial_kernel_are_one():
    torch.manual_seed(0)
    s, t = (selectivity_patterns(torch.randn(3, c, 4, 5, dtype=torch.float64)) for c in (6, 8))
    torch.testing.assert_close(file._polynomial_by_positions(s, t), file._polynomial_by_channels(s, t))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_order_the_number_and_the_scale_of_the_channels_do_not_count_and_the_positions_do(kernel):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    scale = torch.rand(3, 5, 1, 1, dtype=torch.float64) + 0.1
    assert neuron_selectivity(scale * x.flip(1), x, kernel).abs() < 1e-15
    assert neuron_selectivity(x, x.repeat(1, 3, 1, 1), kernel).abs() < 1e-15
    assert neuron_selectivity(x.flip(2), x, kernel) > 1e-3


def test_only_the_polynomial_kernel_forgets_the_sign():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    assert neuron_selectivity(-x, x).abs() < 1e-15
    assert neuron_selectivity(-x, x, "linear") > 1e-3
    assert neuron_selectivity(-x, x, "gaussian") > 1e-3


def test_a_bandwidth_of_ones_own_and_one_that_is_given():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.randn(1, 6, 3, 3, dtype=torch.float64)
    patterns = torch.cat([selectivity_patterns(x)[0] for x in (student, teacher)])
    sigma2 = torch.cdist(patterns, patterns).square().mean().item()
    torch.testing.assert_close(
        neuron_selectivity(student, teacher, "gaussian"),
        neuron_selectivity(student, teacher, "gaussian", bandwidth=sigma2),
    )
    student.requires_grad_()
    own, given = (
        torch.autograd.grad(neuron_selectivity(student, teacher, "gaussian", bandwidth=b), student)[0]
        for b in (None, sigma2)
    )
    torch.testing.assert_close(own, given)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spoil", ["a silent channel", "all silent", "flat maps", "equal channels"])
def test_degenerate_patterns_have_sane_gradients(kernel, spoil):
    torch.manual_seed(0)
    student, teacher = torch.rand(3, 5, 4, 4), torch.rand(3, 7, 4, 4)
    if spoil == "a silent channel":
        student[:, 1] = 0
    elif spoil == "all silent":
        student.zero_(), teacher.zero_()
    elif spoil == "flat maps":
        student[:], teacher[:] = 0.3, 0.7
    else:
        student[:] = student[:, :1].clone()
        teacher[:] = student[:, :1].clone()
    value = neuron_selectivity(student.requires_grad_(), teacher, kernel)
    value.backward()
    assert value.isfinite()
    assert value > -1e-6
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_chunks_change_neither_value_nor_gradient(kernel):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, 3, 3, dtype=torch.float64), torch.randn(5, 6, 3, 3, dtype=torch.float64)
    student.requires_grad_()
    values = [neuron_selectivity(student, teacher, kernel, chunk=chunk) for chunk in (None, 2)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values))


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_is_one_gram_matrix_never_channels_by_channels_by_positions(kernel):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 48, 6, 6, requires_grad=True), torch.randn(4, 64, 6, 6)
    with Largest() as largest:
        neuron_selectivity(student, teacher, kernel, chunk=2).backward()
    assert largest.numbers <= max(2 * 64 * 64, 4 * 64 * 36) < 4 * 48 * 64 * 36
    wide = torch.randn(1, 256, 2, 2, requires_grad=True)
    with Largest() as largest:
        neuron_selectivity(wide, torch.randn(1, 256, 2, 2)).backward()
    assert largest.numbers <= 256 * 4 < 256 * 256


@pytest.mark.parametrize(("mine", "theirs"), [((8, 6), (4, 6)), ((4, 4), (8, 2))])
def test_the_larger_map_is_pooled_before_it_is_normalised(mine, theirs):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, *mine), torch.randn(2, 5, *theirs)
    size = [min(a, b) for a, b in zip(mine, theirs, strict=True)]
    pooled = [F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
    torch.testing.assert_close(neuron_selectivity(student, teacher), neuron_selectivity(*pooled))


def test_sequences_are_maps_with_their_channels_last():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    tokens = [x.flatten(2).mT for x in (student, teacher)]
    torch.testing.assert_close(neuron_selectivity(*tokens), neuron_selectivity(student, teacher))


def test_refusals():
    maps = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match="same tokens"):
        neuron_selectivity(torch.ones(2, 5, 3), torch.ones(2, 6, 3))
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        neuron_selectivity(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match="2 of the student, 3 of the teacher"):
        neuron_selectivity(maps, torch.ones(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"kernel='poly': expected one of \('linear', 'polynomial', 'gaussian'\)"):
        neuron_selectivity(maps, maps, "poly")
    with pytest.raises(ValueError, match="kernel='cubic'"):
        NeuronSelectivity(kernel="cubic")
    with pytest.raises(ValueError, match="bandwidth=0 with"):
        neuron_selectivity(maps, maps, "gaussian", bandwidth=0)
    with pytest.raises(ValueError, match=r"bandwidth=1\.0 with kernel='linear'"):
        neuron_selectivity(maps, maps, "linear", bandwidth=1.0)
    with pytest.raises(ValueError, match="chunk=0"):
        neuron_selectivity(maps, maps, chunk=0)


def test_by_default_every_stage_is_read_and_they_are_summed():
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 16, 16)
    every = NeuronSelectivity(kernel="gaussian")
    single = [NeuronSelectivity(f"stage{i}", kernel="gaussian", name=f"{i}") for i in (1, 2, 3)]
    losses = Distillation(SmallCNN(4), SmallCNN(8), losses=[every, *single]).bind(inputs)(inputs)
    torch.testing.assert_close(losses["NeuronSelectivity"], losses["1"] + losses["2"] + losses["3"])
    assert every.weight == 50
    assert not list(every.parameters())


@pytest.mark.parametrize("kernel", KERNELS)
def test_training_gives_the_student_the_teachers_patterns_on_unseen_images(lessons, kernel):
    alone, taught = lessons.student(), lessons.student(NeuronSelectivity("stage1", kernel=kernel))
    measure = NeuronSelectivity("stage1", kernel=kernel)
    assert lessons.distance(taught, measure) < 0.6 * lessons.distance(alone, measure)
