"""One process or several: what accelerate leaves to its users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tutelage.distillation import Distillation
from tutelage.training import Training


def make_accelerator(training: Training, out: str | Path | None) -> Accelerator:
    """The accelerator of one run, whose ``ddp_handler`` may still be changed before it prepares a model."""
    if AcceleratorState._shared_state:  # of an earlier run, whose precision it would insist on
        AcceleratorState._shared_state["_mixed_precision"] = training.precision
    patience = [InitProcessGroupKwargs(timeout=timedelta(seconds=training.timeout))] if training.timeout else []
    accelerator = Accelerator(
        mixed_precision=training.precision,
        cpu=training.cpu or None,
        log_with=training.trackers,
        project_dir=str(out) if out else None,
        kwargs_handlers=[DistributedDataParallelKwargs(), *patience],
    )
    if plugin := getattr(accelerator.state, "fsdp_plugin", None):
        plugin.cpu_ram_efficient_loading = False  # it empties the distillation, and the teacher with it
        # What torch writes for shards is read again by unpickling whatever stands there.
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("FULL_STATE_DICT")
    return accelerator


def shares_of(d: Distillation, window: list[Any], accelerator: Accelerator) -> list[dict[str, Tensor] | None]:
    """Each batch's part of each term's units, over all the batches and processes of one step."""
    if len(window) == 1 and accelerator.num_processes == 1:
        return [None]
    units = [d.units(raw) for raw in window]
    names = list(units[0])
    rows = [[torch.as_tensor(u[n], dtype=torch.float32, device=accelerator.device) for n in names] for u in units]
    table = torch.stack([torch.stack(row) for row in rows])
    total = accelerator.reduce(table.sum(0), reduction="sum").clamp(min=1)
    # DDP takes the mean over the processes where the sum is meant
    shares = table * accelerator.num_processes / total
    return [dict(zip(names, row.unbind(), strict=True)) for row in shares]


def averaged(values: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """The means over the processes of numbers that each has under the same names."""
    if accelerator.num_processes == 1:
        return values
    mine = torch.tensor(list(values.values()), device=accelerator.device)
    return dict(zip(values, accelerator.reduce(mine, reduction="mean").tolist(), strict=True))


def agreed(asked: list[int], accelerator: Accelerator, look: bool) -> bool:
    """Whether to stop now.

    A process alone stops when it is asked. Several must stop after the same step: they tell each other, but only at
    a ``look`` because that waits for the device.
    """
    if accelerator.num_processes == 1:
        return bool(asked)
    if not look:
        return False
    mine = torch.tensor(float(len(asked)), device=accelerator.device)
    return bool(accelerator.reduce(mine, reduction="sum") > 0)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, parts of a model under FSDP2 can be called by themselves; nothing happens to other models."""
    sharded = _sharded(model)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps parts of it on other processes."""
    return bool(_sharded(model))


def _sharded(model: nn.Module) -> list[Any]:
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def student_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The plain student's state dict, on the processor, whatever wraps the distillation. All processes call it.

    Several processes go on with the first one's buffers: DDP spreads them before a forward pass, not after the last.
    """
    prefix = "student."
    if accelerator.num_processes > 1:
        for buffer in accelerator.unwrap_model(model).student.buffers():
            dist.broadcast(buffer, src=0)
    whole = accelerator.get_state_dict(model)
    return {k[len(prefix) :]: v.detach().cpu().clone() for k, v in whole.items() if k.startswith(prefix)}
