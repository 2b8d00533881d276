"""``tutelage cache``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tutelage.commands import Add
from tutelage.commands.common import print_json, shown
from tutelage.console import console, say


def cache(
    recipe: str | None = None,
    out: str | None = None,
    codec: Literal["float32", "float16", "int8", "top_k"] | None = None,
    k: int | None = None,
    temperature: float | None = None,
    views: int | None = None,
    set: list[str] | None = None,
    trust: list[str] | None = None,
    check: str | None = None,
    json: bool = False,
) -> None:
    """Keep a teacher's outputs on disk ahead of the trainings that read them, or check what is kept.

    Args:
        recipe: File, or name of a packaged recipe: its teacher, its data, and what its losses read.
        out: Folder of the cache; by default that of the recipe's own cache. The same command goes on where it stopped.
        codec: Of the logits: float32, float16, int8 or top_k. By default the recipe's, or float16.
        k: Classes that top_k keeps. By default the recipe's, or 10.
        temperature: At which top_k keeps them, that of the losses. By default the recipe's, or 1.
        views: Augmented views of each sample, if the recipe's data are not replayed; 4 if not given.
        set: A change to the recipe, such as data.init_args.limit=1000; repeat it for several.
        trust: Further package or module whose classes and functions the recipe may name.
        check: Compare every checksum of the cache in this folder, and print what it holds.
        json: Print JSON.
    """
    from pathlib import Path

    from tutelage.cache_folder import Cache

    if (recipe is None) == (check is None):
        raise ValueError("cache: give a recipe to fill a cache, or --check FOLDER")
    if check is not None:
        _print(Cache(check), json)
        return
    assert recipe is not None
    if trust:
        sys.path.append(os.getcwd())  # where a module of one's own is, and where an installed command does not look
    role, trained = _fill(
        recipe, set or [], trust or [], out, {"codec": codec, "k": k, "temperature": temperature}, views
    )
    assert role.cache is not None
    _print(role.cache, json)
    about = role.cache.about
    about_codec = ", ".join(f"{'codec' if name == 'name' else name}: {v}" for name, v in about["codec"].items())
    say(
        f"cache: {role.folder}   in a recipe: teacher: {{class_path: Cached, init_args: {{module: ..., folder: "
        f"{Path(role.folder)}, {about_codec}}}}}, data: {{class_path: replayed_loaders, init_args: {{data: ..., views: "
        f"{about['views']}, seed: {about['seed']}}}}}"
        + (f", teacher_weights: {trained}, teacher_training: null" if trained else "")
    )


def _fill(
    recipe: str, changes: list[str], trust: list[str], out: str | None, wanted: dict[str, Any], views: int | None
) -> tuple[Any, str | None]:
    """Fill a cache as a recipe says; returns the teacher, and the file of its weights if it was trained here."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tutelage.cache import Cached, fill
    from tutelage.data.replayed import Replayed, ReplayedArrays, replayed
    from tutelage.distillation import Distillation
    from tutelage.files import writable
    from tutelage.recipe import load, student_network
    from tutelage.run import seed_epoch
    from tutelage.views import Batch, SameView, move

    parts = load(recipe, changes, trust).keywords
    network = _network(parts)
    given, loader = parts["teacher"], parts["data"].train
    settings = {name: value for name, value in wanted.items() if value is not None}
    if isinstance(given, Cached):
        out = out or given.folder
        codec = given.codec
        settings = {"codec": codec.name, "k": codec.k, "temperature": codec.temperature, **settings}
    if out is None:
        raise ValueError("out: the recipe has no cache of its own: give --out FOLDER")
    known = isinstance(loader, ReplayedArrays) or isinstance(getattr(loader, "dataset", None), Replayed)
    if not known:
        loader = replayed(loader, 4 if views is None else views)
    count = loader.views if isinstance(loader, ReplayedArrays) else loader.dataset.views
    if views is not None and views != count:
        raise ValueError(f"views={views}: the recipe's data have {count}; change them there")
    role = Cached(network, out, **settings)
    writable(out)
    trained = _weights(parts, network, out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed, seen = parts.get("seed", 0), parts.get("views") or SameView()

    def batches(view: int) -> Iterator[Batch]:
        seed_epoch(seed, view, loader)
        for raw in loader:
            yield seen(move(raw, device))

    terms = [stage.losses for stage in parts.get("stages") or ()] or [parts.get("losses")]
    student = student_network(parts)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            for losses in terms:
                d = Distillation(student, role, losses, parts.get("views")).to(device)
                seed_epoch(seed, 0, loader)
                d.bind(move(next(iter(loader)), device), population=len(loader.dataset))
                task = bar.add_task("samples", total=count * len(loader.dataset))
                fill(role, batches, count, lambda n, task=task: bar.advance(task, n))  # type: ignore[misc]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what was done is in {out}, and the same command goes on there") from None
    return role, trained


def _network(parts: dict[str, Any]) -> Any:
    """The recipe's teacher, if it is one that a cache can stand for."""
    from torch import nn

    from tutelage.cache import Cached
    from tutelage.teachers import Frozen

    for field in ("source", "procedure"):
        if parts.get(field):
            raise ValueError(f"{field}: a cache is for one training on data that stay; take {field} out")
    teacher = parts.get("teacher")
    if isinstance(teacher, Frozen) and type(teacher) in (Frozen, Cached):
        return teacher.module
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher: cache needs a recipe whose teacher is a network, got {type(teacher).__name__}")
    return teacher


def _weights(parts: dict[str, Any], network: Any, out: str) -> str | None:
    """Load or train what the recipe says of the teacher; returns the file of weights that were trained."""
    import dataclasses
    from pathlib import Path

    from tutelage.checkpoint import plain_state, write_weights
    from tutelage.distilling import distill
    from tutelage.models import load_weights

    if parts.get("teacher_weights"):
        load_weights(network, parts["teacher_weights"])
    if parts.get("teacher_training") is None:
        return None
    file = Path(out) / "teacher.safetensors"
    if not file.exists():
        settings = dataclasses.replace(parts["teacher_training"], seed=parts.get("seed", 0))
        distill(network, None, parts["data"].train, parts["data"].validation, training=settings)
        write_weights(file, plain_state(network))
    load_weights(network, str(file))
    return str(file)


def _print(held: Any, json: bool) -> None:
    from dataclasses import asdict

    lines = held.held()
    if json:
        print_json({**held.about, "tensors": [asdict(line) for line in lines]})
        return
    about = held.about
    kind = ", ".join(str(v) if n == "name" else f"{n}={v}" for n, v in about["codec"].items())
    seed = "not augmented" if about["seed"] is None else f"{about['views']} views, seed {about['seed']}"
    table = Table(
        *("tensor", "rows", "bytes a row", "of float32", "nats, mean", "nats, most", "mass kept"),
        title=f"{held.folder}: {about['teacher']['class']} {about['teacher']['sha256'][:12]}; {seed}; {kind}",
    )
    for line in lines:
        small = [None if v is None else f"{v:.2g}" for v in (line.nats, line.most_nats)]
        table.add_row(
            line.address,
            shown(line.rows),
            shown(line.row_bytes),
            f"{line.row_bytes / line.float32_bytes:.1%}",
            *(v or "" for v in small),
            "" if line.mass is None else f"{line.mass:.2%}",
        )
    Console().print(table)


def arguments(add: Add) -> None:
    """The command line's grammar of :func:`cache`."""
    add("recipe", nargs="?")
    add("--out", metavar="FOLDER")
    add("--codec", choices=("float32", "float16", "int8", "top_k"))
    add("--k", type=int, metavar="N")
    add("--temperature", type=float, metavar="T")
    add("--views", type=int, metavar="N")
    add("--set", action="append", metavar="FIELD=VALUE")
    add("--trust", action="append", metavar="PACKAGE")
    add("--check", metavar="FOLDER")
    add("--json", action="store_true")
