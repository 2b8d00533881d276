"""``tutelage distill``."""

from __future__ import annotations

import json
import os
import shlex
import sys

from rich.console import Console

from tutelage.commands import Add
from tutelage.console import say


def distill(
    recipe: str,
    set: list[str] | None = None,
    trust: list[str] | None = None,
    out: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Distil as a recipe says: a YAML file, or the name of a packaged one such as kd.

    Args:
        recipe: File, or name of a packaged recipe (`tutelage methods` lists them).
        set: A change to the recipe, such as training.epochs=3 or losses[1].init_args.weight=0.5.
        trust: Further package or module whose classes and functions the recipe may name, such as one of your own.
        out: Folder of the run: weights, history, checkpoints and report.html.
        seed: Instead of the recipe's.
        resume: Go on with the run in the folder.
        overwrite: Replace the run in the folder.
    """
    from pathlib import Path

    from tutelage.recipe import load

    changes = list(set or [])
    changes += [f"out={json.dumps(out)}"] if out is not None else []
    changes += [f"seed={seed}"] if seed is not None else []
    changes += ["resume=true"] if resume else []
    changes += ["overwrite=true"] if overwrite else []
    if trust:
        sys.path.append(os.getcwd())  # where a module of one's own is, and where an installed command does not look
    run = load(recipe, changes, trust or ())
    result = run()
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes, the first one reports
    loaders = run.keywords["data"]
    judged = loaders.test if loaders.test is not None else loaders.validation
    report = result.report(
        f"Distillation: {Path(recipe).stem}",
        data=judged,
        recipe=_settings(recipe, list(set or []), seed),
        command=_command(recipe, set, trust, out, seed),
    )
    folder = run.keywords.get("out")
    if report.rows:
        Console().print(report.table())
        if folder:
            report.html(Path(folder) / "report.html")
    if result.out:
        page = f"   page: {Path(folder) / 'report.html'}" if folder and report.rows else ""
        say(f"student: {result.out / 'student.safetensors'}{page}")


def _settings(recipe: str, changes: list[str], seed: int | None) -> str:
    """The recipe as it was run, but for its folder."""
    from tutelage.plain_yaml import written_yaml
    from tutelage.recipe import changed

    fields = changed(recipe, changes + ([f"seed={seed}"] if seed is not None else []))
    return written_yaml(fields, flow=None)


def _command(recipe: str, set: list[str] | None, trust: list[str] | None, out: str | None, seed: int | None) -> str:
    """What to type to get the same again, as a shell reads it."""
    words = ["tutelage", "distill", recipe]
    words += [word for change in set or [] for word in ("--set", change)]
    words += [word for package in trust or [] for word in ("--trust", package)]
    words += ["--seed", str(seed)] if seed is not None else []
    words += ["--out", out] if out is not None else []
    return shlex.join(words)


def arguments(add: Add) -> None:
    """The command line's grammar of :func:`distill`."""
    add("recipe")
    add("--set", action="append", metavar="FIELD=VALUE")
    add("--trust", action="append", metavar="PACKAGE")
    add("--out", metavar="FOLDER")
    add("--seed", type=int, metavar="N")
    add("--resume", action="store_true")
    add("--overwrite", action="store_true")
