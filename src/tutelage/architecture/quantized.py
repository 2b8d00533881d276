"""A quantised copy: the teacher itself as the student, with weights of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tutelage.algorithms.quantized.fake_quantized import fake_quantize
from tutelage.architecture.builders import StudentBuilder, student_copy
from tutelage.catalogue import method

if TYPE_CHECKING:
    from tutelage.deploy.calling import Example


@method(
    section="4",
    role="student",
    paper="Mishra, Marr: Apprentice: Using Knowledge Distillation Techniques To Improve Low-Precision Network Accuracy",
    year=2018,
    link="https://arxiv.org/abs/1711.05852",
    use="The teacher's own architecture at a fraction of its file: the student starts from its weights, rounded.",
)
@dataclass(frozen=True)
class Quantized(StudentBuilder):
    """The teacher's copy, which calculates with weights of few bits while it learns.

    The paper's scheme C: the student starts from the trained full-precision weights, lowers the precision and is
    fine-tuned with the teacher's answers. The quantiser is that of
    :func:`tutelage.algorithms.quantized.fake_quantized.fake_quantize` (a symmetric grid for each output channel, the
    gradient passed straight through), not the paper's; with ``activations`` the inputs of layers are
    rounded too. :func:`tutelage.freeze_quantized` ends it; a run's ``student.safetensors`` holds plain weights with
    the quantised values, which load into the teacher's architecture. Needs the extra ``quantize``.

    Args:
        bits: of a weight, 2 to 8.
        activations: bits of each such layer's input, 2 to 8; nothing leaves inputs alone.
        per_channel: a scale for each output channel; otherwise one for the whole weight.

    Mishra, Marr 2018, "Apprentice: Using Knowledge Distillation Techniques To Improve Low-Precision Network Accuracy",
    https://arxiv.org/abs/1711.05852

    >>> import torch
    >>> student = Quantized(2)(nn.Sequential(nn.Linear(64, 3)), torch.zeros(1, 64))
    >>> [len(row.unique()) <= 4 for row in student[0].weight]
    [True, True, True]
    """

    bits: int = 8
    activations: int | None = None
    per_channel: bool = True

    def check(self) -> None:
        """Refuse what the quantiser refuses."""
        with torch.random.fork_rng():
            fake_quantize(nn.Linear(2, 1), **self._arguments)

    def choose(self, teacher: nn.Module, example: Example) -> dict[str, Any]:
        """The arguments: no layer of the teacher's goes or changes its shape."""
        return self._arguments

    @staticmethod
    def build(network: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """The fake-quantised copy."""
        return fake_quantize(student_copy(network), **structure)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"bits": self.bits, "activations": self.activations, "per_channel": self.per_channel}
