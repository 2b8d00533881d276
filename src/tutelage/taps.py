"""Addresses of tensors inside a model, and the forward pass that reads them.

=====================  ==========================================================================
``"layer3"``           what the module ``layer3`` returns
``"layer3:input"``     its (first) input; ``":input"`` is the model's own
``"relu#2"``           the second call of a module that is called several times
``"encoder.5[0]"``     an item of what a module returns (or of its inputs: ``"encoder.5:input[1]"``)
``"@logits"``          the logits of the model's output
``"@hidden_states[-1]"``  a field of the model's output
``"layer*"``           every module so named (``*`` does not cross a dot)
=====================  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import nearest
from tutelage.record import Record, in_float32, logits_of
from tutelage.views import Inputs

_ADDRESS = re.compile(
    r"(?P<at>@)?(?P<name>[^:#\[\]@]*)(?:#(?P<call>[1-9]\d*))?(?P<input>:input)?(?P<items>(?:\[-?\d+\])*)"
)


class UnknownTap(ValueError):
    """An address that names nothing in the model it is meant for."""


@dataclass(frozen=True)
class Address:
    """A parsed address.

    >>> Address.parse("relu#2:input[1]")
    Address(text='relu#2:input[1]', name='relu', field=False, call=2, input=True, items=(1,))
    >>> Address.parse("layer[")
    Traceback (most recent call last):
    ...
    tutelage.taps.UnknownTap: 'layer[' is not an address: expected module[#call][:input][[item]] or @field[[item]]
    """

    text: str
    name: str
    field: bool = False
    call: int = 1
    input: bool = False
    items: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Address:
        found = _ADDRESS.fullmatch(text)
        nameless = found and not found["name"] and (found["at"] or not found["input"])
        if not found or nameless or (found["at"] and (found["call"] or found["input"])):
            raise UnknownTap(f"{text!r} is not an address: expected module[#call][:input][[item]] or @field[[item]]")
        items = tuple(int(i) for i in re.findall(r"-?\d+", found["items"]))
        return cls(text, found["name"], bool(found["at"]), int(found["call"] or 1), bool(found["input"]), items)

    def pick(self, value: Any) -> Tensor:
        """Follow the items down to a tensor, or say what stands there instead."""
        for item in self.items:
            try:
                value = list(value.values())[item] if isinstance(value, Mapping) else value[item]
            except (IndexError, TypeError, KeyError) as error:
                size = f" of {len(value)}" if hasattr(value, "__len__") else ""
                raise UnknownTap(f"{self.text!r}: no item {item} in a {type(value).__name__}{size}") from error
        if isinstance(value, Tensor):
            return value
        if isinstance(value, tuple | list | Mapping):
            kinds = ", ".join(type(v).__name__ for v in (value.values() if isinstance(value, Mapping) else value))
            raise UnknownTap(
                f"{self.text!r} is a {type(value).__name__} of ({kinds}); name an item: {self.text + '[0]'!r}"
            )
        raise UnknownTap(f"{self.text!r} is a {type(value).__name__}, not a tensor")

    def read_output(self, output: Any) -> Tensor:
        """The tensor that an ``@`` address names in a model's output."""
        if self.name == "logits" and not self.items and (logits := logits_of(output)) is not None:
            return logits
        value = output
        for part in self.name.split("."):
            fields = list(value) if isinstance(value, Mapping) else list(getattr(value, "__dict__", {}))
            missing = object()
            found = getattr(value, part, missing)
            if isinstance(value, Mapping):  # a ModelOutput leaves out of its keys what is None
                found = value.get(part, found)
            if found is None or found is missing:
                why = " (it is None there)" if found is None else ""
                raise UnknownTap(
                    f"{self.text!r}: no {part!r}{why} in the model's output of type "
                    f"{type(value).__name__}{nearest(part, fields)}"
                )
            value = found
        return self.pick(value)


def expand(model: nn.Module, text: str) -> list[str]:
    """The addresses that ``text`` names in ``model``: itself, or every match of its ``*`` in definition order.

    Raises:
        UnknownTap: the address names no module; the message lists the nearest names.

    >>> expand(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*:input")
    ['0:input', '1:input']
    >>> expand(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "2")
    Traceback (most recent call last):
    ...
    tutelage.taps.UnknownTap: '2': no module '2' in Sequential; nearest: '0', '1'
    """
    address = Address.parse(text)
    if address.field or not address.name:
        return [text]
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    pattern = re.escape(address.name).replace(r"\*", r"[^.]*")
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise UnknownTap(
            f"{text!r}: no module {address.name!r} in {type(model).__name__}{nearest(address.name, names)}"
        )
    return [name + text[len(address.name) :] for name in found]


class _Stop(Exception):
    """Ends a forward pass whose remaining layers nobody reads: its own, not one inside which it was begun."""


class Observer:
    """A model and the addresses to read in it: call it with a batch's inputs, get a :class:`Record`.

    Hooks live only during the call, so the model stays as it came. A tapped tensor that a later in-place
    operation overwrites (``ReLU(inplace=True)``, ``out += identity``) is copied when it is read; which ones need
    the copy is found in the :meth:`dry_run`. If no address begins with ``@``, the forward pass stops at
    the last tap (``partial``).

    Args:
        model: any module.
        addresses: what to read; each is checked against the model's module names.

    Raises:
        UnknownTap: an address names nothing.

    >>> from tutelage.views import Inputs
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    >>> observe = Observer(model, ["0", "@logits"])
    >>> _ = observe.dry_run(Inputs((torch.randn(5, 4),)))
    >>> bool((observe(Inputs((torch.randn(5, 4),)))["0"] < 0).any())
    True
    """

    def __init__(self, model: nn.Module, addresses: Sequence[str]):
        self.model = model
        texts = dict.fromkeys(expanded for text in addresses for expanded in expand(model, text))
        self.addresses = [Address.parse(text) for text in texts]
        self.partial = bool(self.addresses) and not any(a.field for a in self.addresses)
        self.copied: set[str] = set()

    def dry_run(self, inputs: Inputs) -> Record:
        """One forward pass in which it is found out which tapped tensors are overwritten later."""
        self.copied = set()
        record, overwritten = self._run(inputs, partial=False)
        # A tap that lies after the last one read is never overwritten in a partial pass; copying it is harmless.
        self.copied = overwritten
        return self._run(inputs, self.partial)[0] if overwritten else record

    def __call__(self, inputs: Inputs) -> Record:
        record, overwritten = self._run(inputs, self.partial)
        if overwritten:
            raise RuntimeError(
                f"tapped tensors {sorted(overwritten)} were overwritten in place, which the dry run had not seen: "
                "the forward pass of the model depends on the batch; tap the module before"
            )
        return record

    def _run(self, inputs: Inputs, partial: bool) -> tuple[Record, set[str]]:
        caught: dict[str, Tensor] = {}
        versions: dict[str, int] = {}
        calls: dict[str, int] = {}
        wanted: dict[str, list[Address]] = {}
        stop = _Stop()
        for address in self.addresses:
            if not address.field:
                wanted.setdefault(address.name, []).append(address)

        def catch(address: Address, value: Any) -> None:
            tensor = address.pick(value)
            # In inference mode tensors have no versions by which an overwritten one could be told.
            if address.text in self.copied or torch.is_inference_mode_enabled():
                tensor = tensor.clone()
            caught[address.text] = tensor
            versions[address.text] = 0 if tensor.is_inference() else tensor._version

        def before(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                calls[name] = calls.get(name, 0) + 1
                given = (*args, *kwargs.values())
                for address in wanted[name]:
                    if address.input and address.call == calls[name]:
                        if not given:
                            raise UnknownTap(f"{address.text!r}: the module {name!r} is called without inputs")
                        catch(address, given if address.items else given[0])
                if partial and len(caught) == len(self.addresses):
                    raise stop

            return hook

        def after(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                for address in wanted[name]:
                    if not address.input and address.call == calls[name]:
                        catch(address, output)
                if partial and len(caught) == len(self.addresses):
                    raise stop

            return hook

        handles = []
        output = None
        try:
            for name in wanted:
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(after(name)))
            output = inputs.call(self.model)
        except _Stop as stopped:
            if stopped is not stop:  # of an observer around this one
                raise
        finally:
            for handle in handles:
                handle.remove()
        for address in self.addresses:
            if address.field:
                caught[address.text] = address.read_output(output)
            elif address.text not in caught:
                raise UnknownTap(
                    f"{address.text!r}: the module {address.name!r} was called {calls.get(address.name, 0)} times "
                    f"in one forward pass of {type(self.model).__name__}"
                )
        overwritten = {
            text
            for text, version in versions.items()
            if not caught[text].is_inference() and caught[text]._version != version
        }
        return Record(output, {text: in_float32(value) for text, value in caught.items()}), overwritten


@dataclass(frozen=True)
class Tappable:
    """One line of ``tutelage inspect``: an address and the shape of the tensor there."""

    address: str
    kind: str
    shape: tuple[int, ...]


def tappable(model: nn.Module, inputs: Inputs) -> list[Tappable]:
    """Every module's output in the order of the forward pass, with its shape for these inputs.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> [(t.address, t.shape) for t in tappable(model, Inputs((torch.ones(2, 4),)))]
    [('0', (2, 3)), ('1', (2, 3))]
    """
    lines: list[Tappable] = []

    def tensors(value: Any, address: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield address, value
        elif isinstance(value, tuple | list | Mapping):
            for i, item in enumerate(value.values() if isinstance(value, Mapping) else value):
                yield from tensors(item, f"{address}[{i}]")

    seen: dict[str, int] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            seen[name] = seen.get(name, 0) + 1
            address = name if seen[name] == 1 else f"{name}#{seen[name]}"
            lines.extend(Tappable(a, type(module).__name__, tuple(t.shape)) for a, t in tensors(output, address))

        return note

    # a parametrised weight (weight norm, fake quantisation) is calculated by a module, and is no feature
    named = [(n, m) for n, m in model.named_modules() if n and "parametrizations" not in n.split(".")]
    handles = [module.register_forward_hook(hook(name)) for name, module in named]
    try:
        with torch.no_grad():
            inputs.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return lines


def stages(model: nn.Module, inputs: Inputs) -> list[Tappable]:
    """The model's stages, first to last: the last whole module at each resolution (images) or depth (sequences).

    Of a convolutional network: for every spatial size, the outermost module that returns the last feature map of
    that size. Of a transformer: the outputs of the longest ``ModuleList`` of equal blocks.

    Raises:
        ValueError: the model has neither.
    """
    lines = tappable(model, inputs)
    blocks = {
        f"{name}.{i}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and len({type(m) for m in module}) == 1
        for i in range(len(module))
    }
    sequence = [t for t in lines if len(t.shape) == 3 and re.sub(r"\[0\]$", "", t.address) in blocks]
    # Maps before the first block are a stem's or the patches', those inside a block its attention heads'.
    inside = tuple(f"{t.address.split('[')[0]}." for t in sequence)
    maps: dict[tuple[int, ...], Tappable] = {}
    if any(t.ndim == 4 for t in inputs.tensors()):  # and not the attention maps of a language model
        for line in lines[lines.index(sequence[0]) if sequence else 0 :]:
            if len(line.shape) == 4 and min(line.shape[2:]) > 1 and not line.address.startswith(inside):
                maps[line.shape[2:]] = line  # hooks fire when a module returns, so the outermost comes last
    if maps:
        return list(maps.values())
    if not sequence:
        raise ValueError(
            f"{type(model).__name__} has no feature maps and no list of equal blocks to choose stages from: "
            "name the addresses to read (`tutelage inspect` lists them)"
        )
    return sequence


def embedding(model: nn.Module, inputs: Inputs) -> str:
    """The address of what the model's last linear layer reads: its embedding of a sample.

    >>> embedding(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), Inputs((torch.ones(2, 4),)))
    '2:input'
    """
    if isinstance(model, nn.Linear):
        return ":input"
    linear = [t.address for t in tappable(model, inputs) if isinstance(model.get_submodule(_name(t)), nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer to read an embedding from: name an address")
    return linear[-1].split("[")[0] + ":input"


def _name(line: Tappable) -> str:
    return Address.parse(line.address).name
