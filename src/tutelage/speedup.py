"""Which accelerations of a network pay: how far each moves what it says, and what the clock says of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.acceleration import AUTO, Form, Refused, accelerated, device_of
from tutelage.console import say
from tutelage.knowledge.base import classes_last
from tutelage.record import Record, logits_of
from tutelage.taps import Observer
from tutelage.views import Inputs

_ROUNDS = 3
_PIECE = 2**22  # values that are compared at a time, in double precision
_GAIN = 0.95  # a form must take less than this part of the time, or it is not worth its deviation


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
        p, q = classes_last(p), classes_last(q)
        total, rows = 0.0, max(1, _PIECE // p.shape[1])
        for one, two in zip(p.split(rows), q.split(rows), strict=True):
            log_p, log_q = one.double().log_softmax(1), two.double().log_softmax(1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        return cls(max(total / max(len(p), 1), 0.0), error)  # below zero it can be by rounding alone

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
    difference = size = 0.0
    for one, two in zip(plain.reshape(-1).split(_PIECE), other.reshape(-1).split(_PIECE), strict=True):
        difference += float((two.double() - one.double()).square().sum())
        size += float(one.double().square().sum())
    if not difference:
        return 0.0
    return math.sqrt(difference / size) if size and math.isfinite(difference) else float("inf")


def choose(
    plain: Observer, inputs: Inputs, speed: str | tuple[str, ...], max_divergence: float, max_error: float
) -> Form | None:
    """The plain network's fastest form within the bounds, by the clock (``"auto"``), or with the accelerations named.

    They are put one upon another, in the order of :data:`tutelage.acceleration.SPEEDS`. One is left out if the network
    does not allow it, or if with it a bound is broken on this batch. Named ones are then kept. For ``"auto"`` each is
    taken away once, and stays away unless the others alone take more than 1/0.95 of the time (median of three rounds in
    turn): some pay only together, as bfloat16 does with channels last for depthwise convolutions. The choice is
    printed. Random numbers are as they were.

    Returns:
        ``None`` where the plain network is best.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
        with torch.autocast(device_of(inputs), enabled=False):
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
