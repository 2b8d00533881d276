"""``tutelage compare``."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

from rich.console import Console

from tutelage.commands import Add
from tutelage.console import say


def compare(
    comparison: str = "kd",
    methods: str | None = None,
    seeds: str | None = None,
    set: list[str] | None = None,
    trust: list[str] | None = None,
    out: str = "comparison",
    known: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    cluster: Literal["ray"] | None = None,
    target: float | None = None,
    no_timing: bool = False,
) -> None:
    """Compare methods with each other and with the student alone: seeds, intervals, costs, a table and a page.

    Args:
        comparison: File of a comparison (students, teachers, methods), or a recipe: a file, or a packaged one.
        methods: Names of the catalogue with commas, such as kd,fitnets,crd, beside the file's. By default, where the
            file names none, every loss.
        seeds: How many, or which with commas (3,4,5). By default the file's, or 3.
        set: A change to what all methods share, such as training.epochs=3 or data.init_args.limit=2000, or to the
            comparison itself, such as methods.KD.losses.1.init_args.temperature=2.
        trust: Further package or module whose classes and functions the recipes may name, such as one of your own.
        out: Folder of the cells and results; the same command goes on in it, and runs only what is not there yet.
        known: An earlier comparison.json, whose cells need not be run again.
        workers: Processes at a time. By default one for each core (with --threads 1), or one for each GPU.
        threads: Threads of each process.
        cluster: Run the cells on a Ray cluster (RAY_ADDRESS, or this machine).
        target: A validation accuracy between 0 and 1, to see how long each method needs to reach it.
        no_timing: Leave out the timing of steps and networks at the end.
    """
    from pathlib import Path

    from tutelage.comparison.cells import CellResult
    from tutelage.comparison.comparing import compare as run
    from tutelage.comparison.lines import caution, lines, teachers, verdicts
    from tutelage.comparison.pages import command_line, report
    from tutelage.comparison.reading import read_comparison
    from tutelage.comparison.tables import as_csv, latex, markdown, quoted_csv, quoted_markdown, terminal
    from tutelage.files import replacing

    if trust:
        sys.path.append(os.getcwd())  # where a module of one's own is, and where an installed command does not look
    plan = read_comparison(
        comparison,
        methods=[name for name in (methods or "").split(",") if name],
        seeds=_seeds(seeds),
        changes=set or (),
    )
    if target is not None:
        if not 0 < target < 1:
            raise ValueError(f"target={target}: expected a validation accuracy between 0 and 1")
        plan.target = target
    folder = Path(out)
    ended = 0

    def told(result: CellResult, done: int, total: int) -> None:
        nonlocal ended
        ended += 1
        accuracy = result.metrics.get("accuracy")
        what = f"{accuracy:.2%}" if accuracy is not None else f"{result.state}: {result.reason}"
        say(f"{done}/{total}  {result.method}  {result.student}  seed {result.seed}  {what}  ({result.seconds:.0f} s)")

    try:
        compared = run(
            plan,
            out=folder,
            workers=workers,
            threads=threads,
            trust=trust or (),
            known=known,
            cluster=cluster,
            timing=not no_timing,
            after=told,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped, {ended} results were new; the same command goes on in {folder}") from None
    found = lines(compared)
    pairs = list(dict.fromkeys((n.student, n.teacher) for n in found))
    groups = [[n for n in found if (n.student, n.teacher) == pair] for pair in pairs]
    masters = teachers(compared)
    console = Console()
    texts: dict[str, list[str]] = {"comparison.md": [], "comparison.tex": [], "comparison.csv": [as_csv(found)]}
    for (student, teacher), group in zip(pairs, groups, strict=True):
        title = f"{student} of {teacher}" + (f" ({masters[teacher]:.1%})" if teacher in masters else "")
        console.print(terminal(group, title))
        texts["comparison.md"] += [f"## {title}\n", markdown(group)]
        texts["comparison.tex"].append(latex(group))
    sentences = [*verdicts(found), *([text] if (text := caution(found)) else [])]
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False)
    texts["comparison.md"] += ["\n".join(f"- {s}" for s in sentences) + "\n"]
    if plan.quoted:
        texts["comparison.md"] += ["## Quoted from papers, not measured here\n", quoted_markdown(plan.quoted)]
        texts["quoted.csv"] = [quoted_csv(plan.quoted)]
    for name, parts in texts.items():
        with replacing(folder / name) as beside:
            beside.write_text("\n".join(parts), encoding="utf-8")
    if compared.measurements:
        page = report(compared, trust=trust or (), command=command_line(sys.argv[1:]))
        page.html(folder / "report.html")
        say(f"page: {folder / 'report.html'}   figures: {folder / 'comparison.json'}, .csv, .md, .tex")
    else:
        say(f"figures: {folder / 'comparison.json'}, .csv, .md, .tex")


def _seeds(text: str | None) -> Any:
    if text is None:
        return None
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds={text!r}: expected how many, such as 3, or which, such as 3,4,5") from None
    return numbers if "," in text else numbers[0]


def arguments(add: Add) -> None:
    """The command line's grammar of :func:`compare`."""
    add("comparison", nargs="?", default="kd")
    add("--methods", metavar="NAMES")
    add("--seeds", metavar="N")
    add("--set", action="append", metavar="FIELD=VALUE")
    add("--trust", action="append", metavar="PACKAGE")
    add("--out", default="comparison", metavar="FOLDER")
    add("--known", metavar="FILE")
    add("--workers", type=int, metavar="N")
    add("--threads", type=int, default=1, metavar="N")
    add("--cluster", choices=["ray"])
    add("--target", type=float, metavar="SHARE")
    add("--no-timing", action="store_true")
