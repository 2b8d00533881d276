from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor, nn

from tutelage.views import IDS, LABELS, Altered, Batch, Inputs, Paired, SameView, move, read_batch

X, Y, I = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([7, 3, 9, 1])  # noqa: E741


@dataclass
class Sample:
    x: Tensor
    label: Tensor | None = None
    index: Tensor | None = None


Named = namedtuple("Named", "x y ids")


@pytest.mark.parametrize(
    "raw",
    [
        (X, Y, I),
        [X, Y, I],
        ({"x": X}, Y, I),
        {"x": X, "labels": Y, "ids": I},
        UserDict(x=X, target=Y, index=I),
        Sample(X, Y, I),
        Named(X, Y, I),
        Batch(Inputs((X,)), Inputs((X,)), Y, I),
    ],
    ids=lambda raw: type(raw).__name__,
)
def test_every_kind_of_batch_gives_inputs_labels_and_ids(raw):
    batch = read_batch(raw)
    assert batch.labels is Y
    assert batch.ids is I
    assert len(batch) == 4
    for side in (batch.student, batch.teacher):
        assert [t is X for t in side.tensors()] == [True]
        assert torch.equal(side.call(nn.Flatten()), X)
    assert SameView()(raw).labels is Y


@pytest.mark.parametrize("raw", [X, (X,), [X], {"x": X}, Sample(X), {"x": X, "labels": None, "ids": None}])
def test_labels_and_ids_may_be_missing(raw):
    batch = read_batch(raw)
    assert batch.labels is None
    assert batch.ids is None
    assert [t is X for t in batch.student.tensors()] == [True]


@pytest.mark.parametrize("name", LABELS)
def test_every_name_of_the_labels(name):
    batch = read_batch({"x": X, name: Y})
    assert batch.labels is Y
    assert list(batch.student.kwargs) == ["x"]


@pytest.mark.parametrize("name", IDS)
def test_every_name_of_the_ids(name):
    batch = read_batch({"x": X, name: I})
    assert batch.ids is I
    assert list(batch.student.kwargs) == ["x"]


@pytest.mark.parametrize(
    ("raw", "what"), [((X, Y, I, X), "tuple of 4"), ((), "tuple of 0"), (3.0, "float"), ("x", "str"), (([X], Y), "")]
)
def test_what_is_no_batch_is_refused(raw, what):
    with pytest.raises(TypeError, match=f"cannot read a {what}.*expected a tensor"):
        read_batch(raw)


def test_reading_a_batch_leaves_it_as_it_was():
    raw = {"x": X, "labels": Y, "ids": I}
    read_batch(raw)
    assert list(raw) == ["x", "labels", "ids"]


class Two(nn.Module):
    def forward(self, left, *, right=None):
        return left if right is None else left + right


class Any(nn.Module):
    def forward(self, **fields):
        return sorted(fields)


def test_a_model_is_given_the_fields_it_knows():
    inputs = Inputs((), {"left": X, "right": X, "mask": X})
    assert torch.equal(inputs.call(Two()), 2 * X)
    assert inputs.call(Any()) == ["left", "mask", "right"]
    assert torch.equal(Inputs((), {"pixels": X}).call(nn.Flatten()), X), "a single unknown field goes by position"
    with pytest.raises(ValueError, match=r"Two.forward knows none of .*\['mask', 'pixels'\]; it takes .*'left'"):
        Inputs((), {"pixels": X, "mask": X}).call(Two())


def test_mapping_changes_floating_point_tensors_only():
    inputs = Inputs((X, Y, None), {"a": X, "b": Y, "c": "text"}).map(lambda x: -x)
    assert torch.equal(inputs.args[0], -X)
    assert torch.equal(inputs.kwargs["a"], -X)
    assert inputs.args[1] is Y
    assert inputs.kwargs["b"] is Y
    assert (inputs.args[2], inputs.kwargs["c"]) == (None, "text")


@pytest.mark.parametrize(
    "raw",
    [
        X,
        (X, Y, None),
        [X, Y],
        {"x": X, "labels": Y, "text": "a"},
        ({"x": X}, Y),
        Sample(X, Y),
        Named(X, Y, I),
        Batch(Inputs((X,), {"m": X}), Inputs((X,)), Y, I, progress=0.5),
    ],
    ids=lambda raw: type(raw).__name__,
)
def test_moving_moves_every_tensor_and_keeps_the_kind(raw):
    moved = move(raw, "meta")
    assert type(moved) is type(raw)

    def all_of(value):
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict):
            return [t for v in value.values() for t in all_of(v)]
        if isinstance(value, tuple | list):
            return [t for v in value for t in all_of(v)]
        if hasattr(value, "__dataclass_fields__"):
            return [t for f in fields(value) for t in all_of(getattr(value, f.name))]
        return []

    before, after = all_of(raw), all_of(moved)
    assert before
    assert [t.shape for t in after] == [t.shape for t in before]
    assert all(t.is_meta for t in after)
    assert not any(t.is_meta for t in before)


def test_paired_views_give_each_side_its_field():
    views = Paired(student="depth", teacher="rgb")
    batch = views({"depth": X, "rgb": 2 * X, "label": Y, "id": I})
    assert batch.student.args[0] is X
    assert torch.equal(batch.teacher.args[0], 2 * X)
    assert batch.labels is Y
    assert batch.ids is I
    with pytest.raises(ValueError, match=r"views.teacher: the batch has no field 'rgb'; nearest: 'rgb_image'"):
        views({"depth": X, "rgb_image": X})


def test_altered_views_change_one_side_only():
    for batch, student, teacher in (
        (Altered(student=lambda x: x + 1)((X, Y)), X + 1, X),
        (Altered(teacher=lambda x: x + 1)({"x": X, "y": Y}), X, X + 1),
        (Altered()((X, Y)), X, X),
    ):
        assert torch.equal(batch.student.tensors()[0], student)
        assert torch.equal(batch.teacher.tensors()[0], teacher)
        assert batch.labels is Y
