"""Distillation in Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.adapters import beside_state, first_batch, load_beside_state, population, task_value
from tutelage.distillation import Distillation
from tutelage.errors import require
from tutelage.knowledge.base import classes_last
from tutelage.record import Record
from tutelage.views import UNLABELLED, move, read_batch

require("lightning", extra="lightning")

from lightning.pytorch import LightningModule  # noqa: E402


class DistillationModule(LightningModule):
    """A distillation as a ``LightningModule``.

    When fitting begins it is bound with the first training batch, before the optimiser is made, without consuming
    random numbers. It logs ``train_loss``, each term as ``train_<name>``, and the student's ``val_loss`` (the task's)
    and ``val_accuracy``. Checkpoints hold the student and what the losses learn, never a frozen teacher;
    :func:`student_weights` reads the student out of one. Lightning averages accumulated batches equally, so with
    unequal numbers of labelled samples ``accumulate_grad_batches`` is not exactly one large batch. Under DDP, hint
    stages and weights that fall to 0 need ``strategy="ddp_find_unused_parameters_true"``.

    Args:
        distillation: student, teacher and losses.
        optimizer: makes the optimiser from the parameters of the student and the losses.
        scheduler: makes from it a learning rate schedule, or Lightning's dictionary of one.

    Raises:
        TypeError: ``distillation`` is none, or there is not one training loader to take the first batch from.

    >>> from tutelage import Distillation
    >>> d = Distillation(nn.Linear(4, 2), nn.Linear(4, 2))
    >>> module = DistillationModule(d, lambda p: torch.optim.SGD(p, lr=0.1))
    >>> module.student is d.student, sorted(module.state_dict())
    (True, ['distillation.student.bias', 'distillation.student.weight'])
    """

    def __init__(
        self,
        distillation: Distillation,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    ):
        super().__init__()
        if not isinstance(distillation, Distillation):
            raise TypeError(f"distillation: expected a tutelage.Distillation, got {type(distillation).__name__}")
        self.distillation = distillation
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self._total_steps: int | float = float("inf")

    @property
    def student(self) -> nn.Module:
        return self.distillation.student

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the student says."""
        return self.student(*args, **kwargs)

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        # This also builds the training loader, which Lightning would otherwise do after the optimiser.
        steps = self.trainer.estimated_stepping_batches
        self._total_steps = steps if steps > 0 else float("inf")
        if self.distillation.observer is None:
            if self.trainer.train_dataloader is None:
                self.trainer.fit_loop.setup_data()
            loader = self.trainer.train_dataloader
            if loader is None or isinstance(loader, dict | list | tuple):
                raise TypeError("not one training loader: call distillation.bind(batch) with a first batch yourself")
            samples = population(getattr(loader, "dataset", None))
            self.distillation.bind(move(first_batch(loader), self.distillation.device), population=samples)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.distillation.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.distillation.progress = min(self.global_step / self._total_steps, 1.0)
        losses = self.distillation(batch)
        values = {"train_loss": losses.total.detach(), **{f"train_{n}": v for n, v in losses.values.items()}}
        self.log_dict(values, batch_size=len(read_batch(batch)))
        return losses.total

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        seen = self.distillation.views(batch)
        output = seen.student.call(self.student)
        loss = task_value(self.distillation, output, seen)
        if loss is None or seen.labels is None:
            return
        self.log("val_loss", loss, batch_size=len(seen), prog_bar=True)
        if not seen.labels.is_floating_point():
            predicted, labels = classes_last(Record(output).logits).argmax(1), seen.labels.reshape(-1)
            known = labels != UNLABELLED
            if count := int(known.sum()):
                right = (predicted == labels)[known].float().mean()
                self.log("val_accuracy", right, batch_size=count, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tutelage"] = beside_state(self.distillation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_beside_state(self.distillation, checkpoint["tutelage"])


def student_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The student's ``state_dict()`` out of a Lightning checkpoint of a :class:`DistillationModule`.

    Raises:
        ValueError: the checkpoint holds no distillation.
    """
    prefix = "distillation.student."
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not weights:
        raise ValueError(f"{checkpoint}: no weights of a distillation's student in this checkpoint")
    return weights
