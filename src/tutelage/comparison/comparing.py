"""Which method for my pair, and is it worth it: every cell run, judged and written down."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tutelage.checked import read_json, write_json
from tutelage.comparison.cells import Cell, CellResult, renamed
from tutelage.comparison.plan import CONTROL, TEACHER, Comparison
from tutelage.comparison.pool import finished, read_known, run_cells
from tutelage.comparison.quoted import Quoted
from tutelage.comparison.reading import read_comparison
from tutelage.comparison.timing import StepTime, time_steps
from tutelage.deploy.measure import Measurement
from tutelage.files import locked, writable

_FORMAT = 1


@dataclass
class Compared:
    """A finished comparison.

    Args:
        comparison: what was compared.
        results: one for each cell, also of those that were skipped.
        times: seconds of a training step by the key of a method's first cell.
        measurements: what the plain networks cost, by name.
        out: the folder.
    """

    comparison: Comparison
    results: list[CellResult]
    times: dict[str, StepTime] = field(default_factory=dict)
    measurements: dict[str, Measurement] = field(default_factory=dict)
    out: Path | None = None

    def save_json(self, path: str | Path) -> Path:
        """Write every cell with its history; a later comparison takes it as ``known``.

        Of absolute paths in the comparison (data, weights) the last part is written: the cells are known by their keys,
        and where things lay is nobody else's business.
        """
        body = {
            "format": _FORMAT,
            "comparison": _placeless(asdict(self.comparison)),
            "cells": [asdict(r) for r in self.results],
            "times": {key: asdict(t) for key, t in self.times.items()},
            "measurements": {name: asdict(m) for name, m in self.measurements.items()},
        }
        write_json(Path(path), body, checked=True)
        return Path(path)

    @classmethod
    def from_json(cls, path: str | Path) -> Compared:
        """Read what :meth:`save_json` wrote, which is enough for lines, tables and a page without pictures of weights.

        Raises:
            ValueError: the file is no comparison, is damaged, or of another format.
        """
        body = read_json(Path(path))
        if not isinstance(body, dict) or body.get("format") != _FORMAT or "cells" not in body:
            raise ValueError(f"{Path(path).name} is not a comparison of format {_FORMAT}")
        about = body["comparison"]
        about["quoted"] = [Quoted(**q) for q in about["quoted"]]
        return cls(
            Comparison(**about),
            [CellResult(**r) for r in body["cells"]],
            {key: StepTime(**t) for key, t in body["times"].items()},
            {name: Measurement(**m) for name, m in body.get("measurements", {}).items()},
        )


def compare(
    comparison: Comparison | str | Path | dict[str, Any],
    *,
    out: str | Path,
    workers: int | None = None,
    threads: int = 1,
    trust: Sequence[str] = (),
    known: str | Path | None = None,
    cluster: str | None = None,
    timing: bool = True,
    after: Callable[[CellResult, int, int], None] | None = None,
    **reading: Any,
) -> Compared:
    """Run every cell of a comparison that has no result yet, in processes of their own.

    Each cell is keyed by the hash of its recipe: an interrupted comparison goes on where it was when it is called
    again, and a method that is added later runs alone. A method that the pair cannot support is skipped with its
    reason, and tried again the next time.

    Args:
        comparison: or what :func:`read_comparison` makes one of: a file, a packaged recipe's name, fields.
        out: the folder of the cells; ``comparison.json`` is written there after every cell.
        workers: processes at a time; by default one for each ``threads`` cores, or one a GPU.
        threads: of each process.
        trust: further packages that the recipes may name.
        known: an earlier comparison's ``comparison.json``, whose cells need not be run again; their step times are
            those that were measured there.
        cluster: ``"ray"`` runs the cells on a Ray cluster.
        timing: at the end, with nothing else running, time a training step of every method beside the student alone and
            measure the networks.
        after: called with each new result, how many there are and how many there will be.
        **reading: further arguments of :func:`read_comparison`.

    Raises:
        RecipeError: a mistake in the comparison.
        BlockingIOError: another comparison is at work in ``out``.
        KeyboardInterrupt: it was stopped; what was under way has a checkpoint.
    """
    if not isinstance(comparison, Comparison):
        comparison = read_comparison(comparison, **reading)
    elif reading:
        raise TypeError(f"{', '.join(reading)}: give them to read_comparison, or a file instead of a Comparison")
    where = Path(out)
    earlier = read_known(known) if known is not None else {}
    writable(where)
    with locked(where / "lock"):
        cells, skipped = comparison.plan()
        compared = Compared(comparison, list(skipped), _times(where, known), out=where)
        results = finished(cells, where / "cells", earlier)
        for key in results:  # a process may have been killed before it had removed all that it need not go on with
            shutil.rmtree(where / "cells" / key / "run", ignore_errors=True)

        def note() -> None:
            ended = [renamed(results[cell.key], cell) for cell in cells if cell.key in results]
            compared.results = [*skipped, *ended]
            compared.save_json(where / "comparison.json")

        def noted(result: CellResult, number: int, total: int) -> None:
            results[result.key] = result
            note()
            if after is not None:
                after(result, number, total)

        note()
        run_cells(
            cells,
            where / "cells",
            workers=workers,
            threads=threads,
            trust=trust,
            known=earlier,
            cluster=cluster,
            after=noted,
        )
        if timing:
            first = _first_cells(cells, compared.results)
            with closing(time_steps(first, where / "cells", threads, trust, compared.times)) as timed:
                for key, found in timed:
                    compared.times[key] = found
                    note()
            from tutelage.comparison.pages import measure_networks

            done = [r for r in compared.results if r.state == "done" and r.method != TEACHER]
            names = {r.student for r in done} | {r.teacher for r in done if r.teacher is not None}
            compared.measurements = measure_networks(comparison, where / "cells", trust, threads=threads, names=names)
            note()
    return compared


def plain_comparison(comparison: Comparison) -> dict[str, Any]:
    """The comparison as it would be written in a file, without the control, which is in every one, and without the
    folders of files."""
    body = _placeless({f.name: getattr(comparison, f.name) for f in fields(comparison)})
    del body["methods"][CONTROL]
    body["quoted"] = [asdict(q) for q in body["quoted"]]
    return {name: value for name, value in body.items() if value not in (None, [])}


def _placeless(value: Any) -> Any:
    """A copy in which an absolute path is its last part."""
    if isinstance(value, dict):
        return {k: _placeless(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(v) for v in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _times(where: Path, known: str | Path | None) -> dict[str, StepTime]:
    found: dict[str, StepTime] = {}
    for path in (known, where / "comparison.json"):
        if path is not None and Path(path).exists():
            body = read_json(Path(path))
            found |= {key: StepTime(**t) for key, t in body.get("times", {}).items()}
    return found


def _first_cells(cells: Iterable[Cell], results: Iterable[CellResult]) -> list[Cell]:
    """Of each method on each pair that worked, its cell with the first seed."""
    done = {r.key for r in results if r.state == "done"}
    found: dict[tuple[str, str, str | None], Cell] = {}
    for cell in cells:
        if cell.key in done:
            found.setdefault((cell.method, cell.student, cell.teacher), cell)
    return list(found.values())
