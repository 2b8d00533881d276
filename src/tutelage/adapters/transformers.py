"""Distillation in Hugging Face's ``Trainer``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tutelage.adapters import beside_state, first_batch, load_beside_state, population, task_value
from tutelage.distillation import Distillation
from tutelage.errors import require
from tutelage.files import replacing
from tutelage.record import Record
from tutelage.views import IDS, LABELS, SameView

require("transformers", extra="text")

from transformers import Trainer, TrainingArguments  # noqa: E402

if TYPE_CHECKING:  # a mixin for the type checker too: it stands before whichever Trainer
    _Base = Trainer
else:
    _Base = object

RESUME_FILE = "distillation.pt"
"""What a checkpoint folder holds beside the student: projectors, memories, side learners."""


def _refuse(name: str, value: Any, instead: str) -> None:
    if value:
        raise ValueError(f"{name}={value!r} does not work with a distillation: {instead}")


class DistillationMixin(_Base):
    """Turns a ``Trainer`` into one that distils: ``class MyTrainer(DistillationMixin, Trainer)``.

    The :class:`tutelage.Distillation` takes the place of the model, so that what DDP wraps is what is called. It is
    bound with the first training batch, before the optimiser is made, without consuming random numbers.

    - Training costs the distillation's total. Every term is the mean over its own units (samples, labelled tokens) in
      the whole step: gradient accumulation and several processes change nothing. Each term is logged by its name.
    - Evaluation runs the student alone: ``compute_metrics`` is given its logits, and ``eval_loss`` is the task's loss
      (the distillation's ``TaskLoss``, else cross-entropy). It sees what the distillation's views show the student.
    - ``save_model`` and checkpoints write the student as the plain model, which ``from_pretrained`` loads. Projectors
      and memories are in the checkpoint's ``distillation.pt``, from which training resumes.
    - Batches are mappings. Columns that neither model's ``forward`` takes are removed as the ``Trainer`` does it;
      all are kept where the distillation has views of its own.

    Args:
        distillation: student, teacher and losses.
        args, rest, named: the ``Trainer``'s own arguments.

    Raises:
        TypeError: ``distillation`` is none.
        ValueError: an argument that would go past the distillation (``label_smoothing_factor``: give it to
            ``TaskLoss``; ``compute_loss_func``; ``gradient_checkpointing``: enable it on the student;
            ``neftune_noise_alpha``; FSDP, DeepSpeed and ``DataParallel``), or an optimiser that was made before the
            losses had their parameters.
    """

    distillation: Distillation

    def __init__(self, distillation: Distillation, args: TrainingArguments | None = None, *rest: Any, **named: Any):
        if not isinstance(distillation, Distillation):
            raise TypeError(f"distillation: expected a tutelage.Distillation, got {type(distillation).__name__}")
        self.distillation = distillation
        self._terms: dict[str, Tensor] = {}
        self._steps = 0
        if args is not None:
            checkpointing = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
            _refuse("label_smoothing_factor", args.label_smoothing_factor, "give label_smoothing to TaskLoss")
            _refuse("gradient_checkpointing", checkpointing, "enable it on the student")
            _refuse("neftune_noise_alpha", args.neftune_noise_alpha, "a distillation has no embeddings of its own")
            _refuse("n_gpu", args.n_gpu if args.n_gpu > 1 else None, "start one process per device with torchrun")
        super().__init__(distillation, args, *rest, **named)
        _refuse("compute_loss_func", self.compute_loss_func, "the losses of the distillation are the loss")
        _refuse("FSDP", self.is_fsdp_enabled, "use DDP, or tutelage's own engine")
        _refuse("DeepSpeed", self.is_deepspeed_enabled, "use DDP, or tutelage's own engine")
        # The value is already normalised over the step, which the Trainer concludes from this.
        self.model_accepts_loss_kwargs = True
        if self.args.label_names is None:
            self.label_names = ["labels"]

    # what the models are given

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            models = self.distillation.teacher.names(self.distillation.student)
            fields = {p for m in models if isinstance(m, nn.Module) for p in inspect.signature(m.forward).parameters}
            fields |= {*LABELS, "label_ids", *self.label_names}
            if any(loss.needs_ids for loss in self.distillation.losses.values()):
                fields |= set(IDS)
            self._signature_columns = sorted(fields)  # type: ignore[assignment]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if not isinstance(self.distillation.views, SameView):
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if not isinstance(self.distillation.views, SameView):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.distillation.observer is None:
            batch = self._prepare_inputs(first_batch(loader))
            self.distillation.bind(batch, population=population(self.train_dataset))
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [n for n, p in self.distillation.owned.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"optimizers: {missing} are not in the optimiser; call distillation.bind(batch) before making it"
            )
        return optimizer

    # training

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one step, and of how many units each term is the mean there, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        units = [self.distillation.units(batch) for batch in batches]
        sums = [sum(float(u[name]) if isinstance(u[name], int) else u[name] for u in units) for name in units[0]]
        counted = torch.stack([torch.as_tensor(s, dtype=torch.float32, device=device) for s in sums])
        if self.accelerator.num_processes > 1:
            counted = self.accelerator.reduce(counted, reduction="sum")
        self._steps += 1
        return batches, dict(zip(units[0], counted.clamp(min=1.0), strict=True))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The distillation's total on this part of a step; in evaluation the student's own loss and logits.

        With ``return_outputs`` the second value is the :class:`tutelage.Losses` in training, and in evaluation
        ``{"logits": student's}``.
        """
        if model == self._student_answers:
            return self._evaluate_student(inputs)
        self.distillation.progress = self.state.global_step / max(self.state.max_steps, 1)
        shares = None
        if isinstance(num_items_in_batch, dict):
            # DDP averages the processes' gradients, where the shares of all processes are to be summed
            processes = self.accelerator.num_processes
            units = self.distillation.units(inputs)
            shares = {name: units[name] / total * processes for name, total in num_items_in_batch.items()}
        losses = model(inputs, shares=shares)
        for name, value in losses.values.items():
            part = value if shares is None else value * shares[name]
            self._terms[name] = self._terms.get(name, 0.0) + part
        return (losses.total, losses) if return_outputs else losses.total

    def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
        """Adds each term's mean over the steps since the last time."""
        if "loss" in logs and self._terms:
            means = torch.stack([torch.as_tensor(v) for v in self._terms.values()]) / max(self._steps, 1)
            if self.accelerator.num_processes > 1:
                means = self.accelerator.reduce(means, reduction="mean")
            logs = {**logs, **dict(zip(self._terms, means.tolist(), strict=True))}
            self._terms, self._steps = {}, 0
        super().log(logs, *rest, **named)

    # evaluation: the student alone

    def prediction_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        model = self._student_answers
        with self._student_as_model():
            return super().prediction_step(model, inputs, *rest, **named)

    def _student_answers(self, **inputs: Any) -> dict[str, Tensor]:
        return self._evaluate_student(inputs)[1]

    def _evaluate_student(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.distillation.views(inputs)
        with self.accelerator.autocast():
            output = batch.student.call(self.distillation.student)
        loss = task_value(self.distillation, output, batch)
        logits = Record(output).logits
        return (logits.new_tensor(float("nan")) if loss is None else loss), {"logits": logits}

    # files: the student as the plain model, and the rest beside it

    @contextmanager
    def _student_as_model(self) -> Iterator[None]:
        self.model = self.distillation.student
        try:
            yield
        finally:
            self.model = self.distillation

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._student_as_model():
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._student_as_model():
            super()._load_from_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._student_as_model():
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"owned": self.distillation.owned.state_dict(), **beside_state(self.distillation)}
            with replacing(Path(output_dir) / RESUME_FILE) as path:
                torch.save(state, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / RESUME_FILE
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self.distillation.owned.load_state_dict(state["owned"])
            load_beside_state(self.distillation, state)


class DistillationTrainer(DistillationMixin, Trainer):
    """Hugging Face's ``Trainer`` with a distillation in place of the model; see :class:`DistillationMixin`.

    >>> import tempfile
    >>> from transformers import PrinterCallback
    >>> data = [{"input": torch.randn(4), "labels": i % 2} for i in range(8)]
    >>> d = Distillation(nn.Linear(4, 2), nn.Linear(4, 2))
    >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> trainer = DistillationTrainer(d, args, train_dataset=data)
    >>> trainer.remove_callback(PrinterCallback)
    >>> trainer.train().global_step
    2
    """
