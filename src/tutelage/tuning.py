"""Tuning: a recipe's settings chosen by Optuna on the validation data, and never on the test data.

A study's folder:

``study.json``             which recipe, which searches and which seed, written first
``study.db``               Optuna's own storage, from which an interrupted study goes on
``teacher/``               the run of the teacher, if the recipe trains one
``trials.csv``, ``.json``  every trial, written after each
``best.yaml``              the recipe with the best values in it
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tutelage.building import RecipeError
from tutelage.console import say
from tutelage.data.loaders import Loaders
from tutelage.distilling import distill
from tutelage.errors import require
from tutelage.models import load_weights
from tutelage.progress import NonFiniteLoss
from tutelage.recipe import changed, distil_recipe, load
from tutelage.run import Epoch, Interrupted
from tutelage.searches import Search, expand
from tutelage.study import ended_trials, importance, open_folder, open_study, quiet
from tutelage.training import HIGHER_IS_BETTER, Training
from tutelage.tuned import Trial, Tuned, shown, write_found
from tutelage.views import SameView

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

WHOLE_BEFORE_PRUNING = 5  # trials: nothing is compared with fewer


def tune(
    recipe: str | Path | dict[str, Any],
    space: Iterable[Search | str],
    *,
    trials: int = 20,
    out: str | Path,
    changes: Iterable[str] = (),
    trust: Iterable[str] = (),
    seed: int = 0,
    prune: bool = True,
    timeout: float | None = None,
    resume: bool = False,
) -> Tuned:
    """Choose a recipe's settings: train it with one set of values after the other, and judge each on validation.

    A trial is the recipe with the trial's values in it, without control and without a folder; its test data are not
    handed to it. Its value is the best of ``training.monitor`` over the epochs. What the recipe refuses with these
    values (layers that cannot be connected) and what diverges is a failed trial, and the study goes on. Values that
    come a second time are not trained again.

    Values are drawn by Optuna's TPE (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization",
    https://papers.nips.cc/paper/4443): the same seed gives the same trials, also when the study was interrupted. An
    interrupted trial does not count and is trained again.

    Args:
        recipe: a file, the name of a packaged recipe, or its fields.
        space: what is searched, as :class:`Search` or in its text; or ``"temperature"`` (of every loss that has one:
            1..10), ``"weights"`` (of every loss but the task's: a tenth to ten times of what the recipe says) and
            ``"layers"`` (of every loss that reads stages: what the recipe says, the automatic choice, and each stage
            of the student with each of the teacher).
        trials: how many, with those of a study that is resumed.
        out: the study's folder.
        changes: to the recipe, as for :func:`tutelage.recipe.load`.
        trust: as for :func:`tutelage.recipe.load`.
        seed: of the drawn values. Every trial is trained with the recipe's own seed.
        prune: end a trial whose best figure is worse than the median of the trials before at the same epoch; from the
            sixth trial on, and not in the first quarter of the epochs. Of ``stages`` only the last is judged.
        timeout: seconds after which no further trial begins.
        resume: go on with the study in ``out``, or begin it if there is none.

    Returns:
        Every trial; ``best.yaml`` in the folder is the recipe with the values of the best one. A teacher that the
        recipe trains is trained once, before the first trial, and ``best.yaml`` reads its weights.

    Raises:
        RecipeError: the recipe, or a field that it does not have.
        ValueError: a search that cannot be, data without validation, a study of something else in ``out``, or not one
            trial that was trained to its end.
        FileExistsError: ``out`` holds a study and ``resume`` was not given, or other things.
        ImportError: Optuna is not installed.
        Interrupted: Ctrl-C or SIGTERM; the trials that ended are kept.
    """
    optuna = require("optuna", extra="tune")
    if trials < 1 or (timeout is not None and timeout <= 0):
        raise ValueError(f"trials={trials}, timeout={timeout}: expected 1 or more trials and seconds above 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tune: a study runs in one process; start it without a launcher")
    fields, trust = changed(recipe, changes), tuple(trust)
    base: dict[str, Any] = load(fields, (), trust).keywords
    if base["data"].validation is None:
        raise ValueError("data: no validation batches, by which trials could be judged")
    if base.get("teacher_training") is not None and not isinstance(base.get("teacher"), nn.Module):
        raise ValueError(
            "teacher_training: tune trains a network as the teacher; train this one before, and name its files"
        )
    searches = expand(fields, space, base, trust)
    _check(fields, searches, trust)

    folder = Path(out)
    about = {"recipe": fields, "search": [str(s) for s in searches], "seed": seed, "prune": prune}
    open_folder(folder, about, resume)
    laid: dict[str, Any] = dict(fields)  # every trial's, with the teacher as it is after its training
    if base.get("teacher_training") is not None:
        del laid["teacher_training"]
        laid["teacher_weights"] = str(_trained_teacher(base, folder / "teacher").resolve())
    judge = _judge(base) if any(s.field.split(".")[0] == "data" for s in searches) else None
    settings = _training(base)
    stages = base.get("stages")
    epochs = (stages[-1].epochs if stages else settings.epochs) or 1
    pruners = optuna.pruners
    pruner = pruners.MedianPruner(WHOLE_BEFORE_PRUNING, epochs // 4) if prune else pruners.NopPruner()
    tuned = Tuned(settings.monitor, [], folder)
    name = str(recipe) if isinstance(recipe, str | Path) else "given as fields"

    with quiet(optuna), open_study(optuna, folder, settings.monitor in HIGHER_IS_BETTER, pruner) as study:

        def note() -> list[FrozenTrial]:
            ended = ended_trials(study)
            tuned.trials = [_trial(number, trial, searches) for number, trial in enumerate(ended, 1)]
            write_found(tuned, laid, searches, name)
            return ended

        for left in study.get_trials(deepcopy=False):
            if not left.state.is_finished():  # its process was killed
                study.tell(left.number, state=optuna.trial.TrialState.FAIL)
        began, ended = time.monotonic(), note()
        while len(ended) < trials:
            # Seeded anew by what went before, so that a resumed study draws what it would have drawn
            study.sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(ended)) % 2**32)
            trial = study.ask({s.field: s.distribution() for s in searches})
            try:
                _run(study, _Watch(trial, settings.monitor), ended, laid, searches, trust, judge)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped in trial {len(ended) + 1} of {trials}; {len(ended)} are kept in {folder}, "
                    "go on with resume"
                ) from None
            ended = note()
            _say_last(tuned, trials)
            if timeout is not None and time.monotonic() - began >= timeout:
                break
        tuned.importance = importance(optuna, study, searches)
    tuned.best  # noqa: B018  (raises where there is none)
    return tuned


def _check(fields: dict[str, Any], searches: Sequence[Search], trust: Iterable[str]) -> None:
    """Refuse what no values would make right, such as the name of a field."""
    try:
        load(fields, [s.change(s.ends[0]) for s in searches], trust)
    except RecipeError as error:
        try:
            load(fields, [s.change(s.ends[1]) for s in searches], trust)
        except RecipeError:
            raise RecipeError(f"search: {str(error).replace('--set ', '')}") from None


def _trained_teacher(built: dict[str, Any], where: Path) -> Path:
    """The file of the teacher's weights, trained if it is not yet."""
    weights = where / "student.safetensors"  # which is written last
    if not weights.exists():
        teacher, data = built["teacher"], built["data"]
        if built.get("teacher_weights"):
            load_weights(teacher, built["teacher_weights"])
        settings = dataclasses.replace(built["teacher_training"], seed=built.get("seed", 0))
        distill(teacher, None, data.train, data.validation, training=settings, out=where, resume=True)
    return weights


def _training(built: dict[str, Any]) -> Training:
    return built.get("training") or Training(epochs=10)


def _judge(built: dict[str, Any]) -> str:
    """What the validation labels are, in their order."""
    views, digest = built.get("views") or SameView(), hashlib.sha256()
    for raw in built["data"].validation:
        labels = views(raw).labels
        if labels is not None:
            digest.update(labels.cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class _Watch:
    """Told of each epoch of a trial; tells Optuna, which may end it."""

    trial: optuna.Trial
    monitor: str
    epochs: int = 0
    best: float | None = None

    def __call__(self, line: Epoch) -> None:
        self.epochs += 1
        if self.monitor not in line.metrics:
            return
        value = line.metrics[self.monitor]
        if Training(epochs=1, monitor=self.monitor).better(value, self.best):
            self.best = value
        self.trial.report(value, line.epoch)
        if self.trial.should_prune():
            raise require("optuna", extra="tune").TrialPruned


def _run(
    study: optuna.Study,
    watch: _Watch,
    ended: list[FrozenTrial],
    fields: dict[str, Any],
    searches: list[Search],
    trust: tuple[str, ...],
    judge: str | None,
) -> None:
    """Train one trial and note how it ended."""
    optuna = require("optuna", extra="tune")
    State = optuna.trial.TrialState
    trial, began, reason, state = watch.trial, time.monotonic(), None, State.COMPLETE
    same = next(
        (n for n, t in enumerate(ended) if t.params == trial.params and t.state in (State.COMPLETE, State.FAIL)), None
    )
    try:
        if same is not None:
            state, watch.best = ended[same].state, ended[same].value
            reason = ended[same].user_attrs["reason"] or f"the values of trial {same + 1}"
        else:
            _train(watch, load(fields, [s.change(trial.params[s.field]) for s in searches], trust).keywords, judge)
    except optuna.TrialPruned:
        state = State.PRUNED
    except (ValueError, NonFiniteLoss) as error:
        state, reason = State.FAIL, " ".join(str(error).split())
    except BaseException:
        study.tell(trial, state=State.FAIL)  # without what follows, by which trials are known that ended by themselves
        raise
    if state is not State.FAIL and (watch.best is None or not math.isfinite(watch.best)):
        state, reason = State.FAIL, f"the validation gave {watch.monitor} {watch.best}"
    facts = {"reason": reason, "epochs": watch.epochs, "best": watch.best, "seconds": time.monotonic() - began}
    for name, value in facts.items():
        trial.set_user_attr(name, value)
    study.tell(trial, watch.best if state is State.COMPLETE else None, state=state)


def _train(watch: _Watch, built: dict[str, Any], judge: str | None) -> None:
    """One training of the recipe, with nothing of it that a trial must not have."""
    data, settings = built["data"], _training(built)
    if judge is not None and _judge(built) != judge:
        raise ValueError("data: with these values the validation data are others, so the trial cannot be compared")
    if settings.monitor != watch.monitor:
        raise ValueError(f"training.monitor: {settings.monitor!r} here, and the study compares {watch.monitor!r}")
    built |= {
        "data": Loaders(data.train, data.validation),
        "training": dataclasses.replace(settings, progress=False, trackers=None, gradient_shares=False),
        "control": False,
        "after_epoch": watch,
        "out": None,
        "resume": False,
        "overwrite": False,
    }
    distil_recipe(**built)


def _trial(number: int, trial: FrozenTrial, searches: Sequence[Search]) -> Trial:
    facts = trial.user_attrs
    return Trial(
        number=number,
        state={"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed"),
        value=None if trial.state.name == "FAIL" else facts["best"],
        values={s.field: s.value(trial.params[s.field]) for s in searches},
        epochs=facts["epochs"],
        seconds=facts["seconds"],
        reason=facts["reason"],
    )


def _say_last(tuned: Tuned, trials: int) -> None:
    last = tuned.trials[-1]
    ending = f"{'ended' if last.state == 'complete' else last.state} after {last.epochs} epochs ({last.seconds:.1f} s)"
    figure = "" if last.value is None else f", {tuned.monitor} {shown(last.value)}"
    values = "  ".join(f"{name.replace('.init_args', '')}={shown(value)}" for name, value in last.values.items())
    why = f": {last.reason}" if last.reason else ""
    say(f"trial {last.number} of {trials} {ending}{figure}  {values}{why}")
