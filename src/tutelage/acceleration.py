"""A frozen network made cheaper: changes to a copy of it, how far each moves what it says, and which ones pay."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tutelage.console import say
from tutelage.errors import nearest
from tutelage.knowledge.base import classes_last
from tutelage.record import Record, in_float32, logits_of
from tutelage.taps import Address, Observer
from tutelage.views import Inputs

SPEEDS = ("bf16", "channels_last", "fold", "compile", "int8")
"""The accelerations, in the order in which they are tried and applied."""
AUTO = SPEEDS[:3]
"""Those that ``"auto"`` tries: ``compile`` costs 6 to 36 s before it gains anything, and ``int8`` needs a runtime."""

_ROUNDS = 3
_GAIN = 0.95  # a form must take less than this part of the time, or it is not worth its deviation
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


@dataclass(frozen=True)
class Deviation:
    """How far an accelerated network is from the plain one on a batch.

    Args:
        divergence: mean KL(plain ‖ accelerated) of the logits' softmax at T = 1, in nats; 0 where there are no logits.
        error: the largest ‖accelerated − plain‖ / ‖plain‖ of the tensors that are read.
    """

    divergence: float
    error: float

    @classmethod
    def between(cls, plain: Record, other: Record, reads: Iterable[str]) -> Deviation:
        """Of two records of the same batch; infinite where a tensor has another shape or is not finite.

        >>> one, two = Record(torch.tensor([[1.0, 0.0]])), Record(torch.tensor([[0.0, 1.0]]))
        >>> found = Deviation.between(one, two, ["@logits"])
        >>> round(found.divergence, 4), round(found.error, 4)  # 2·σ(1) − 1, and √2
        (0.4621, 1.4142)
        """
        error = max((_relative_error(plain[name], other[name]) for name in reads), default=0.0)
        p, q = logits_of(plain.output), logits_of(other.output)
        if p is None or q is None:
            return cls(0.0, error)
        if p.shape != q.shape:
            return cls(float("inf"), error)
        log_p, log_q = (classes_last(in_float32(x)).double().log_softmax(1) for x in (p, q))
        # below zero it can be by rounding alone
        return cls(float((log_p.exp() * (log_p - log_q)).sum(1).mean().clamp(min=0)), error)

    def within(self, max_divergence: float, max_error: float) -> bool:
        """Whether both bounds are kept; with a bound of 0 nothing may differ in a single bit."""
        if not max_divergence or not max_error:
            return self.error == 0 and self.divergence == 0
        return self.divergence <= max_divergence and self.error <= max_error  # not so for NaN

    def __str__(self) -> str:
        return f"KL {self.divergence:.2g} nats, relative error {self.error:.2g}"


def _relative_error(plain: Tensor, other: Tensor) -> float:
    if plain.shape != other.shape:
        return float("inf")
    plain, other = plain.double(), other.double()
    difference = float((other - plain).norm())
    return difference / float(plain.norm()) if difference else 0.0  # by zero is infinite or refused just as well


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
        with torch.autocast(_device(inputs), torch.bfloat16) if "bf16" in self.names else nullcontext():
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


def choose(
    plain: Observer, inputs: Inputs, speed: str | tuple[str, ...], max_divergence: float, max_error: float
) -> Form | None:
    """The plain network's fastest form within the bounds, by the clock (``"auto"``), or with the accelerations named.

    They are put one upon another, in the order of :data:`SPEEDS`. One is left out if the network does not allow it, or
    if with it a bound is broken on this batch. Named ones are then kept. For ``"auto"`` each is taken away once, and
    stays away unless the others alone take more than 1/0.95 of the time (median of three rounds in turn): some pay only
    together, as bfloat16 does with channels last for depthwise convolutions. The choice is printed. Random numbers are
    as they were.

    Returns:
        ``None`` where the plain network is best.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
        with torch.autocast(_device(inputs), enabled=False):
            reference = plain(inputs)

        def made(names: Sequence[str]) -> tuple[Form, Deviation]:
            form = accelerated(plain, names, inputs)
            found = Deviation.between(reference, form(inputs), [a.text for a in plain.addresses])
            if not found.within(max_divergence, max_error):
                raise Refused(str(found))
            return form, found

        best: tuple[Form, Deviation] | None = None
        left_out = []
        for name in AUTO if speed == "auto" else speed:
            try:
                best = made([*(best[0].names if best else ()), name])
            except Exception as error:  # tracers, compilers and runtimes have no error in common
                left_out.append(f"{name} ({' '.join(str(error).split())[:200]})")
        for name in best[0].names if best and speed == "auto" else ():
            assert best is not None
            rest = [n for n in best[0].names if n != name]
            try:
                without = made(rest) if rest else None
            except Refused:
                continue
            if time_ratio(best[0], without[0] if without else plain, inputs) > _GAIN:
                best = without
        gain = 1 / time_ratio(best[0], plain, inputs) if best else 1.0
        if speed == "auto" and gain < 1 / _GAIN:
            best = None
    words = "plain: nothing faster is possible within the bounds"
    if best:
        words = f"{' + '.join(best[0].names)}, {gain:.2g} times as fast ({best[1]})"
    if left_out and speed != "auto":
        words += f"; left out: {', '.join(left_out)}"
    say(f"teacher {type(plain.model).__name__}: {words}")
    return best[0] if best else None


def _device(inputs: Inputs) -> str:
    return next((t.device.type for t in inputs.tensors()), "cpu")


def time_ratio(form: Callable[[Inputs], Any], other: Callable[[Inputs], Any], inputs: Inputs) -> float:
    """Time of one over the time of the other, in turn: the median of three rounds.

    After a first round in which it takes more than twice as long (bfloat16 where the processor has to imitate it) it
    is not called again.
    """
    first = _seconds(form, inputs) / _seconds(other, inputs)
    if first > 2:
        return first
    return statistics.median(_seconds(form, inputs) / _seconds(other, inputs) for _ in range(_ROUNDS))


def _seconds(call: Callable[[Inputs], Any], inputs: Inputs) -> float:
    _wait()
    began = time.perf_counter()
    call(inputs)
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


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
        # an address that contains the one and not the other may be that of the tensor between them
        names = [str(node.target), str(after.target)]
        if any(_contains(a.name, names[0]) != _contains(a.name, names[1]) for a in addresses if not a.field):
            continue
        folded = fuse_conv_bn_eval(modules[names[0]], modules[names[1]])  # type: ignore[type-var]
        for name, module in zip(names, (folded, nn.Identity()), strict=True):
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, module)
        pairs += 1
    if not pairs:
        raise Refused("no batch norm can be folded into a convolution")


def _contains(name: str, module: str) -> bool:
    return not name or module == name or module.startswith(f"{name}.")


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
