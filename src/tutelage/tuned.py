"""What a tuning found: its trials, the best of them, and the files that say so."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tutelage.checked import write_json
from tutelage.files import replacing
from tutelage.plain_yaml import written_yaml
from tutelage.recipe import changed
from tutelage.searches import Search
from tutelage.training import HIGHER_IS_BETTER


@dataclass(frozen=True)
class Trial:
    """One training with the values that were tried.

    Args:
        number: from 1 up.
        state: ``complete``, ``pruned`` (ended early, as it was behind) or ``failed``.
        value: the best monitored figure on validation; ``None`` of a failed trial.
        values: by field.
        epochs: that were trained, of all trainings that report theirs (of ``stages`` the last).
        seconds: it took.
        reason: why it failed, or which trial had the same values.
    """

    number: int
    state: str
    value: float | None
    values: dict[str, Any]
    epochs: int
    seconds: float
    reason: str | None = None


@dataclass
class Tuned:
    """A finished study. ``print`` says what was found, and what that figure is worth.

    Args:
        monitor: the validation figure by which the trials were compared.
        trials: all that ended, in their order.
        out: the study's folder.
        importance: each field's share in what made the best trials the best; empty of few trials.
    """

    monitor: str
    trials: list[Trial]
    out: Path
    importance: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The best whole trial.

        Raises:
            ValueError: there is none; the message says what became of the trials.
        """
        if ranked := self.ranked():
            return ranked[0]
        reasons = [trial.reason for trial in self.trials if trial.reason]
        why = f"; the first reason: {reasons[0]}" if reasons else ""
        raise ValueError(f"tune: none of {len(self.trials)} trials was trained to its end{why}")

    def ranked(self) -> list[Trial]:
        """The whole trials, the best first."""
        whole = [(trial.value, trial) for trial in self.trials if trial.state == "complete" and trial.value is not None]
        sign = -1.0 if self.monitor in HIGHER_IS_BETTER else 1.0
        return [trial for value, trial in sorted(whole, key=lambda pair: sign * pair[0])]

    def table(self, rows: int = 10) -> Table:
        """The best trials, with what they were trained with."""
        fields = list(self.trials[0].values) if self.trials else []
        table = Table("trial", self.monitor, *(name.replace(".init_args", "") for name in fields), "epochs", "seconds")
        for trial in self.ranked()[:rows]:
            values = [shown(trial.values[name]) for name in fields]
            table.add_row(str(trial.number), shown(trial.value), *values, str(trial.epochs), f"{trial.seconds:.1f}")
        return table

    def __str__(self) -> str:
        states = [trial.state for trial in self.trials]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed") if s in states)
        best = self.best
        return (
            f"{self.monitor} {shown(best.value)} on validation, by trial {best.number}: the best of "
            f"{len(self.trials)} trials ({counts}).\n"
            "It was chosen as the best on that same data, so it is optimistic; the test data were not looked at.\n"
            f"For the test figure run {self.out / 'best.yaml'} once, when nothing is left to choose."
        )


def write_found(tuned: Tuned, fields: dict[str, Any], searches: Sequence[Search], name: str) -> None:
    """The tables of trials, and the recipe with the best values."""
    about = {"monitor": tuned.monitor, "data": "validation", "trials": [asdict(t) for t in tuned.trials]}
    write_json(tuned.out / "trials.json", about)
    columns = ["trial", "state", tuned.monitor, "epochs", "seconds", "reason", *(s.field for s in searches)]
    with replacing(tuned.out / "trials.csv") as beside, beside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for t in tuned.trials:
            values = [v if isinstance(v, int | float | str) else json.dumps(v) for v in t.values.values()]
            rows.writerow([t.number, t.state, t.value, t.epochs, round(t.seconds, 3), t.reason, *values])
    if not tuned.ranked():
        return
    best = tuned.best
    chosen = [f"{place}={json.dumps(value)}" for place, value in best.values.items()]
    head = (
        f"# Made by `tutelage tune` of the recipe {name}: trial {best.number}, the best of {len(tuned.trials)} by its\n"
        f"# {tuned.monitor} on the validation data, {shown(best.value)}. The test data were not looked at.\n"
    )
    with replacing(tuned.out / "best.yaml") as beside:
        beside.write_text(head + written_yaml(changed(fields, chosen)), encoding="utf-8")


def shown(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
