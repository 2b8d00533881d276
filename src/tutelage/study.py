"""The study of a tuning: its folder, and what Optuna keeps in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.checked import write_json
from tutelage.searches import Search

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

WHOLE_FOR_IMPORTANCE = 10  # trials: importance is not calculated of fewer


def open_folder(folder: Path, about: dict[str, Any], resume: bool) -> None:
    """Say in ``study.json`` what a study is, or see that the folder's is the same.

    Raises:
        ValueError: it is of something else, or damaged.
        FileExistsError: the folder holds a study and ``resume`` was not given, or other things.
    """
    mark = folder / "study.json"
    about = json.loads(json.dumps(about, default=str))
    if folder.is_file():
        raise FileExistsError(f"out: {folder} is a file; expected a folder")
    if mark.exists() and not resume:
        raise FileExistsError(f"out: {folder} already holds a study; use --resume to go on with it, or another folder")
    if mark.exists():
        try:
            there = dict(json.loads(mark.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"resume: {mark} is damaged: {error}") from error
        for name, now in about.items():
            before = there.get(name)
            if name == "recipe" and isinstance(before, dict):
                for key in dict.fromkeys((*before, *now)):
                    if before.get(key) != now.get(key):
                        raise ValueError(
                            f"resume: the recipe of the study in {folder} has another {key}: its trials could not be "
                            "compared with new ones; take another folder"
                        )
            elif before != now:
                raise ValueError(
                    f"resume: the study in {folder} has {name} {before!r}, this one {now!r}; take another folder"
                )
        return
    others = [] if not folder.is_dir() else [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    if others:
        raise FileExistsError(
            f"out: {folder} holds other files and no study of ours ({', '.join(sorted(others)[:3])}); "
            "choose an empty folder"
        )
    write_json(mark, about)


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Optuna's own lines are left out; the study has its own."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def open_study(optuna: Any, folder: Path, higher: bool, pruner: Any) -> Iterator[optuna.Study]:
    """Optuna's study in a folder, begun if need be."""
    from sqlalchemy.engine import URL

    storage = optuna.storages.RDBStorage(
        URL.create("sqlite", database=str(folder / "study.db")).render_as_string(hide_password=False)
    )
    try:
        yield optuna.create_study(
            study_name="tutelage",
            storage=storage,
            load_if_exists=True,
            direction="maximize" if higher else "minimize",
            pruner=pruner,
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def ended_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended by themselves."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and "seconds" in t.user_attrs]


def importance(optuna: Any, study: optuna.Study, searches: Sequence[Search]) -> dict[str, float]:
    """Each field's share in what made the best trials the best; empty of few trials, and where Optuna cannot say."""
    whole = [t for t in ended_trials(study) if t.state.name == "COMPLETE"]
    if len(whole) < WHOLE_FOR_IMPORTANCE or len(searches) < 2:
        return {}
    try:
        return dict(optuna.importance.get_param_importances(study))
    except (ImportError, ValueError, RuntimeError):  # a package is missing, or all trials have one value
        return {}
