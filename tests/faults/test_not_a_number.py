"""NaN in a loss or in a gradient: the run ends, says where, and nothing that is no number is ever saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tutelage import KD, Distillation, TaskLoss, Training
from tutelage.engine import fit
from tutelage.knowledge.base import Loss
from tutelage.progress import NonFiniteLoss, check_weights

GENERATOR = torch.Generator().manual_seed(0)
DATA = [(torch.randn(8, 4, generator=GENERATOR), torch.arange(8) % 3) for _ in range(4)]


class Breaks(Loss):
    """Its value, or only its gradient, is no number in its n-th batch of training."""

    def __init__(self, at: int = 0, value: float = 1.0, root: bool = False):
        super().__init__()
        self.at, self.value, self.root, self.count = at, value, root, 0

    def forward(self, student, teacher, batch):
        if self.training and torch.is_grad_enabled():
            self.count += 1
        logits = student.logits
        if self.count != self.at:
            return logits.pow(2).mean()
        # the root has no derivative at 0, and nobody sees it in its value
        return (0 * logits).sqrt().nan_to_num().mean() if self.root else logits.pow(2).mean() * self.value


def train(out: Path, broken: Breaks | None = None, **options):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    d = Distillation(student, nn.Linear(4, 3), [TaskLoss(), KD(), broken or Breaks()])
    settings = {"epochs": 3, "progress": False, "cpu": True, "gradient_shares": False, "log_every": 100}
    names = ("checkpoint_every", "clip", "accumulate", "log_every", "precision")
    settings |= {name: options.pop(name) for name in names if name in options}
    return fit(d, DATA, DATA, training=Training(**settings), out=out, **options).last


def everything_is_finite(run: Path) -> None:
    files = [*run.glob("student-*.safetensors"), *run.glob("checkpoints/*/model.safetensors")]
    assert len(files) >= 2
    for file in files:
        assert all(value.isfinite().all() for value in load_file(file).values()), file
    optimizer = torch.load(next(run.glob("checkpoints/*/optimizer.bin")), weights_only=True)
    assert all(value.isfinite().all() for held in optimizer["state"].values() for value in held.values())


@pytest.mark.parametrize(("value", "step"), [(math.nan, 6), (math.inf, 8)])  # in an epoch, and at its end
@pytest.mark.parametrize("every", [None, 1])
def test_a_loss_that_is_no_number(value, step, every, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(NonFiniteLoss, match=f"loss term Breaks is not finite in step {step}: ") as caught:
        train(run, Breaks(step, value), checkpoint_every=every)
    assert "the last checkpoint is whole" in str(caught.value)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{4 if every is None else step - 1:08d}"
    everything_is_finite(run)
    assert len(json.loads((run / "history.json").read_text())) == 1
    weights, whole = train(run, resume=True, checkpoint_every=every), train(tmp_path / "whole", checkpoint_every=every)
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("step", "options"),
    [(6, {"checkpoint_every": 1}), (6, {}), (8, {}), (12, {"clip": 1.0}), (7, {"clip": 1.0, "checkpoint_every": 1})],
)
def test_a_gradient_that_is_no_number(options, step, tmp_path):
    """The loss of that step is finite: without the look at the weights they would be saved at its end."""
    run = tmp_path / "run"
    with pytest.raises(NonFiniteLoss) as caught:
        train(run, Breaks(step, root=True), **options)
    if "checkpoint_every" in options or step % 4 == 0:
        assert f"after step {step} weights are NaN or infinite, and no loss was (4 of 4 tensors: student.0.weight" in (
            str(caught.value)
        )
    else:  # nobody looks before the next step, whose losses are no numbers
        assert f"is not finite in step {step + 1}: " in str(caught.value)
    everything_is_finite(run)
    weights, whole = train(run, resume=True, **options), train(tmp_path / "whole", **options)
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_with_accumulation_it_is_the_step_that_is_named(tmp_path):
    with pytest.raises(NonFiniteLoss, match="in step 3: "):
        train(tmp_path / "run", Breaks(6, math.nan), accumulate=2)


def test_a_resumed_run_names_the_step_of_the_whole(tmp_path):
    with pytest.raises(NonFiniteLoss):
        train(tmp_path / "run", Breaks(7, math.nan), checkpoint_every=1)
    with pytest.raises(NonFiniteLoss, match="in step 7: "):
        train(tmp_path / "run", Breaks(1, math.nan), checkpoint_every=1, resume=True)


def test_frozen_weights_may_be_infinite():
    """Such as a mask of −∞ that is added to attention; what is learned may not."""
    network = nn.Linear(2, 2)
    network.mask = nn.Parameter(torch.tensor([0.0, -math.inf]), requires_grad=False)
    check_weights(network, 1)
    with torch.no_grad():
        network.bias[0] = math.inf
    with pytest.raises(NonFiniteLoss, match=r"after step 1 .*\(1 of 2 tensors: bias\)"):
        check_weights(network, 1)
