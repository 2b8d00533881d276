"""Shared by losses that read what activations read: where that is, and the connectors from student to teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.feature.batch_norm import BatchNorm
from tutelage.knowledge.relation.pairs import as_map
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.taps import Tappable
from tutelage.views import Batch, Inputs

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
)
"""Modules that let positive values pass and hold negative ones back."""


def pre_activations(model: nn.Module, inputs: Inputs) -> list[Tappable]:
    """What the last activation at each resolution reads, first to last; without feature maps, what every one reads.

    Of a residual network whose blocks end with an activation that is the sum before it; of a pre-activation network,
    the batch-norm after a stage's last sum, which lies in the stage that follows.

    Raises:
        ValueError: the model calls no activation module on maps (B, C, H, W) or vectors (B, C).

    >>> from tutelage.models import SmallCNN
    >>> [t.address for t in pre_activations(SmallCNN(4), Inputs((torch.ones(1, 1, 16, 16),)))]
    ['stage1.2:input', 'stage2.2:input', 'stage3.2:input']
    """
    maps: dict[tuple[int, ...], Tappable] = {}
    vectors: list[Tappable] = []
    calls: dict[str, int] = {}

    def hook(name: str) -> Callable:
        def note(module: nn.Module, args: tuple) -> None:
            calls[name] = calls.get(name, 0) + 1
            if args and isinstance(args[0], Tensor):
                shape = tuple(args[0].shape)
                call = f"#{calls[name]}" if calls[name] > 1 else ""
                found = Tappable(f"{name}{call}:input", type(module).__name__, shape)
                if len(shape) == 4 and min(shape[2:]) > 1:
                    maps.pop(shape[2:], None)  # the order is that of the last calls
                    maps[shape[2:]] = found
                elif len(shape) == 2:
                    vectors.append(found)

        return note

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, ACTIVATIONS)]
    try:
        with torch.no_grad():
            inputs.call(model)
    finally:
        for handle in handles:
            handle.remove()
    found = list(maps.values()) or vectors
    if not found:
        raise ValueError(
            f"{type(model).__name__} calls no activation module on maps or vectors (functions such as F.relu cannot be "
            "seen): name what its activations read, such as the batch-norm layers (`tutelage inspect` lists them)"
        )
    return found


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """1×1 convolution without bias, of He's normal weights over the outputs, then batch-norm.

    >>> connector(4, 8)[0]
    Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    convolution = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, BatchNorm(teacher_channels))


class PreActivationLoss(Loss):
    """Base of losses on tensors before the activation, of several layers, the last of which weighs most.

    Of L layers, first to last, layer i weighs 2^(i−L+1): the last 1, each one before half of the next. A connector
    brings the student's channels to the teacher's. Where sizes differ, the student's map is brought to the teacher's
    by adaptive average pooling (a larger size repeats positions); the teacher's is left as it is, because the mean of
    several neurons is none of them.

    Args:
        taps: tensors with negative values; by default :func:`pre_activations`, matched from the deepest backwards.
        weight: of the term.
        name: of the term.

    Class attribute that a subclass sets:
        always_connect: whether equal channels have a connector too.
    """

    default_reads = "stages"
    always_connect = True

    def __init__(self, *taps: Tap, weight: Weight, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        self.connectors = nn.ModuleList()

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        if self.taps:
            return super().resolve(student, teacher, batch)
        try:
            mine, theirs = pre_activations(student, batch.student), pre_activations(teacher, batch.teacher)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        count = min(len(mine), len(theirs))
        self.pairs = [(s.address, t.address) for s, t in zip(mine[-count:], theirs[-count:], strict=True)]
        return True

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.connectors = nn.ModuleList()
        for s, t in self.tensors(student, teacher):
            if s.ndim != t.ndim or (s.ndim == 3 and s.shape[1] != t.shape[1]):
                raise ValueError(
                    f"{self.name}: shapes {tuple(s.shape)} (student) and {tuple(t.shape)} (teacher) cannot be "
                    "compared: expected two maps, two vectors, or two sequences of the same tokens"
                )
            channels = as_map(s).shape[1], as_map(t).shape[1]
            equal = channels[0] == channels[1] and not self.always_connect
            self.connectors.append(nn.Identity() if equal else connector(*channels).to(s))

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        for addresses, tensors in zip(self.pairs, self.tensors(student, teacher), strict=True):
            for side, address, tensor in zip(("student", "teacher"), addresses, tensors, strict=True):
                if bool((tensor >= 0).all()):
                    raise ValueError(
                        f"{self.name}: {address!r} of the {side} is nowhere below 0 on the first batch: it is read "
                        "after its activation; name what the activation reads, such as 'relu:input' or the "
                        "batch-norm before it (`tutelage inspect` lists the modules)"
                    )

    def layers(self, student: Record, teacher: Record) -> list[tuple[float, Tensor, Tensor]]:
        """Each layer's weight, the student's tensor in the teacher's shape, and the teacher's, as maps."""
        both = zip(self.connectors, self.tensors(student, teacher), strict=True)
        found = []
        for n, (connect, (s, t)) in enumerate(both):
            mine, theirs = as_map(s), as_map(t)
            if mine.shape[2:] != theirs.shape[2:]:
                mine = F.adaptive_avg_pool2d(mine, (theirs.shape[2], theirs.shape[3]))
            found.append((2.0 ** (n + 1 - len(self.pairs)), connect(mine), theirs))
        return found
