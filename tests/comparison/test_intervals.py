from __future__ import annotations

import math
import statistics

import pytest

from tutelage.comparison import Interval, mean_interval, paired_interval, student_t

# Two-sided quantiles as printed in statistical tables.
TABLE = [
    (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 5, 2.571),
    (0.95, 9, 2.262), (0.95, 10, 2.228), (0.95, 30, 2.042), (0.95, 100, 1.984), (0.95, 1e8, 1.960),
    (0.90, 5, 2.015), (0.99, 2, 9.925), (0.99, 10, 3.169), (0.999, 5, 6.869), (0.50, 4, 0.741),
]  # fmt: skip


@pytest.mark.parametrize(("confidence", "df", "expected"), TABLE)
def test_quantile_agrees_with_the_table(confidence, df, expected):
    assert student_t(confidence, df) == pytest.approx(expected, abs=5.1e-4)


@pytest.mark.parametrize("confidence", [0.01, 0.5, 0.9, 0.95, 0.999, 0.999999])
def test_quantile_agrees_with_the_closed_forms(confidence):
    # df 1 is Cauchy's distribution, df 2 has an algebraic quantile, df → ∞ is the normal distribution.
    assert student_t(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-9)
    assert student_t(confidence, 2) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-9)
    normal = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    assert student_t(confidence, 1e9) == pytest.approx(normal, rel=1e-6)


def test_quantile_is_smooth_where_the_method_changes():
    around = [student_t(0.95, df) for df in (199.0, 200.0, 201.0)]
    assert around[0] - around[1] == pytest.approx(around[1] - around[2], rel=0.02)
    # 200 degrees of freedom, as tables with more digits print it.
    assert around[1] == pytest.approx(1.971896, abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 29, 100])
def test_quantile_agrees_with_the_integrated_density(df):
    t = student_t(0.95, df)
    norm = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    steps = 4000
    h = t / steps
    density = [norm * (1 + (i * h) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    simpson = h / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))
    assert 2 * simpson == pytest.approx(0.95, abs=1e-8)


def test_mean_interval_is_the_textbook_formula():
    values = [86.1, 87.9, 87.0, 88.2, 86.6]
    interval = mean_interval(values)
    assert interval.n == 5
    assert interval.mean == pytest.approx(statistics.mean(values))
    assert interval.half_width == pytest.approx(2.776445 * statistics.stdev(values) / math.sqrt(5), rel=1e-6)
    assert interval.high - interval.low == pytest.approx(2 * interval.half_width)


def test_shift_and_scale():
    values = [0.2, 0.5, 0.9, 0.4]
    first = mean_interval(values)
    other = mean_interval([100 * v + 7 for v in values])
    assert other.mean == pytest.approx(100 * first.mean + 7)
    assert other.half_width == pytest.approx(100 * first.half_width)


def test_one_value_has_no_width_and_prints_alone():
    interval = mean_interval([87.13])
    assert math.isnan(interval.half_width)
    assert str(interval) == "87.1"
    assert f"{interval:.2f}" == "87.13"


def test_prints_to_the_first_digit_of_the_half_width():
    assert str(Interval(87.12, 0.43, 3)) == "87.1 ± 0.4"
    assert str(Interval(87.12, 12.3, 3)) == "87.1 ± 12.3"
    assert str(Interval(0.87125, 0.0042, 3)) == "0.871 ± 0.004"
    assert str(Interval(1.0, 0.0, 3)) == "1.0 ± 0.0"
    # Equal values whose mean is off by a rounding error.
    assert str(mean_interval([100 * 0.904] * 3)) == "90.4 ± 0.0"
    assert str(Interval(90.4, 2e-14, 3)) == "90.4 ± 0.0"


def test_pairs_cancel_what_the_seed_does_to_both():
    control = [80.0, 85.0, 90.0]
    student = [81.0, 86.1, 90.9]
    interval = paired_interval(student, control)
    assert interval.mean == pytest.approx(1.0)
    assert interval.half_width < mean_interval(student).half_width / 10
    swapped = paired_interval(control, student)
    assert swapped.mean == pytest.approx(-interval.mean)
    assert swapped.half_width == pytest.approx(interval.half_width)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([]), "empty"),
        (lambda: mean_interval([1.0, math.nan]), r"values\[1\]"),
        (lambda: mean_interval([1.0, 2.0], confidence=95), "confidence is 95"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), "1 values and b has 2"),
        (lambda: student_t(0.95, 0), "df is 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
