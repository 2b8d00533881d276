"""Codecs of logits of any size: what comes back is within the stated bound, or they are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.codecs import Codec

often = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def logits(draw) -> Tensor:
    """(B, C), (B, T, C) or (B, C, H, W) of any size in float32, some rows equal or constant."""
    shape = draw(st.sampled_from([(3, 1), (3, 2), (4, 7), (2, 3, 5), (2, 6, 2, 2), (1, 40)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    z = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
    kind = draw(st.sampled_from(["plain", "equal rows", "constant", "zeros", "one huge", "shifted"]))
    if kind == "equal rows":
        z[:] = z[:1].clone()
    elif kind == "constant":
        z = torch.full(shape, float(z.reshape(-1)[0]))
    elif kind == "zeros":
        z = torch.zeros(shape)
    elif kind == "one huge":
        z.view(-1)[0] = draw(st.sampled_from([3e38, -3e38, 65504.0, 1e-45]))
        z.view(-1)[-1] = draw(st.sampled_from([3e38, -3e38, 0.0]))
    elif kind == "shifted":
        z = z + 10.0 ** draw(st.integers(-3, 6))
    return z


def round_trip(codec: Codec, z: Tensor) -> Tensor:
    shape = tuple(z.shape[1:])
    kept = {name: torch.from_numpy(value) for name, value in codec.encode(z).items()}
    return codec.decode(kept, shape)


@often
@given(logits())
def test_float32_is_bit_for_bit(z):
    assert torch.equal(round_trip(Codec("float32"), z), z)


@often
@given(logits())
def test_float16_is_the_nearest_or_refuses(z):
    if float(z.abs().max()) > 65504:
        with pytest.raises(ValueError, match="more than float16 holds"):
            Codec("float16").encode(z)
    else:
        assert torch.equal(round_trip(Codec("float16"), z), z.half().float())


@often
@given(logits())
def test_int8_is_wrong_by_half_a_step_of_its_row(z):
    axis = 1 if z.ndim == 4 else -1
    if not (z.amax(axis) - z.amin(axis)).isfinite().all():
        with pytest.raises(ValueError, match="more than this codec holds"):
            Codec("int8").encode(z)
        return
    back = round_trip(Codec("int8"), z)
    assert back.isfinite().all()
    exact, low, high = z.double(), z.amin(axis, keepdim=True).double(), z.amax(axis, keepdim=True).double()
    step = (high - low) / 255
    rounding = 2.0**-22 * torch.maximum(low.abs(), high.abs())  # of low, of steps · step and of their sum, in float32
    assert ((back.double() - exact).abs() <= step * (0.5 + 2.0**-10) + rounding + 2.0**-126).all()


@often
@given(logits(), st.integers(1, 9), st.sampled_from([0.5, 1.0, 4.0]))
def test_top_k_keeps_the_probabilities_it_says(z, k, temperature):
    codec, axis = Codec("top_k", k, temperature), 1 if z.ndim == 4 else -1
    log_p = (z.float() / temperature).log_softmax(axis).movedim(axis, -1)
    if not log_p.isfinite().all():
        with pytest.raises(ValueError, match="more than this codec holds"):
            codec.encode(z)
        return
    back = round_trip(codec, z)
    assert back.isfinite().all()
    log_q = (back / temperature).log_softmax(axis).movedim(axis, -1)
    kept = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    torch.testing.assert_close(log_q.gather(-1, kept.indices), kept.values, rtol=1e-4, atol=1e-5)
    nats = codec.nats(z, back)
    assert (nats >= 0).all()
    if k >= z.shape[axis]:
        assert (nats <= 1e-4).all()


@pytest.mark.parametrize("name", ["float32", "float16", "int8", "top_k"])
@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
def test_what_is_not_finite_is_refused_by_every_codec(name, bad):
    z = torch.zeros(3, 4)
    z[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        Codec(name, k=2).encode(z)
