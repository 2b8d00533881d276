"""The training loop: one readable function on accelerate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from tutelage.checkpoint import RunFolder
from tutelage.distillation import Distillation
from tutelage.evaluation import evaluate
from tutelage.gradients import gradient_shares
from tutelage.processes import agreed, averaged, is_sharded, make_accelerator, shares_of, student_state, unsharded
from tutelage.progress import Meter, check_weights, tracking
from tutelage.run import Epoch, Interrupted, Run, restore_random, seed_epoch, stop_signals
from tutelage.teachers import Frozen
from tutelage.training import Training
from tutelage.views import move


def fit(
    distillation: Distillation,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    training: Training,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> Run:
    """Train a distillation. The student ends with its last weights; ``Run.best`` holds its best on validation.

    Args:
        distillation: the roles; bound here if it is not yet.
        train: the data role: any iterable of batches with a length (without one, give ``Training.steps``). If it has
            ``attach(student, teacher)``, it is given the two networks first. A ``DataLoader`` is shared out among
            several processes; other iterables must give each process its part, all the same number of batches.
        validation: batches with labels, to choose the best weights by.
        training: the settings.
        out: the run's folder (:class:`tutelage.checkpoint.RunFolder`), which no other run may use meanwhile; ``None``
            writes nothing.
        resume, overwrite: what to do with a run that is there.
        after_epoch: called with each epoch's line once it is saved; what it raises ends the run.

    Raises:
        ValueError: the loader is empty, or what :meth:`Distillation.bind` refuses.
        NonFiniteLoss: a loss or the weights became NaN or infinite; no such weights are saved.
        BlockingIOError: another process is at work in ``out``.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    accelerator = make_accelerator(training, out)
    about = {"training": training.description(), **distillation.description()}
    with ExitStack() as ending:
        folder = ending.enter_context(RunFolder(out, about, resume, overwrite, accelerator)) if out else None
        return _fit(distillation, train, validation, training, accelerator, folder, resume, after_epoch, ending)


def _fit(
    distillation: Distillation,
    train: Iterable[Any],
    validation: Iterable[Any] | None,
    training: Training,
    accelerator: Accelerator,
    folder: RunFolder | None,
    resume: bool,
    after_epoch: Callable[[Epoch], None] | None,
    ending: ExitStack,
) -> Run:
    d = distillation.to(accelerator.device)
    if training.channels_last:
        d.to(memory_format=torch.channels_last)
    teacher = d.teacher.module if isinstance(d.teacher, Frozen) else None
    if hasattr(train, "attach"):
        train.attach(d.student, teacher)
    seed_epoch(training.seed, -1, train)
    loader = accelerator.prepare(train) if isinstance(train, DataLoader) and accelerator.num_processes > 1 else train
    seed_epoch(training.seed, -1, loader)
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("train: the loader is empty (is the batch size larger than the data set, with drop_last?)")
    d.bind(move(first, accelerator.device), population=_length(getattr(train, "dataset", None)))

    optimizer = training.make_optimizer(p for p in d.parameters() if p.requires_grad)
    total = training.total_steps(_length(loader))
    scheduler = training.make_scheduler(optimizer, total)
    accelerator.ddp_handler.find_unused_parameters = d.skips_parameters
    # Memories of losses are kept equal by their owners, and may be too large to broadcast at every step.
    d._ddp_params_and_buffers_to_ignore = [n for n, _ in d.owned.named_buffers()]  # type: ignore
    model, optimizer = accelerator.prepare(d.train(), optimizer)
    ending.callback(vars(d).pop, "forward", None)  # what the next line puts back is a method of the class
    ending.callback(accelerator.unwrap_model, model, keep_fp32_wrapper=False)  # takes autocast off the distillation

    saved = folder.load(accelerator) if folder and resume else None
    run = Run.restored(saved, d, train, scheduler) if saved else Run()
    if saved and folder:
        run.best = folder.load_student("best") if run.best_epoch is not None else None
        run.last = folder.load_student("last") if run.epoch else {}
        run.kept |= folder.kept()
        if run.history and accelerator.is_main_process:  # the checkpoint has its checksum, and that file has none
            folder.keep_history([asdict(line) for line in run.history])
    meter = Meter(total, training.progress and accelerator.is_main_process, run.step, run.sums)

    def save(stop: bool) -> None:
        meter.look()  # what is no number ends the run before anything is saved
        check_weights(model, run.step)
        if folder:
            folder.save(accelerator, run.step, run.state(d, train, scheduler))
        if stop:
            where = f"a checkpoint is in {folder.path}, go on with resume" if folder else "no folder was given"
            raise Interrupted(f"stopped at step {run.step} of {total}: {where}")

    with meter, tracking(accelerator, training), stop_signals() as asked:
        while run.step < total and not (training.patience and run.since_best >= training.patience):
            began = time.monotonic()
            seed_epoch(training.seed, run.epoch, loader)
            batches = iter(loader)
            if saved and run.batches:  # in the middle of an epoch: the same order, from where it stopped
                run.batches = sum(1 for _ in islice(batches, run.batches))
                restore_random(saved["random"])
            while run.step < total and (window := list(islice(batches, training.accumulate))):
                d.progress = run.step / total
                window = [move(raw, accelerator.device) for raw in window]
                if not run.batches and training.gradient_shares and len(d.terms) > 1 and not is_sharded(model):
                    with accelerator.autocast():
                        run.shares = gradient_shares(d, window[0])
                shares = shares_of(d, window, accelerator)
                for number, (raw, share) in enumerate(zip(window, shares, strict=True), start=1):
                    last = number == len(window)
                    with nullcontext() if last else accelerator.no_sync(model):
                        losses = model(raw, share)
                        accelerator.backward(losses.total)
                    meter.add(losses, raw, step_ended=last)
                if training.clip:
                    accelerator.clip_grad_norm_(model.parameters(), training.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                run.step += 1
                run.batches += len(window)
                if look := run.step % training.log_every == 0:
                    accelerator.log({f"train/{k}": v for k, v in meter.look().items()}, step=run.step)
                stop = agreed(asked, accelerator, look)
                due = training.checkpoint_every and run.step % training.checkpoint_every == 0
                if (stop or due) and run.step < total:  # the last step is saved with its epoch, or it would have none
                    save(stop)
            if not run.batches:
                raise ValueError("train: the loader gave no batch in this epoch")
            costs = averaged(meter.averages(), accelerator)
            check_weights(model, run.step)
            lr = float(scheduler.get_last_lr()[0])
            line = Epoch(run.epoch, run.step, time.monotonic() - began, lr, costs, shares=run.shares)
            run.last, best = student_state(accelerator, model), False
            if validation is not None and (run.step >= total or (run.epoch + 1) % training.evaluate_every == 0):
                compared = teacher if training.monitor in ("agreement", "teacher_kl") else None
                with unsharded(model):
                    metrics = evaluate(d.student, validation, compared, views=d.views).known()
                if best := run.validated(line, metrics, training):
                    run.best = run.last
            run.history.append(line)
            run.epoch, run.batches = run.epoch + 1, 0
            names = ["last", *(["best"] if best else [])]
            if training.keep_every and run.epoch % training.keep_every == 0:
                names.append(f"epoch-{run.epoch:04d}")
                run.kept[run.epoch] = folder.student_file(names[-1]) if folder else run.last
            if folder and accelerator.is_main_process:
                for name in names:
                    folder.save_student(name, run.last)
                folder.keep_history([asdict(line) for line in run.history])
            accelerator.log({f"validation/{k}": v for k, v in line.metrics.items()}, step=run.step)
            meter.line(str(line))
            save(agreed(asked, accelerator, look=True))
            if after_epoch is not None:
                after_epoch(line)
    return run


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except TypeError:
        return None
