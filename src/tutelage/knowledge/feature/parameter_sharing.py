"""Rocket launching: a light network and a booster learn together, share layers, and the booster's logits are a hint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.errors import nearest
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.logit_regression import LogitRegression
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record, in_float32, logits_of
from tutelage.taps import Address, UnknownTap, expand
from tutelage.teachers import Lesson, Teacher
from tutelage.views import Batch, Inputs


@dataclass
class RocketOutput:
    """What the two networks of a :class:`Rocket` said.

    Args:
        light: the light network's output.
        booster: the booster's.
    """

    light: Any
    booster: Any

    @property
    def logits(self) -> Tensor | None:
        """The light network's logits: it is the one that is kept, so evaluating a rocket evaluates it."""
        return logits_of(self.light)


class Rocket(nn.Module):
    """A light network and a booster that share layers, as the student role; ``rocket.light`` is the one to export.

    Both are whole networks, and both get the same inputs. Each shared layer is one module inside both: the booster
    takes over the light network's, in place. Each network runs it in its own forward pass, as in the authors' code, so
    shared layers run twice, and a batch norm among them updates its averages twice for each batch. The authors share
    the convolutions and let each network have its own batch norms: name ``"layer1.0.conv1"`` and not ``"layer1"``.

    Args:
        light: the network to keep, unchanged but for what it learns.
        booster: a larger network for the same task.
        shared: the layers, by the module's name in both networks or as (name in light, name in booster).

    Raises:
        ValueError: no shared layer, a name that there is not, or layers whose parameters differ in name or shape.
        TypeError: a network is no ``nn.Module``.

    Memory: that of both networks and their activations; shared parameters once.

    >>> import torch
    >>> light = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> booster = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    >>> rocket = Rocket(light, booster, shared=["0"])
    >>> booster[0] is light[0], rocket(torch.ones(2, 4)).logits.shape
    (True, torch.Size([2, 3]))
    """

    def __init__(self, light: nn.Module, booster: nn.Module, shared: Sequence[str | tuple[str, str]]):
        super().__init__()
        for name, network in (("light", light), ("booster", booster)):
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name}: expected an nn.Module, got {type(network).__name__}")
        if isinstance(shared, str) or not shared:
            raise ValueError(f"shared={shared!r}: expected a list with at least one layer's name")
        if {id(m) for m in light.modules()} & {id(m) for m in booster.modules()}:
            raise ValueError("booster: shares modules with the light network already; give it its own")
        pairs = [(entry, entry) if isinstance(entry, str) else (entry[0], entry[1]) for entry in shared]
        layers = [(_layer(light, mine, "light"), _layer(booster, theirs, "booster")) for mine, theirs in pairs]
        for (mine, theirs), (kept, replaced) in zip(pairs, layers, strict=True):
            a, b = ({k: tuple(v.shape) for k, v in layer.state_dict().items()} for layer in (kept, replaced))
            if a != b:
                raise ValueError(f"shared: {mine!r} of the light network has {a}, {theirs!r} of the booster {b}")
        for (_, theirs), (kept, _) in zip(pairs, layers, strict=True):
            parent, _, child = theirs.rpartition(".")
            setattr(booster.get_submodule(parent), child, kept)
        self.light, self.booster = light, booster
        self.shared = pairs

    def forward(self, *args: Any, **kwargs: Any) -> RocketOutput:
        """Both networks' outputs for the same inputs."""
        inputs = Inputs(args, kwargs)
        return RocketOutput(inputs.call(self.light), inputs.call(self.booster))


def _layer(network: nn.Module, name: str, whose: str) -> nn.Module:
    names = [n for n, _ in network.named_modules() if n]
    if name not in names:
        raise ValueError(f"shared: the {whose} network has no module {name!r}{nearest(name, names)}")
    return network.get_submodule(name)


@method(
    section="2.2",
    role="teacher",
    paper="Zhou, Fan, Cui, Bian, Zhu, Gai: Rocket Launching: A Universal and Efficient Framework for Training "
    "Well-performing Light Net",
    year=2018,
    link="https://arxiv.org/abs/1708.04106",
    needs=("labels", "other models"),
    use="No trained teacher: a larger network with the student's own lower layers learns beside it and leads it.",
)
class ParameterSharing(Teacher):
    """Rocket launching: the booster's present logits are a hint for the light network, with which it shares layers.

    The student role must be a :class:`Rocket`. With :meth:`losses` the total is

        CE(z_light, y) + CE(z_booster, y) + λ · ‖z_light − z_booster‖², mean over samples

    of logits before the softmax. What the booster says to the light network is detached (the paper's gradient block):
    the hint reaches the light network and, through its pass, the shared layers, but nothing that the booster has for
    itself. The labels count once for each of the two.

    Any loss can stand where the hint stands. Its student addresses are those of the light network and its teacher
    addresses those of the booster; losses without a teacher read both networks at the light one's addresses. A layer
    that is shared cannot be read in the booster.

    λ = 0.03 is that of the authors' code for Wide ResNets on CIFAR.

    Zhou, Fan, Cui, Bian, Zhu, Gai 2018, "Rocket Launching: A Universal and Efficient Framework for Training
    Well-performing Light Net", https://arxiv.org/abs/1708.04106

    >>> import torch
    >>> from tutelage import Distillation
    >>> from tutelage.models import MLP
    >>> rocket = Rocket(MLP(8, (16,), 3), MLP(8, (16, 64), 3), shared=["hidden.0"])
    >>> teacher = ParameterSharing()
    >>> d = Distillation(rocket, teacher, losses=teacher.losses(classes=3))
    >>> sorted(d((torch.randn(4, 8), torch.zeros(4).long())).values)
    ['LogitRegression', 'TaskLoss']
    """

    def __init__(self) -> None:
        self._light: list[Address] = []
        self._booster: list[Address] = []

    def losses(self, classes: int, hint: float = 0.03) -> list[Loss]:
        """The published ones.

        Args:
            classes: how many there are. The authors sum the squared differences over them and ``LogitRegression`` takes
                the mean, so its weight is λ times their number.
            hint: λ.
        """
        return [TaskLoss(), LogitRegression(weight=hint * classes)]

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        if not isinstance(student, Rocket):
            raise TypeError(f"student: ParameterSharing teaches a tutelage Rocket, got {type(student).__name__}")
        return student.light, student.booster

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        assert isinstance(student, Rocket), "names() has checked it"
        self._light = [Address.parse(text) for text in dict.fromkeys(student_reads)]
        self._booster = [Address.parse(text) for text in dict.fromkeys(teacher_reads)]
        # A shared layer is called by both networks, so its calls do not tell whose they are, but for the first.
        if of_light := [a.text for a in self._light if a.call > 1 and _is_shared(student, "light", a)]:
            raise UnknownTap(f"{of_light[0]!r} is a later call of a shared layer; read another one")
        if of_booster := [a.text for a in self._booster if _is_shared(student, "booster", a)]:
            raise UnknownTap(f"{of_booster[0]!r} is a shared layer: read the booster at one of its own")
        for address in self._light:  # for losses without a teacher, which read both networks
            there = address.text not in teacher_reads and _there(student.booster, address)
            if there and not _is_shared(student, "booster", address):
                self._booster.append(address)
        reads = [("light", a) for a in self._light] + [("booster", a) for a in self._booster]
        taps = [_inside(whose, address) for whose, address in reads if not address.field]
        return taps + ["@logits"] * any(address.field for _, address in reads)  # an @ address needs the whole pass

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        said = student.output or RocketOutput(None, None)  # nothing is said in a partial pass
        light = _record("light", said.light, self._light, student)
        booster = _record("booster", said.booster, self._booster, student)
        return [Lesson(light, booster.detach()), Lesson(booster, None)]


def _is_shared(rocket: Rocket, whose: str, address: Address) -> bool:
    if address.field or not address.name:
        return False
    module = rocket.get_submodule(f"{whose}.{address.name}")
    return all(any(module is other for other in network.modules()) for network in (rocket.light, rocket.booster))


def _there(network: nn.Module, address: Address) -> bool:
    try:
        expand(network, address.text)
    except UnknownTap:
        return False
    return True


def _record(whose: str, output: Any, reads: list[Address], rocket: Record) -> Record:
    taps = {
        address.text: in_float32(address.read_output(output)) if address.field else rocket[_inside(whose, address)]
        for address in reads
    }
    return Record(output, taps)


def _inside(whose: str, address: Address) -> str:
    """The address inside the rocket of an address inside one of its networks, whose own ``":input"`` has no name."""
    return f"{whose}.{address.text}" if address.name else f"{whose}{address.text}"
