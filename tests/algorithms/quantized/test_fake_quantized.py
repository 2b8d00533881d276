"""Fake-quantised students: the grid, the gradient, and what training on the grid is worth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage import KD, Distillation, TaskLoss
from tutelage.algorithms.quantized.fake_quantized import fake_quantize, freeze_quantized, quantized_distillation
from tutelage.catalogue import methods

pytest.importorskip("torchao.quantization.qat", reason="the extra 'quantize' (torchao) is not installed")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 8, 1, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


KINDS = {
    "channels": {},
    "whole": {"per_channel": False},
    "buckets": {"bucket": 20},
    "buckets min to max": {"bucket": 20, "symmetric": False},
    "channels min to max": {"symmetric": False},
}


def rows(weight: torch.Tensor, kind: str) -> list[torch.Tensor]:
    if kind.startswith("channels"):
        return list(weight.flatten(1))
    return list(weight.flatten().split(20)) if kind.startswith("buckets") else [weight.flatten()]


def symmetric(row: torch.Tensor, bits: int) -> torch.Tensor:
    step = 2 * row.double().abs().max() / (2**bits - 1)
    return step * (row / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def polino(row: torch.Tensor, bits: int) -> torch.Tensor:
    row = row.double()
    low, width, levels = row.min(), row.max() - row.min(), 2**bits - 1
    return low + width * ((row - low) / width * levels).round() / levels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_row_is_rounded_to_its_grid(kind, bits):
    torch.manual_seed(1)
    plain = nn.Conv2d(3, 7, 3)
    expected = [(polino if "min to max" in kind else symmetric)(row, bits) for row in rows(plain.weight.detach(), kind)]
    found = fake_quantize(copy.deepcopy(plain), bits, **KINDS[kind]).weight.detach()
    for row, wanted in zip(rows(found, kind), expected, strict=True):
        assert len(row.unique()) <= 2**bits
        # -max|w| lies halfway between two points, where the last bit of a float decides; nothing else may differ
        differ = (row - wanted).abs() > 1e-5
        assert not differ[wanted > wanted.min()].any()
        assert ((row - wanted).abs() <= 2.001 * wanted.abs().max() / (2**bits - 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_full_precision_weights_unchanged(kind):
    layer = fake_quantize(nn.Linear(9, 4), 3, **KINDS[kind])
    factor = torch.randn(4, 9)
    (layer.weight * factor).sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, factor)  # clipped weights too
    assert list(dict(layer.named_parameters())) == ["bias", "parametrizations.weight.original"]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_give_the_same_outputs_and_load_into_the_plain_model(kind):
    student = fake_quantize(network(), 3, **KINDS[kind]).eval()
    x = torch.randn(4, 1, 8, 8)
    wanted = student(x)
    freeze_quantized(student)
    assert torch.equal(student(x), wanted)
    plain = network().eval()
    assert not torch.allclose(plain(x), wanted)
    assert not plain.load_state_dict(student.state_dict(), strict=True).missing_keys
    assert torch.equal(plain(x), wanted)
    for layer in (student[0], student[3], student[4], student[7]):
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight.requires_grad
        assert all(len(row.unique()) <= 8 for row in rows(layer.weight, kind))


def test_bit_widths_come_closer_to_the_plain_model():
    x = torch.randn(16, 1, 8, 8)
    wanted = network().eval()(x)
    errors = [(fake_quantize(network(), bits).eval()(x) - wanted).abs().mean().item() for bits in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * wanted.abs().mean()


def test_names_taps_and_everything_but_the_weights_stay():
    student = fake_quantize(network(), 4)
    batch = torch.randn(4, 1, 8, 8), torch.arange(4)
    distillation = Distillation(student, network(), losses=[TaskLoss(), KD()]).bind(batch)
    distillation(batch).total.backward()
    assert student[1].weight.grad is not None
    assert student[0].parametrizations.weight.original.grad.abs().sum() > 0
    for address in ("0", "3:input", "7"):
        assert student.get_submodule(address.split(":")[0]) is student[int(address[0])]
    assert not any("parametrizations" in name for name, _ in student[1].named_parameters())


def test_a_copy_is_quantised_and_frozen_by_itself():
    student = fake_quantize(network(), 4, activations=4)
    other = freeze_quantized(copy.deepcopy(student))
    assert not hasattr(other[0], "parametrizations")
    assert not other[0]._forward_pre_hooks
    assert student[0]._forward_pre_hooks
    assert torch.equal(student[0].weight, other[0].weight)


@pytest.mark.parametrize(
    "layer", [nn.Linear(1, 3), nn.Conv2d(4, 4, 1, groups=4), nn.Conv1d(2, 3, 3), nn.Conv3d(1, 2, 2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_size_are_quantised(layer, kind):
    student = fake_quantize(copy.deepcopy(layer), 8, **KINDS[kind])
    scale = layer.weight.abs().max()
    assert (student.weight - layer.weight).abs().max() <= scale * 2 / 255 + 1e-6


def test_zero_and_constant_rows_stay_finite():
    for kind in KINDS:
        layer = nn.Linear(5, 2)
        nn.init.zeros_(layer.weight)
        assert torch.equal(fake_quantize(layer, 4, **KINDS[kind]).weight, torch.zeros(2, 5)), kind
    layer = nn.Linear(5, 2)
    nn.init.constant_(layer.weight, 0.7)
    torch.testing.assert_close(fake_quantize(layer, 4, symmetric=False).weight, torch.full((2, 5), 0.7))


@pytest.mark.parametrize("layer", [nn.Linear(6, 6, bias=False), nn.Conv2d(6, 6, 1, bias=False)])
def test_inputs_are_rounded_sample_by_sample_with_an_exact_zero(layer):
    torch.manual_seed(0)
    seen = []
    student = fake_quantize(layer, 8, activations=3)
    student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    shape = (4, 5, 6) if isinstance(layer, nn.Linear) else (4, 6, 5, 5)
    x = torch.randn(shape).relu().requires_grad_()
    student(x)
    (rounded,) = seen
    pieces = zip(
        *((v.flatten(0, 1) if isinstance(layer, nn.Linear) else v.flatten(1)) for v in (x, rounded)), strict=True
    )
    for piece, after in pieces:
        assert 2 <= len(after.unique()) <= 8
        assert (after[piece == 0] == 0).all()
        assert (after - piece).abs().max() <= 0.51 * piece.max() / 7
    student(x[:1])
    assert torch.equal(seen[1], rounded[:1])  # whatever else is in the batch
    rounded.backward(torch.full(shape, 3.0))
    assert torch.equal(x.grad, torch.full(shape, 3.0))


def test_freezing_ends_the_rounding_of_inputs():
    student = fake_quantize(network(), 8, activations=2).eval()
    x = torch.randn(4, 1, 8, 8)
    coarse = student(x)
    freeze_quantized(student)
    assert not torch.allclose(student(x), coarse, rtol=1e-3)
    assert not any(module._forward_pre_hooks for module in student.modules())


def test_bad_arguments_are_named():
    for arguments in ({"bits": 1}, {"bits": 9}, {"bits": 4.0}, {"activations": 16}, {"bucket": 1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            fake_quantize(network(), **arguments)
    with pytest.raises(ValueError, match="no linear"):
        fake_quantize(nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 2)))
    with pytest.raises(ValueError, match="already"):
        fake_quantize(fake_quantize(network()))
    with pytest.raises(ValueError, match="nothing"):
        freeze_quantized(network())


def test_quantized_distillation_has_the_papers_grid_and_its_place_in_the_catalogue():
    torch.manual_seed(0)
    plain = nn.Linear(100, 7)
    layer = quantized_distillation(copy.deepcopy(plain), bits=2, bucket=256)
    wanted = torch.cat([polino(part, 2) for part in plain.weight.detach().flatten().split(256)])
    torch.testing.assert_close(layer.weight.detach().flatten(), wanted.float())
    entered = {m.name: (m.section, m.role) for m in methods()}
    assert entered["quantized_distillation"] == ("5.7", "student")


@pytest.mark.parametrize("quantise", [lambda s: fake_quantize(s, 3), lambda s: quantized_distillation(s, 3, 64)])
def test_distilling_on_the_grid_beats_rounding_after_distilling(quantise):
    def perceptron(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )  # fmt: skip

    def trained(student: nn.Module, teacher: nn.Module | None, epochs: int) -> nn.Module:
        torch.manual_seed(1)
        losses = [TaskLoss()] if teacher is None else [TaskLoss(weight=0.1), KD(temperature=2)]
        distillation = Distillation(student, teacher, losses=losses).bind((x, labels))
        optimizer = torch.optim.Adam(distillation.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 8)
        for _ in range(epochs):
            for part in torch.randperm(512).split(64):
                distillation((x[part], labels[part])).total.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        return student

    costs = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(512, 8)
        labels = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] * x[:, 3] > 0).long()
        teacher, start = trained(perceptron(64), None, epochs=15), perceptron(24)
        during = freeze_quantized(trained(quantise(copy.deepcopy(start)), teacher, epochs=20))
        after = freeze_quantized(quantise(trained(copy.deepcopy(start), teacher, epochs=20)))
        costs.append([F.cross_entropy(student(x), labels).item() for student in (during, after)])
    assert sum(during for during, _ in costs) < 0.93 * sum(after for _, after in costs)


def test_operations_are_counted_as_in_the_plain_model():
    from torch.utils.flop_counter import FlopCounterMode

    def operations(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, 8, 8))
        return counter.get_total_flops()

    assert operations(fake_quantize(network().eval(), 4, activations=8)) == operations(network().eval())
