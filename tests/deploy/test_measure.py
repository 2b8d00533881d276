from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from tutelage.deploy import Measurement, export_onnx, measure, measure_onnx


def quick(model, example, **options):
    return measure(model, example, runs=2, warmup=1, **options)


@pytest.mark.parametrize(
    ("model", "example", "macs"),
    [
        (nn.Linear(10, 5), torch.zeros(1, 10), 10 * 5),
        (nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 6, 7), 3 * 8 * 9 * 6 * 7),
        (nn.Conv2d(8, 8, 3, groups=4, stride=2), torch.zeros(1, 8, 9, 9), 8 * 2 * 9 * 4 * 4),
        # The four below run in fused kernels that hide their products from the counter.
        (nn.LSTM(10, 20, batch_first=True), torch.zeros(1, 5, 10), 5 * 4 * (10 * 20 + 20 * 20)),
        (nn.GRU(10, 20, batch_first=True), torch.zeros(1, 5, 10), 5 * 3 * (10 * 20 + 20 * 20)),
        (
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
            torch.zeros(1, 5, 16),
            5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16,
        ),
        (
            nn.MultiheadAttention(16, 2, batch_first=True),
            (torch.zeros(1, 5, 16),) * 3,
            5 * 4 * 16 * 16 + 2 * 5 * 5 * 16,
        ),
    ],
    ids=["linear", "conv", "grouped", "lstm", "gru", "encoder", "attention"],
)
def test_macs_by_hand(model, example, macs):
    assert quick(model, example).macs == macs


def test_macs_are_of_one_sample_whatever_the_batch():
    model = nn.Linear(4, 3)
    assert quick(model, torch.zeros(7, 4)).macs == 12
    assert quick(model, torch.zeros(1, 4), batch_size=9).macs == 12


def test_counting_leaves_the_kernels_as_they_were():
    before = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    quick(nn.Linear(2, 2), torch.zeros(1, 2))
    assert (torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()) == before


def test_counts_shared_weights_once_and_buffers_apart():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    result = quick(model, torch.zeros(2, 6))
    assert result.parameters == 36 + 12
    assert result.buffers == 6 + 6 + 1


def test_size_is_the_files(tmp_path):
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert quick(model, torch.zeros(2, 30)).size_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_shared_weights_are_saved_once():
    apart = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    saved = quick(apart, torch.zeros(1, 64)).size_bytes - quick(tied, torch.zeros(1, 64)).size_bytes
    assert 64 * 64 * 4 - 500 < saved < 64 * 64 * 4 + 500


class Counting(nn.Module):
    """Writes to its buffers in eval mode too, in place and by assignment."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("inplace", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.seen = []

    def forward(self, x):
        self.inplace += 1
        self.assigned = self.assigned + 1
        self.seen.append((self.training, len(x), torch.is_grad_enabled()))
        return self.norm(x)


def test_modes_and_buffers_are_left_alone():
    model = Counting().train()
    model.norm.eval()
    assigned = model.assigned
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quick(model, torch.randn(4, 3))
    assert model.training
    assert not model.norm.training
    assert model.assigned is assigned
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not any(training or grad for training, _, grad in model.seen)


def test_modes_are_restored_when_the_model_fails():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    with pytest.raises(RuntimeError):
        quick(model, torch.zeros(1, 4))
    assert all(module.training for module in model.modules())


def test_times_a_batch_of_one_unless_told():
    model = Counting()
    assert quick(model, torch.zeros(5, 3)).batch_size == 1
    assert {rows for _, rows, _ in model.seen} == {1}
    model.seen.clear()
    assert quick(model, torch.zeros(5, 3), batch_size=8).batch_size == 8
    assert {rows for _, rows, _ in model.seen} == {8, 1}


def test_percentiles_precision_and_place():
    result = measure(nn.Linear(3, 3).bfloat16(), torch.zeros(1, 3, dtype=torch.bfloat16), runs=20)
    assert 0 < result.latency_p50_ms <= result.latency_p95_ms
    assert (result.precision, result.device, result.threads) == ("bfloat16", "cpu", torch.get_num_threads())


def test_peak_memory_is_weights_inputs_and_the_widest_pair_of_activations():
    # ReLU out of place: the first layer's output and its own are alive together, 2 × 1000 floats.
    model = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 1))
    weights = sum(p.numel() for p in model.parameters())
    assert quick(model, torch.zeros(1, 10)).peak_memory_bytes == 4 * (weights + 10 + 2000)


def test_examples_of_every_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, left, right, scale=1.0):
            return self.a(left) + scale * self.b(right)

    left, right = torch.zeros(2, 3), torch.zeros(2, 4)
    results = [
        quick(Two(), (left, right)),
        quick(Two(), [left, right, 2.0]),
        quick(Two(), {"right": right, "left": left}),
    ]
    assert {r.macs for r in results} == {14}
    with pytest.raises(TypeError, match="example is a str"):
        quick(Two(), "image.png")
    with pytest.raises(ValueError, match="batch dimension"):
        quick(Two(), {"left": 1})
    with pytest.raises(ValueError, match="runs is 0"):
        measure(Two(), (left, right), runs=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        quick(Two(), (left, right), batch_size=0)


def test_state_that_safetensors_cannot_hold_is_measured_all_the_same():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"note": "x" * 5000}

    assert quick(Odd(3, 3), torch.zeros(1, 3)).size_bytes > 5000


def test_a_file_is_measured_in_the_same_terms(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    exported = export_onnx(nn.Linear(30, 20), torch.randn(2, 30), path)
    result = measure_onnx(path, torch.randn(5, 30), runs=3, warmup=1)
    assert isinstance(result, Measurement)
    assert result.size_bytes == exported.size_bytes == path.stat().st_size
    assert 0 < result.latency_p50_ms <= result.latency_p95_ms
    assert (result.batch_size, result.threads) == (1, torch.get_num_threads())
    assert (result.parameters, result.macs, result.peak_memory_bytes) == (None, None, None)
    assert result.precision == "float32"
    assert measure_onnx(path, torch.randn(5, 30), runs=1, warmup=0, batch_size=4).batch_size == 4


def test_measurement_is_plain_data():
    result = quick(nn.Linear(2, 2), torch.zeros(1, 2))
    assert Measurement(**dataclasses.asdict(result)) == result


def test_a_compiled_model_is_measured_by_keyword():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, a, b):
            return self.linear(a + b)

    # Its class does not tell what its forward takes: the arguments must reach it as they are.
    example = {"a": torch.ones(1, 4), "b": torch.ones(1, 4)}
    assert measure(torch.compile(Sum(), backend="eager"), example, runs=1, warmup=1).macs == 8
