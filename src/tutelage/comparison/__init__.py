"""Comparing methods on equal terms: figures over seeds and how far to trust them."""

from __future__ import annotations

from tutelage.comparison.intervals import Interval, mean_interval, paired_interval, student_t

__all__ = ["Interval", "mean_interval", "paired_interval", "student_t"]
