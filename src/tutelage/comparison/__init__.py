"""Comparing methods on equal terms: cells in processes, figures over seeds and how far to trust them.

The tables are functions of :mod:`tutelage.comparison.tables`, the page is :func:`tutelage.comparison.pages.report`.
"""

from __future__ import annotations

from tutelage.comparison.cells import Cell, CellResult
from tutelage.comparison.comparing import Compared, compare
from tutelage.comparison.intervals import Interval, mean_interval, paired_interval, student_t
from tutelage.comparison.lines import Line, caution, verdicts
from tutelage.comparison.plan import Comparison
from tutelage.comparison.quoted import Quoted
from tutelage.comparison.reading import read_comparison
from tutelage.comparison.timing import StepTime

__all__ = [
    "Cell",
    "CellResult",
    "Compared",
    "Comparison",
    "Interval",
    "Line",
    "Quoted",
    "StepTime",
    "caution",
    "compare",
    "mean_interval",
    "paired_interval",
    "read_comparison",
    "student_t",
    "verdicts",
]
