"""A frozen network made cheaper: changes to a copy of it that leave its names and, nearly, its words."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tutelage.errors import nearest
from tutelage.record import Record
from tutelage.taps import Address, Observer
from tutelage.views import Inputs

SPEEDS = ("bf16", "channels_last", "fold", "compile", "int8")
"""The accelerations, in the order in which they are tried and applied."""
AUTO = SPEEDS[:3]
"""Those that ``"auto"`` tries: ``compile`` takes long before it gains anything, and ``int8`` needs a runtime."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def known_speed(speed: str | Sequence[str]) -> str | tuple[str, ...]:
    """``"auto"``, or names of :data:`SPEEDS` in their order; none for ``"plain"``.

    Raises:
        ValueError: an unknown name, or ``int8`` beside others.

    >>> known_speed("plain"), known_speed(["fold", "bf16"])
    ((), ('bf16', 'fold'))
    >>> known_speed(["channel_last"])
    Traceback (most recent call last):
    ...
    ValueError: speed='channel_last': expected one of bf16, channels_last, fold, compile, int8; nearest: 'channels_last'
    """
    if isinstance(speed, str):
        if speed not in ("plain", "auto"):
            raise ValueError(
                f"speed={speed!r}: expected 'plain', 'auto' or a list of {', '.join(SPEEDS)}"
                f"{nearest(speed, ('plain', 'auto'))}"
            )
        return speed if speed == "auto" else ()
    for name in speed:
        if name not in SPEEDS:
            raise ValueError(f"speed={name!r}: expected one of {', '.join(SPEEDS)}{nearest(str(name), SPEEDS)}")
    if "int8" in speed and len(set(speed)) > 1:
        raise ValueError(f"speed={list(speed)}: int8 is a file of its own; expected it alone")
    return tuple(name for name in SPEEDS if name in speed)


class Refused(ValueError):
    """An acceleration that this network, or what is read of it, does not allow."""


@dataclass
class Form:
    """A copy of a network, accelerated: called with a batch's inputs it gives a :class:`Record`, as an observer does.

    Args:
        names: of :data:`SPEEDS`, in their order.
        observer: of the copy.
        file: the ONNX file of ``int8``, to be made again from.
    """

    names: tuple[str, ...]
    observer: Observer
    file: bytes | None = None
    _dry: bool = field(default=True, repr=False)

    def __call__(self, inputs: Inputs) -> Record:
        with torch.autocast(device_of(inputs), torch.bfloat16) if "bf16" in self.names else nullcontext():
            record = (self.observer.dry_run if self._dry else self.observer)(inputs)
        self._dry = False
        return record


def accelerated(plain: Observer, names: Sequence[str], inputs: Inputs | None = None, file: bytes | None = None) -> Form:
    """Make a copy of the observed network with these accelerations.

    - ``fold``: a batch norm is folded into the convolution before it and becomes an ``Identity``. Names stay. A pair
      between which somebody reads stays as it is.
    - ``bf16``: weights of linear layers and convolutions in bfloat16, and autocast to it around the forward pass.
    - ``channels_last``: weights of images' convolutions in that order; what they return is in it too.
    - ``compile``: by ``torch.compile``, in whose code hooks are not seen: only for ``@`` addresses.
    - ``int8``: onnxruntime on the processor, weights per channel, activations with ranges from ``inputs``; only where
      nothing but ``@logits`` is read.

    Args:
        plain: the network in eval mode, and what is read of it.
        names: of :data:`SPEEDS`.
        inputs: of a first batch, to refuse by; ``None`` where that was done before.
        file: of ``int8``, if there is one already.

    Raises:
        Refused: the network or the addresses do not allow it.

    Memory: one more network (half of it with ``bf16``).
    """
    if "int8" in names:
        if any(address.text != "@logits" for address in plain.addresses):
            raise Refused("only where nothing but @logits is read")
        file = file or _int8_file(plain.model, inputs)
        return Form(tuple(names), Observer(_Int8(file), ["@logits"]), file)
    network = copy.deepcopy(plain.model)
    if "fold" in names:
        _fold(network, plain.addresses)
    if "bf16" in names:
        _round_weights(network)
    if "channels_last" in names:
        if inputs is not None and not any(t.ndim == 4 for t in inputs.tensors()):
            raise Refused("no images among the inputs")
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if "compile" in names:
        if any(not address.field for address in plain.addresses):
            raise Refused("only where nothing inside the network is read")
        network = torch.compile(network)  # type: ignore[assignment]
    return Form(tuple(names), Observer(network, [address.text for address in plain.addresses]))


def device_of(inputs: Inputs) -> str:
    """The type of the device that a batch is on."""
    return next((t.device.type for t in inputs.tensors()), "cpu")


def _fold(network: nn.Module, addresses: Sequence[Address]) -> None:
    """Fold each batch norm into the convolution before it, in place, where nobody else reads what is between."""
    try:
        nodes = list(torch.fx.Tracer().trace(network).nodes)
    except Exception as error:  # whatever a forward pass does with a value that has none
        raise Refused("its forward pass cannot be traced") from error
    modules = dict(network.named_modules(remove_duplicate=False))
    called = [id(modules[node.target]) for node in nodes if node.op == "call_module"]

    def alone(node: torch.fx.Node, kinds: tuple[type, ...]) -> bool:
        # a subclass may calculate something else, a hook may change a weight
        module = modules[node.target] if node.op == "call_module" else None
        hooked = module is not None and (module._forward_hooks or module._forward_pre_hooks)
        return type(module) in kinds and not hooked and called.count(id(module)) == 1

    pairs = 0
    for node in nodes:
        if len(node.users) != 1 or not alone(node, _CONVOLUTIONS):
            continue
        after = next(iter(node.users))
        if not alone(after, _NORMS) or modules[after.target].running_var is None:
            continue
        names = (str(node.target), str(after.target))
        if any(_may_be_between(address, *names) for address in addresses):
            continue
        folded = fuse_conv_bn_eval(modules[names[0]], modules[names[1]])  # type: ignore[type-var]
        for name, module in zip(names, (folded, nn.Identity()), strict=True):
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, module)
        pairs += 1
    if not pairs:
        raise Refused("no batch norm can be folded into a convolution")


def _may_be_between(address: Address, first: str, second: str) -> bool:
    """Whether it can be the address of what one module gives the next: a whole that ends or begins there has it too."""
    if address.field or not address.name:
        return False
    inside = [f"{module}.".startswith(f"{address.name}.") for module in (first, second)]
    return inside == ([False, True] if address.input else [True, False])


def _round_weights(network: nn.Module) -> None:
    for layer in network.modules():
        # a weight that is calculated (parametrised, tied to an embedding) is a parameter of somebody else
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and "weight" in layer._parameters:
            for name, value in layer._parameters.items():
                if value is not None and value.dtype == torch.float32:
                    layer._parameters[name] = nn.Parameter(value.to(torch.bfloat16), requires_grad=False)


def _int8_file(network: nn.Module, inputs: Inputs | None) -> bytes:
    if inputs is None or inputs.kwargs or any(t.device.type != "cpu" for t in inputs.tensors()):
        raise Refused("only for unnamed inputs on the processor")
    from tutelage.deploy.export import export

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.onnx"
        with torch.autocast("cpu", enabled=False):  # it would be traced too
            export(network, inputs.args, file, quantize="int8", calibration=[inputs.args])
        return file.read_bytes()


class _Int8(nn.Module):
    """An ONNX file as a network."""

    def __init__(self, file: bytes):
        super().__init__()
        from tutelage.deploy.running import open_exported

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "teacher.onnx"
            path.write_bytes(file)
            self.run = open_exported(path)

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.run(*inputs)))
