"""Means over seeds with Student-t intervals: how far a figure can be trusted.

>>> print(mean_interval([87.0, 87.4, 86.9]))
87.1 ± 0.7
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its confidence interval.

    ``half_width`` is nan when ``n`` is one: a single value says nothing about its spread. ``str`` rounds both
    numbers to the first significant digit of the half width (to one decimal at least); a format such as
    ``f"{interval:.2f}"`` fixes the decimals, and ``f"{interval:+}"`` gives the mean its sign.

    >>> print(Interval(0.87125, 0.0042, 5), "|", Interval(87.125, math.nan, 1))
    0.871 ± 0.004 | 87.1
    >>> f"{Interval(1.0, 0.25, 3):+.2f}"
    '+1.00 ± 0.25'
    """

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width

    def __format__(self, spec: str) -> str:
        if "." not in spec:
            spec = f"{spec}.{self._decimals()}f"
        text = format(self.mean, spec)
        # A sign asked for belongs to the mean; a half width has none.
        return text if math.isnan(self.half_width) else f"{text} ± {self.half_width:{spec.lstrip('+ ')}}"

    def __str__(self) -> str:
        return format(self, "")

    def _decimals(self) -> int:
        # A width that is only rounding error of the mean is no width.
        if math.isfinite(self.half_width) and self.half_width > 1e-9 * abs(self.mean):
            return min(max(1, -math.floor(math.log10(self.half_width))), 12)
        return 1 if abs(self.mean) >= 1 else 3


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and Student-t confidence interval: mean ± t(n − 1) · s / √n, s the sample standard deviation.

    It is the right interval for independent, roughly normal values, such as one figure per seed.

    Args:
        values: One figure per seed, at least one.
        confidence: The probability that the interval covers the true mean, between 0 and 1.

    Returns:
        The interval; its half width is nan for a single value.

    Raises:
        ValueError: No values, a value that is not finite, or a confidence outside (0, 1).

    >>> interval = mean_interval([1.0, 2.0, 3.0])
    >>> round(interval.mean, 6), round(interval.half_width, 6), interval.n
    (2.0, 2.484138, 3)
    """
    _check_confidence(confidence)
    values = [float(v) for v in values]
    n = len(values)
    if n == 0:
        raise ValueError("values is empty: an interval needs at least one value")
    for i, v in enumerate(values):
        if not math.isfinite(v):
            raise ValueError(f"values[{i}] is {v}: an interval needs finite values")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Interval(mean, student_t(confidence, n - 1) * math.sqrt(variance / n), n)


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of the differences a[i] − b[i], where both come from the same seed i.

    What the seeds do alike to both (initialisation, order of the data) cancels, so it is narrower than the
    difference of two separate intervals when the pairs go up and down together.

    Raises:
        ValueError: The lengths differ; otherwise as :func:`mean_interval`.

    >>> print(paired_interval([87.0, 88.0, 86.0], [86.0, 87.1, 84.9]))
    1.0 ± 0.2
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b has {len(b)}: pairs need one of each per seed")
    return mean_interval([float(x) - float(y) for x, y in zip(a, b, strict=True)], confidence)


def student_t(confidence: float, df: float) -> float:
    """The t with P(|T| ≤ t) = confidence for Student's distribution with ``df`` degrees of freedom.

    It is found by bisection on the tail P(|T| > t) = I_x(df/2, 1/2) with x = df / (df + t²), where I is the
    regularised incomplete beta function.

    Raises:
        ValueError: ``df`` is not positive, or ``confidence`` lies outside (0, 1).

    >>> round(student_t(0.95, 1), 4), round(student_t(0.95, 4), 4)
    (12.7062, 2.7764)
    """
    _check_confidence(confidence)
    if not df > 0:
        raise ValueError(f"df is {df}: the degrees of freedom must be positive")
    tail = 1.0 - confidence
    low, high = 0.0, 1.0
    while _two_sided_tail(high, df) > tail:
        low, high = high, 2.0 * high
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        if _two_sided_tail(middle, df) > tail:
            low = middle
        else:
            high = middle


def _check_confidence(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1")


def _two_sided_tail(t: float, df: float) -> float:
    # Both x and 1 − x are formed without a subtraction, so that neither end loses digits.
    scale = df + t * t
    x, rest = df / scale, t * t / scale
    a, b = 0.5 * df, 0.5
    if rest == 0.0:
        return 1.0
    log_x = math.log(x) if x < 0.5 else math.log1p(-rest)
    front = math.exp(_log_inverse_beta(a) + a * log_x + b * math.log(rest))
    # The continued fraction converges fast on this side of the mean; the other side by symmetry.
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, rest) / b


def _log_inverse_beta(a: float) -> float:
    """log Γ(a + 1/2) − log Γ(a) − log Γ(1/2)."""
    if a > 100.0:
        # The two logarithms are huge and nearly equal; their asymptotic difference keeps the digits.
        ratio = 0.5 * math.log(a) - 1.0 / (8.0 * a) + 1.0 / (192.0 * a**3)
    else:
        ratio = math.lgamma(a + 0.5) - math.lgamma(a)
    return ratio - 0.5 * math.log(math.pi)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by the modified Lentz recurrence."""
    tiny = 1e-300
    c = 1.0
    d = 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return value
