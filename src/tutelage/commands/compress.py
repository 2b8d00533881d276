"""``tutelage compress``."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Literal

from rich.console import Console

from tutelage.commands import Add
from tutelage.commands.common import network_of, parts_of, values_of
from tutelage.console import say


class LimitsMissed(RuntimeError):
    """No file meets the limits: everything was done and kept, and nothing is claimed."""

    exit_status = 1


def compress(
    recipe: str,
    prune: list[float] | None = None,
    student: list[str] | None = None,
    max_size: str | None = None,
    max_latency: str | None = None,
    min_accuracy: str | None = None,
    precision: list[Literal["float32", "int8"]] | None = None,
    set: list[str] | None = None,
    trust: list[str] | None = None,
    out: str | None = None,
    seed: int | None = None,
    resume: bool = False,
) -> None:
    """Make a file within limits: prune or shrink, distil, quantise, export, measure, choose.

    Args:
        recipe: File, or name of a packaged recipe: teacher, data, losses, training.
        prune: Share of the teacher's channels that go, such as 0.5; repeat it for several.
        student: A smaller network, such as "SmallCNN(width=4)", or a builder that derives one from the teacher, such
            as "LowRank(rank=0.25)"; repeat it for several. By default the recipe's.
        max_size: Largest file, such as 200kB, 1.5MB or 512KiB.
        max_latency: Longest median time for one sample, such as 2ms or 500us.
        min_accuracy: Lowest accuracy on the validation data, such as 0.7; a percentage is understood too.
        precision: Of the files; repeat it for both. By default both.
        set: A change to the recipe, such as training.epochs=3 or losses[1].init_args.weight=0.5.
        trust: Further package or module whose classes and functions the recipe may name, such as one of your own.
        out: Folder for everything: student.onnx, compress.json, report.html, and a folder for each candidate.
        seed: Instead of the recipe's.
        resume: Go on in the folder; finished steps are kept.

    Raises:
        LimitsMissed: no file meets the limits.
    """
    from tutelage.deploy.candidates import PRECISIONS, Candidate, Prune
    from tutelage.deploy.compress import compress as compressed
    from tutelage.deploy.limits import Limits
    from tutelage.recipe import changed, load

    limits = Limits.parse(max_size, max_latency, min_accuracy)
    changes = list(set or [])
    changes += [f"out={json.dumps(out)}"] if out is not None else []
    changes += [f"seed={seed}"] if seed is not None else []
    if trust:
        sys.path.append(os.getcwd())  # where a module of one's own is, and where an installed command does not look
    parts = load(recipe, changes, trust or ()).keywords
    _refuse(parts)
    settings = _settings(parts)
    candidates: list[Candidate] = [Prune(ratio) for ratio in prune or ()]
    candidates += [_candidate(spec, settings.seed) for spec in student or ()]
    if not student:
        candidates.append(_own_student(parts))
    data = parts["data"]
    found = compressed(
        _teacher(parts),
        data.train,
        data.validation,
        data.test,
        candidates=candidates,
        limits=limits,
        out=parts["out"],
        precisions=tuple(precision or PRECISIONS),
        losses=parts.get("losses"),
        stages=parts.get("stages"),
        views=parts.get("views"),
        training=settings,
        teacher_training=parts.get("teacher_training"),
        about=changed(recipe, changes).get("data"),
        resume=resume,
    )
    Console().print(found.table())
    page = found.report()
    page.save_json(found.out / "report.json")
    page.html(found.out / "report.html")
    if found.chosen is None:
        raise LimitsMissed(str(found))
    say(str(found))


def _refuse(parts: dict[str, Any]) -> None:
    """What a recipe may say and a compression does not do."""
    from torch import nn

    if not isinstance(parts.get("teacher"), nn.Module):
        raise ValueError("teacher: compress needs a recipe whose teacher is a network")
    if parts["data"].validation is None:
        raise ValueError("data: compress needs validation data to choose by")
    for field in ("source", "procedure"):
        if parts.get(field):
            raise ValueError(f"{field}: compress distils from the teacher and the data alone; take {field} out")
    if not parts.get("out"):
        raise ValueError("out: compress needs a folder; give --out FOLDER")
    if parts.get("control"):
        say("control: not trained here; `tutelage distill` does")


def _settings(parts: dict[str, Any]) -> Any:
    import dataclasses

    from tutelage.training import Training

    return dataclasses.replace(parts.get("training") or Training(epochs=10), seed=parts.get("seed", 0))


def _teacher(parts: dict[str, Any]) -> Any:
    from tutelage.models import load_weights

    if parts.get("teacher_weights"):
        load_weights(parts["teacher"], parts["teacher_weights"])
    return parts["teacher"]


def _own_student(parts: dict[str, Any]) -> Any:
    from torch import nn

    from tutelage.deploy.candidates import Shrink
    from tutelage.models import load_weights

    if not isinstance(parts["student"], nn.Module):  # a builder
        if parts.get("student_weights"):
            raise ValueError(
                "student_weights: compress derives this student from the teacher; take student_weights out"
            )
        return parts["student"]
    if parts.get("student_weights"):
        load_weights(parts["student"], parts["student_weights"])
    return Shrink(parts["student"], name="student")


def _candidate(spec: str, seed: int) -> Any:
    """A builder such as ``LowRank(rank=0.25)``, or a network with first weights that do not depend on the others."""
    import torch

    import tutelage
    from tutelage.architecture.builders import StudentBuilder
    from tutelage.building import Builder
    from tutelage.deploy.candidates import Shrink

    name, arguments, file = parts_of(spec)
    target = getattr(tutelage, name, None)
    if isinstance(target, type) and issubclass(target, StudentBuilder) and file is None:
        return Builder(()).call(target, values_of(arguments), f"student={spec}", f"student={spec}")
    torch.manual_seed(seed)
    return Shrink(network_of(spec, None), name=_label(spec))


def _label(spec: str) -> str:
    """A folder's name for a network's words.

    >>> _label("SmallCNN(width=4)"), _label("timm:resnet18(num_classes=10)")
    ('SmallCNN-width=4', 'timm-resnet18-num_classes=10')
    """
    return re.sub(r"[^\w.=+-]+", "-", spec).strip("-.")


def arguments(add: Add) -> None:
    """The command line's grammar of :func:`compress`."""
    add("recipe")
    add("--prune", type=float, action="append", metavar="RATIO")
    add("--student", action="append", metavar="MODEL")
    add("--max-size", metavar="SIZE")
    add("--max-latency", metavar="TIME")
    add("--min-accuracy", metavar="SHARE")
    add("--precision", action="append", choices=["float32", "int8"])
    add("--set", action="append", metavar="FIELD=VALUE")
    add("--trust", action="append", metavar="PACKAGE")
    add("--out", metavar="FOLDER")
    add("--seed", type=int, metavar="N")
    add("--resume", action="store_true")
