from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tutelage.taps import Address, Observer, UnknownTap, embedding, expand, stages, tappable
from tutelage.views import Inputs


def read(model: nn.Module, *addresses: str, inputs: Inputs | None = None, **named: Tensor):
    observer = Observer(model, addresses)
    inputs = inputs or (Inputs((), named) if named else Inputs((torch.arange(8.0).reshape(2, 4),)))
    observer.dry_run(inputs)
    return observer(inputs)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# the grammar

names = st.from_regex(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+){0,3}", fullmatch=True)
items = st.lists(st.integers(-9, 99), max_size=3).map(tuple)


@given(name=names, call=st.integers(1, 40), takes_input=st.booleans(), items=items)
def test_a_written_module_address_parses_to_its_parts(name, call, takes_input, items):
    text = name + (f"#{call}" if call > 1 else "") + ":input" * takes_input + "".join(f"[{i}]" for i in items)
    assert Address.parse(text) == Address(text, name, False, call, takes_input, items)


@given(name=names, items=items)
def test_a_written_field_address_parses_to_its_parts(name, items):
    text = f"@{name}" + "".join(f"[{i}]" for i in items)
    assert Address.parse(text) == Address(text, name, True, 1, False, items)


@pytest.mark.parametrize(
    "text", ["", "@", "#2", "layer[", "layer]", "layer[a]", "layer#0", "layer#-1", "layer:output", "a[0]:input", "a#x"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(UnknownTap, match="is not an address"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["@hidden_states:input", "@logits#2"])
def test_a_field_of_the_output_has_no_input_and_no_second_call(text):
    with pytest.raises(UnknownTap, match="is not an address"):
        Address.parse(text)


@given(st.text(max_size=12))
def test_any_text_parses_or_is_refused_clearly(text):
    try:
        parsed = Address.parse(text).text
    except UnknownTap as error:
        parsed = str(error).split(" is not an address")[0]
        text = repr(text)
    assert parsed == text


# modules


class Reuser(nn.Module):
    """One activation called three times, and keyword-only arguments inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()
        self.mix = Mix()

    def forward(self, x):
        x = self.act(self.a(x))
        x = self.act(self.b(x))
        x = self.mix(left=x, right=2 * x)
        return self.act(x)


class Mix(nn.Module):
    def forward(self, *, left, right):
        return left + right


def test_output_and_input_of_a_module_and_of_the_model():
    torch.manual_seed(0)
    model = Reuser()
    x = torch.arange(8.0).reshape(2, 4)
    record = read(model, "a", "a:input", ":input", "b:input", "@logits")
    assert torch.equal(record["a"], model.a(x))
    assert torch.equal(record["a:input"], x)
    assert torch.equal(record[":input"], x)
    assert torch.equal(record["b:input"], model.a(x).tanh())
    assert torch.equal(record["@logits"], model(x))


def test_each_call_of_a_reused_module():
    torch.manual_seed(0)
    model = Reuser()
    first = torch.tanh(model.a(torch.arange(8.0).reshape(2, 4)))
    second = torch.tanh(model.b(first))
    record = read(model, "act", "act#1", "act#2", "act#3", "act#3:input")
    for address, value in (
        ("act", first),
        ("act#1", first),
        ("act#2", second),
        ("act#3:input", 3 * second),
        ("act#3", torch.tanh(3 * second)),
    ):
        torch.testing.assert_close(record[address], value)


def test_a_call_that_does_not_happen_is_an_error_that_counts():
    with pytest.raises(UnknownTap, match=r"'act#4'.*was called 3 times"):
        read(Reuser(), "act#4")
    with pytest.raises(UnknownTap, match=r"'a#3'.*was called 1 times"):
        read(Reuser(), "a#3")


def test_keyword_only_inputs_count_as_inputs():
    record = read(Reuser(), "mix:input", "mix:input[1]")
    torch.testing.assert_close(record["mix:input[1]"], 2 * record["mix:input"])


def test_the_inputs_of_a_model_called_by_name():
    left, right = torch.ones(2, 3), torch.zeros(2, 3)
    record = read(Mix(), ":input", ":input[1]", left=left, right=right)
    assert torch.equal(record[":input"], left)
    assert torch.equal(record[":input[1]"], right)


def test_a_module_without_inputs_has_no_input_to_tap():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self):
            return self.weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = Position()

        def forward(self, x):
            return x + self.position()

    with pytest.raises(UnknownTap, match="position:input"):
        read(Model(), "position:input")


@dataclass
class Answer:
    logits: Tensor
    states: tuple[Tensor, ...]
    aux: dict[str, Tensor] | None = None
    empty: Tensor | None = None


class Nested(nn.Module):
    def __init__(self, kind: str = "dataclass"):
        super().__init__()
        self.kind = kind
        self.split = Split()

    def forward(self, x):
        one, (two, named) = self.split(x)
        fields = {"logits": one, "states": (one, two), "aux": named}
        return Answer(**fields) if self.kind == "dataclass" else fields


class Split(nn.Module):
    def forward(self, x):
        return 2 * x, [3 * x, OrderedDict(four=4 * x, five=5 * x)]


def test_items_of_tuples_lists_and_mappings():
    x = torch.arange(8.0).reshape(2, 4)
    record = read(Nested(), "split[0]", "split[1][0]", "split[-1][1][0]", "split[1][1][-1]")
    for address, factor in (("split[0]", 2), ("split[1][0]", 3), ("split[-1][1][0]", 4), ("split[1][1][-1]", 5)):
        assert torch.equal(record[address], factor * x)


@pytest.mark.parametrize("kind", ["dataclass", "dict"])
def test_fields_of_the_output(kind):
    x = torch.arange(8.0).reshape(2, 4)
    record = read(Nested(kind), "@logits", "@states[-1]", "@states[0]", "@aux.four", "@aux[1]")
    factors = {"@logits": 2, "@states[-1]": 3, "@states[0]": 2, "@aux.four": 4, "@aux[1]": 5}
    for address, factor in factors.items():
        assert torch.equal(record[address], factor * x)


def test_errors_say_what_stands_there_instead():
    with pytest.raises(UnknownTap, match=r"'split' is a tuple of \(Tensor, list\); name an item: 'split\[0\]'"):
        read(Nested(), "split")
    with pytest.raises(UnknownTap, match="no item 7 in a tuple of 2"):
        read(Nested(), "split[7]")
    with pytest.raises(UnknownTap, match="nearest: 'states'"):
        read(Nested(), "@state")
    with pytest.raises(UnknownTap, match="it is None there"):
        read(Nested(), "@empty")


# names


class Residual(nn.Module):
    """A block that overwrites what it computed: ``out += identity`` and an in-place ReLU."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x):
        out = self.bn(self.conv(x))
        if self.inplace:
            out += x
        else:
            out = out + x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, inplace: bool = True):
        super().__init__()
        self.layer1, self.layer2 = Residual(inplace), Residual(inplace)
        self.hidden, self.drop = nn.Linear(3, 8), nn.Dropout(0.5, inplace)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.drop(self.hidden(self.layer2(self.layer1(x)).mean((2, 3)))))


def test_globs_in_definition_order_and_not_across_dots():
    model = Net()
    assert expand(model, "layer*") == ["layer1", "layer2"]
    assert expand(model, "*.conv:input") == ["layer1.conv:input", "layer2.conv:input"]
    assert expand(model, "layer1.*") == ["layer1.conv", "layer1.bn", "layer1.relu"]
    assert expand(model, "*r*1") == ["layer1"]


@pytest.mark.parametrize(
    ("address", "near"), [("layr2", "layer2"), ("layer1.con", "layer1.conv"), ("Fc", "fc"), ("layer1.relu.0", "relu")]
)
def test_an_unknown_name_is_answered_with_the_nearest(address, near):
    with pytest.raises(UnknownTap, match=f"nearest: .*{near}") as error:
        Observer(Net(), [address])
    assert repr(address) in str(error.value)


def test_a_glob_without_a_match_is_an_error():
    with pytest.raises(UnknownTap, match=r"blocks\.\*"):
        expand(Net(), "blocks.*")


def test_a_module_shared_under_two_names_answers_to_both():
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), act=nn.Tanh(), second=nn.Linear(4, 4)))
    model.add_module("act_again", model.act)
    record = read(model, "act", "act_again#2")
    assert not torch.equal(record["act"], record["act_again#2"])
    torch.testing.assert_close(record["act_again#2"], torch.tanh(model.second(record["act"])))


# values that are overwritten later

EVERYWHERE = [f"layer{i}{part}" for i in (1, 2) for part in ("", ":input", ".conv", ".bn", ".relu", ".relu:input")]


@pytest.mark.parametrize("addresses", [[*EVERYWHERE, "hidden", "drop", "drop:input", "@logits"], EVERYWHERE])
def test_in_place_operations_corrupt_neither_value_nor_gradient(addresses):
    torch.manual_seed(0)
    inplace = Net(inplace=True)
    plain = Net(inplace=False)
    plain.load_state_dict(inplace.state_dict())
    records = []
    for model in (inplace, plain):
        inputs = Inputs((torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)),))
        observer = Observer(model, addresses)
        with torch.no_grad():
            observer.dry_run(inputs)
        torch.manual_seed(2)
        record = observer(inputs)
        sum((record[a] ** 2).sum() * (i + 1) for i, a in enumerate(addresses)).backward()
        records.append(record)
    for address in addresses:
        torch.testing.assert_close(records[0][address], records[1][address], msg=address)
    assert bool((records[0]["layer1.bn"] < 0).any())
    for (name, p), q in zip(inplace.named_parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


class ViewWriter(nn.Module):
    def __init__(self, inplace: bool):
        super().__init__()
        self.fc, self.inplace = nn.Linear(4, 4), inplace

    def forward(self, x):
        y = self.fc(x)
        if self.inplace:
            y[:, 0].zero_()
            y.view(-1)[1:].relu_()
            return y
        mask = torch.ones(4)
        mask[0] = 0
        y = y * mask
        return torch.cat([y.view(-1)[:1], F.relu(y.view(-1)[1:])]).view_as(y)


def test_writing_into_a_view_of_a_tapped_tensor_does_not_corrupt_it():
    torch.manual_seed(0)
    one, two = ViewWriter(True), ViewWriter(False)
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 4)
    grads = []
    for model in (one, two):
        record = read(model, "fc", "@logits", inputs=Inputs((x,)))
        torch.testing.assert_close(record["fc"], model.fc(x))
        (record["fc"].pow(2).sum() + record["@logits"].sum()).backward()
        grads.append(model.fc.weight.grad)
    torch.testing.assert_close(*grads)


def test_only_what_is_overwritten_is_copied():
    observer = Observer(Net(), ["layer1.conv", "layer1.bn", "layer2", "hidden", "@logits"])
    observer.dry_run(Inputs((torch.randn(2, 3, 5, 5),)))
    # the sum and the activation overwrite what batch norm returns, the dropout what the linear layer returns
    assert observer.copied == {"layer1.bn", "hidden"}


def test_an_overwriting_that_the_dry_run_did_not_see_is_an_error():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            y = self.fc(x)
            return y.mul_(2) if len(x) > 1 else y

    observer = Observer(Moody(), ["fc", "@logits"])
    observer.dry_run(Inputs((torch.ones(1, 2),)))
    with pytest.raises(RuntimeError, match=r"\['fc'\] were overwritten in place"):
        observer(Inputs((torch.ones(2, 2),)))


# the pass itself


def test_a_partial_pass_leaves_later_modules_uncalled_and_reads_the_same():
    torch.manual_seed(0)
    model = Net(inplace=False).eval()
    inputs = Inputs((torch.randn(2, 3, 5, 5),))
    whole = Observer(model, ["layer1", "layer1.conv:input", "@logits"])
    part = Observer(model, ["layer1", "layer1.conv:input"])
    assert part.partial
    assert not whole.partial
    for observer in (whole, part):
        observer.dry_run(inputs)
    called: list[str] = []
    for name in ("layer1", "layer2", "fc"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: called.append(name))
    record = part(inputs)
    assert called == ["layer1"]
    assert record.output is None
    expected = whole(inputs)
    for address in record.taps:
        assert torch.equal(record[address], expected[address])


@pytest.mark.parametrize("addresses", [["layer*", "layer1"], ["layer1", "layer1", "layer*"]])
def test_an_address_named_twice_still_lets_the_pass_stop(addresses):
    model = Net(inplace=False)
    observer = Observer(model, addresses)
    called: list[int] = []
    model.fc.register_forward_hook(lambda *_: called.append(1))
    observer(Inputs((torch.randn(2, 3, 5, 5),)))
    assert not called


def test_hooks_are_gone_after_success_a_stop_and_an_exception():
    model = Net()
    inputs = Inputs((torch.randn(2, 3, 5, 5),))
    for addresses in (["layer1"], ["layer1", "@logits"]):
        read(model, *addresses, inputs=inputs)
        assert hooks(model) == 0
    observer = Observer(model, ["layer1", "@logits"])
    with pytest.raises(RuntimeError):
        observer(Inputs((torch.randn(2, 7, 5, 5),)))
    assert hooks(model) == 0
    with pytest.raises(UnknownTap):
        read(model, "layer1#2", inputs=inputs)
    assert hooks(model) == 0


def test_an_observer_can_be_copied_with_its_model():
    model = Net()
    observer = Observer(model, ["layer1"])
    other_model, other = copy.deepcopy((model, observer))
    assert other.model is other_model
    assert other_model is not model


@pytest.mark.parametrize("dry_run_too", [True, False])
def test_a_model_can_be_read_in_inference_mode(dry_run_too):
    observer = Observer(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), ["0", "@logits"])
    inputs = Inputs((torch.randn(5, 4),))
    with torch.inference_mode(dry_run_too):
        observer.dry_run(inputs)
    with torch.inference_mode():
        record = observer(inputs)
    assert bool((record["0"] < 0).any())
    torch.testing.assert_close(record["0"].relu(), record["@logits"])


def test_half_precision_taps_come_back_in_float32_and_others_as_they_are():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).to(dtype)
        record = read(model, "0", "@logits", inputs=Inputs((torch.ones(2, 4, dtype=dtype),)))
        assert record["0"].dtype == record["@logits"].dtype == record.logits.dtype == expected
    ids = torch.tensor([[1, 2]])
    assert read(nn.Embedding(4, 2), ":input", "@logits", inputs=Inputs((ids,)))[":input"].dtype == torch.int64


# looking around


def test_every_tappable_address_can_be_tapped_and_has_that_shape():
    for model, inputs in (
        (Net(), Inputs((torch.randn(2, 3, 5, 5),))),
        (Reuser(), Inputs((torch.randn(2, 4),))),
        (Nested(), Inputs((torch.randn(2, 4),))),
    ):
        lines = tappable(model, inputs)
        record = read(model, *(t.address for t in lines), inputs=inputs)
        assert {t.address: t.shape for t in lines} == {a: tuple(v.shape) for a, v in record.taps.items()}
        assert hooks(model) == 0


def test_stages_of_a_convolutional_network_are_the_last_maps_of_each_size():
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(1, 2, 3, padding=1),
            one=nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()),
            two=nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU()),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4, 3),
        )
    )
    inputs = Inputs((torch.randn(2, 1, 8, 8),))
    assert [(s.address, s.shape[1:]) for s in stages(model, inputs)] == [("one", (2, 8, 8)), ("two", (4, 4, 4))]
    assert embedding(model, inputs) == "fc:input"


def test_stages_of_a_transformer_are_its_blocks():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(OrderedDict(encoder=nn.TransformerEncoder(layer, 3), head=nn.Linear(8, 2)))
    found = stages(model.train(), Inputs((torch.randn(2, 5, 8),)))
    assert [s.address for s in found] == [f"encoder.layers.{i}" for i in range(3)]


def test_a_model_without_stages_or_embedding_says_so():
    with pytest.raises(ValueError, match="name the addresses"):
        stages(nn.Linear(2, 2), Inputs((torch.ones(1, 2),)))
    with pytest.raises(ValueError, match="no linear layer"):
        embedding(nn.Sequential(nn.Tanh()), Inputs((torch.ones(1, 2),)))
