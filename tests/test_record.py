from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tutelage.record import Record, in_float32, logits_of

LOGITS = torch.arange(6.0).reshape(2, 3)


@dataclass
class Answer:
    logits: Tensor | None
    loss: Tensor | None = None


Pair = namedtuple("Pair", "logits aux")


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, None),
        [LOGITS],
        {"loss": None, "logits": LOGITS},
        OrderedDict(logits=LOGITS),
        Answer(LOGITS),
        Pair(LOGITS, None),
        Pair(aux=torch.zeros(1), logits=LOGITS),
    ],
)
def test_logits_are_found_in_every_kind_of_output(output):
    assert logits_of(output) is LOGITS
    assert torch.equal(Record(output).logits, LOGITS)
    assert torch.equal(Record(output)["@logits"], LOGITS)


@pytest.mark.parametrize("output", [None, (), (None, LOGITS), {"features": LOGITS}, Answer(None), "logits", 3.0])
def test_an_output_without_logits_is_an_error_that_names_its_type(output):
    assert logits_of(output) is None
    with pytest.raises(ValueError, match=f"output of type {type(output).__name__}"):
        _ = Record(output).logits


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
    ],
)
def test_half_precision_becomes_float32_and_nothing_else_changes(given, expected):
    value = torch.ones(2, 3, dtype=given)
    assert in_float32(value).dtype == expected
    assert Record(value).logits.dtype == expected
    if given == expected:
        assert in_float32(value) is value


def test_an_untapped_address_is_an_error_that_lists_what_was_tapped():
    with pytest.raises(KeyError, match="'fc' was not tapped; tapped: layer1, layer2:input"):
        Record(LOGITS, {"layer1": LOGITS, "layer2:input": LOGITS})["fc"]
    with pytest.raises(KeyError, match="tapped: nothing"):
        Record(LOGITS)["fc"]


def test_detaching_cuts_logits_and_taps_and_keeps_values():
    weight = torch.ones(3, requires_grad=True)
    record = Record((LOGITS * weight, "cache"), {"a": weight + 1, "@logits": LOGITS * weight})
    loose = record.detach()
    assert not loose.logits.requires_grad
    assert not any(v.requires_grad for v in loose.taps.values())
    assert torch.equal(loose.logits, record.logits)
    assert torch.equal(loose["a"], record["a"])
    assert record.logits.requires_grad, "the record itself stays in the graph"
    assert Record(None, {"a": weight}).detach().output is None
