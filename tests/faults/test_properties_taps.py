"""Taps of generated networks: what is read is what was calculated, and nothing else is touched."""

from __future__ import annotations

import difflib
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tutelage import Distillation, FitNets, TaskLoss
from tutelage.taps import Address, Observer, UnknownTap, expand
from tutelage.views import Inputs

often = settings(
    max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

INPUT = torch.arange(6.0).reshape(2, 3) - 2


class Leaf(nn.Module):
    """x ↦ weight · x + 1; in place where it says so."""

    def __init__(self, weight: float, inplace: bool = False):
        super().__init__()
        self.weight, self.inplace = nn.Parameter(torch.tensor(weight)), inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight.detach()).add_(1) if self.inplace else x * self.weight + 1


class Group(nn.Module):
    """Calls its parts in an order in which some come twice or not at all; returns a tensor, a tuple or a mapping."""

    def __init__(self, parts: dict[str, nn.Module], kind: str, order: list[int], form: str):
        super().__init__()
        modules = list(parts.values())
        self.parts = nn.ModuleDict(parts) if kind == "dict" else nn.ModuleList(modules)
        if kind == "sequential":
            self.parts = nn.Sequential(*modules)
        self.kind, self.form = kind, form
        self.called = [modules[i % len(modules)] for i in order] if kind != "sequential" else []

    def forward(self, x: Tensor) -> Any:
        given = x
        for part in self.called:
            x = tensor_of(part(x))
        if self.kind == "sequential":
            x = tensor_of(self.parts(x))
        return {"tensor": x, "tuple": (x, given + x), "mapping": {"first": x, "second": 2 * x}}[self.form]


class Chain(nn.Sequential):
    """A Sequential of modules that may return more than a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = tensor_of(part(x))
        return x


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


def by_hand(module: nn.Module, x: Tensor, calls: dict[int, list[tuple[Tensor, Any]]]) -> Any:
    """The forward pass once more without a module being called; ``calls`` gets each one's input and output."""
    if isinstance(module, Leaf):
        output: Any = x * module.weight.detach() + 1
    elif isinstance(module, nn.Sequential):
        output = x
        for part in module:
            output = tensor_of(by_hand(part, output, calls))
    else:
        assert isinstance(module, Group)
        output = x
        for part in module.called or [module.parts]:
            output = tensor_of(by_hand(part, output, calls))
        forms = {"tensor": output, "tuple": (output, x + output), "mapping": {"first": output, "second": 2 * output}}
        output = forms[module.form]
    calls.setdefault(id(module), []).append((x, output))
    return output


names = st.sampled_from(["a", "b2", "layer", "layer1", "Block", "x_y", "0", "17", "up-down", "größe", "s p"])


@st.composite
def networks(draw, inplace: bool = False):
    """A tree of groups, chains and leaves, some of which stand in several places."""
    shared: list[nn.Module] = []

    def make(depth: int) -> nn.Module:
        if shared and draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(shared))
        if depth == 0 or draw(st.booleans()):
            # powers of two, so that no sum depends on its order
            module: nn.Module = Leaf(draw(st.sampled_from([0.5, -1.0, 2.0])), inplace and draw(st.booleans()))
        elif draw(st.booleans()):
            module = Chain(*(make(depth - 1) for _ in range(draw(st.integers(1, 3)))))
        else:
            module = group(depth)
        shared.append(module)
        return module

    def group(depth: int) -> Group:
        keys = draw(st.lists(names, min_size=1, max_size=3, unique=True))
        kind = draw(st.sampled_from(["dict", "list", "sequential"]))
        parts = {key: make(depth - 1) for key in keys}
        if kind == "sequential":  # which passes on what a part returns
            parts = {"0": Chain(*parts.values())}
        order = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
        return Group(parts, kind, order, draw(st.sampled_from(["tensor", "tuple", "mapping"])))

    return group(draw(st.integers(1, 3)))


def all_taps(model: nn.Module) -> dict[str, Tensor]:
    """Every address that there is, with the tensor that it stands for."""
    calls: dict[int, list[tuple[Tensor, Any]]] = {}
    output = by_hand(model, INPUT, calls)
    found = {"@logits": output} if isinstance(output, Tensor) else {}
    if isinstance(output, dict):
        found |= {f"@{name}": value for name, value in output.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        for n, (taken, made) in enumerate(calls.get(id(module), []), 1):
            call = f"#{n}" if n > 1 else ""
            if name or n == 1:
                found[f"{name}{call}:input"] = found[f"{name}{call}:input[0]"] = taken
            if name and isinstance(made, Tensor):
                found[name + call] = made
            elif name:
                items = list(made.values() if isinstance(made, dict) else made)
                found |= {f"{name}{call}[{i}]": items[i] for i in (0, 1, -1, -2)}
    return found


def observed(model: nn.Module, addresses: list[str]) -> Any:
    observer = Observer(model, addresses)
    observer.dry_run(Inputs((INPUT.clone(),)))
    return observer(Inputs((INPUT.clone(),)))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# What a tap reads


@often
@given(networks(), st.data())
def test_a_tap_reads_what_is_calculated_by_hand(model, data):
    there = all_taps(model)
    chosen = data.draw(st.lists(st.sampled_from(sorted(there)), min_size=1, max_size=8))
    record = observed(model, chosen)
    for address in chosen:
        assert torch.equal(record[address], there[address]), address
    assert hooks(model) == 0


@often
@given(networks(inplace=True), st.data())
def test_a_tap_reads_what_was_there_before_it_was_overwritten(model, data):
    there = all_taps(model)
    chosen = data.draw(st.lists(st.sampled_from(sorted(there)), min_size=1, max_size=5, unique=True))
    overwritten_inside = any(isinstance(m, Leaf) and m.inplace for m in model.modules())
    assume(overwritten_inside)
    # ``given + x`` of a tuple, and the first item of an output, are calculated from what was overwritten
    assume(all(m.form == "tensor" for m in model.modules() if isinstance(m, Group)))
    record = observed(model, chosen)
    for address in chosen:
        if not address.startswith("@"):  # the output is handed on, and may be what was overwritten
            assert torch.equal(record[address], there[address]), address


@often
@given(networks(), st.data())
def test_order_and_repetition_of_addresses_change_nothing(model, data):
    there = all_taps(model)
    chosen = data.draw(st.lists(st.sampled_from(sorted(there)), min_size=1, max_size=6, unique=True))
    other = data.draw(st.permutations(chosen + chosen[:2]))
    first, second = observed(model, chosen), observed(model, other)
    assert set(first.taps) == set(second.taps) == set(chosen)
    assert all(torch.equal(first[a], second[a]) for a in chosen)


@often
@given(networks())
def test_a_call_that_does_not_happen_is_refused_and_leaves_no_hook(model):
    calls: dict[int, list[tuple[Tensor, Any]]] = {}
    by_hand(model, INPUT, calls)
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            count = len(calls.get(id(module), []))
            with pytest.raises(UnknownTap, match=re.escape(f"{name!r} was called {count} times")):
                observed(model, [f"{name}#{count + 1}:input"])
    assert hooks(model) == 0


# Names


@often
@given(networks(), st.data())
def test_a_name_that_is_not_there_is_answered_with_the_nearest_ones(model, data):
    there = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    name = data.draw(st.sampled_from(there))
    place = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:place] + data.draw(st.sampled_from(["", "q", "7", "."])) + name[place + 1 :]
    assume(wrong and wrong not in there)
    with pytest.raises(UnknownTap) as caught:
        expand(model, wrong)
    said = re.findall(r"'([^']*)'", str(caught.value).split("nearest: ")[1])
    likeness = {n: difflib.SequenceMatcher(None, n.lower(), wrong.lower()).ratio() for n in there}
    assert set(said) <= set(there)
    if max(likeness.values()) >= 0.4:
        assert likeness[said[0]] == max(likeness.values())


@often
@given(networks(), st.data())
def test_a_star_stands_for_any_part_of_one_name(model, data):
    there = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parts = data.draw(st.sampled_from(there)).split(".")
    place = data.draw(st.integers(0, len(parts) - 1))
    keep = data.draw(st.integers(0, len(parts[place])))
    parts[place] = parts[place][:keep] + "*"

    def fits(name: str) -> bool:
        mine = name.split(".")
        same = len(mine) == len(parts) and mine[:place] == parts[:place] and mine[place + 1 :] == parts[place + 1 :]
        return same and mine[place].startswith(parts[place][:-1])

    assert expand(model, ".".join(parts) + ":input") == [f"{name}:input" for name in there if fits(name)]


@often
@given(
    name=st.text("abz09_.-é *", min_size=1, max_size=12),
    field=st.booleans(),
    call=st.integers(1, 10**6),
    takes_input=st.booleans(),
    items=st.lists(st.integers(-(10**6), 10**6), max_size=4).map(tuple),
)
def test_an_address_that_is_written_from_its_parts_parses_to_them(name, field, call, takes_input, items):
    call, takes_input = (1, False) if field else (call, takes_input)
    written = "@" * field + name + (f"#{call}" if call > 1 else "") + ":input" * takes_input
    written += "".join(f"[{i}]" for i in items)
    parsed = Address.parse(written)
    assert parsed == Address(written, name, field, call, takes_input, items)
    assert Address.parse(parsed.text) == parsed
    assert parsed.text == written


# Binding


class Everything(nn.Module):
    """A tree behind layers whose state, mode or random numbers a forward pass could change."""

    def __init__(self, tree: nn.Module):
        super().__init__()
        self.norm, self.drop, self.tree, self.head = nn.BatchNorm1d(3), nn.Dropout(0.5), tree, nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        random.random()
        np.random.rand()  # noqa: NPY002
        return self.head(tensor_of(self.tree(self.drop(self.norm(x)))))


def random_numbers() -> list[int]:
    states = torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    return [hash(str(state)) for state in states]


def state(model: nn.Module) -> list[Any]:
    found: list[Any] = [(n, v.tolist()) for n, v in model.state_dict().items()]
    return found + [(n, p.grad) for n, p in model.named_parameters()]


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


@often
@given(networks(), networks(), st.data())
def test_binding_touches_neither_modes_nor_buffers_nor_random_numbers(one, two, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    student, teacher = Everything(one), Everything(two)
    for module in (*student.modules(), *teacher.modules()):
        module.training = data.draw(st.booleans())
    taps = [
        (f"tree.{name}" if name else "tree:input")
        for tree in (one, two)
        for name in [data.draw(st.sampled_from(["", *(a for a in all_taps(tree) if a[0] not in ":@")]))]
    ]
    d = Distillation(student, teacher, [TaskLoss(), FitNets(tuple(taps))])
    before, drawn, student_modes = (state(student), state(teacher)), random_numbers(), modes(student)
    d.bind((INPUT.clone(), torch.tensor([0, 1])))
    assert random_numbers() == drawn
    assert (state(student), state(teacher)) == before
    assert modes(student) == student_modes
    assert not any(modes(teacher))  # it is frozen, and in eval mode from here on
    assert hooks(student) == hooks(teacher) == 0
