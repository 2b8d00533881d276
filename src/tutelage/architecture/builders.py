"""Students that are derived from a teacher: what their builders have in common, and how they come back from files."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tutelage.algorithms.quantized.fake_quantized import freeze_quantized
from tutelage.checkpoint import write_json
from tutelage.errors import nearest
from tutelage.evaluation import evaluating
from tutelage.models import load_weights
from tutelage.views import Inputs, judging, move

if TYPE_CHECKING:  # which itself is built on this package
    from tutelage.deploy.calling import Example

_FORMAT = 1


@dataclass(frozen=True)
class StudentBuilder(ABC):
    """Makes a student of a teacher: ``student = LowRank(0.25)(teacher, example)``.

    The student is a new network in training mode, of which every parameter learns; the teacher stays what it was, bit
    for bit. A recipe takes a builder in its field ``student``, and :func:`tutelage.deploy.compress.compress` as a
    candidate.

    A builder says what it makes of a teacher as plain values, its *structure*, and makes it from them alone: with the
    function that makes the teacher's network they are all that a saved student needs (:func:`load_built`). It is a
    class and no protocol, as a recipe's fields are checked by class.

    Args:
        name: what the student is called, in tables and as a folder; by default after the builder's arguments.

    Memory: two copies of the teacher.
    """

    name: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def choose(self, teacher: nn.Module, example: Example) -> dict[str, Any]:
        """The structure of the student, as plain values."""

    @staticmethod
    @abstractmethod
    def build(network: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """A student of this structure, made of a network like the teacher."""

    @property
    def label(self) -> str:
        """What the student is called: ``prune-0.5``, ``low-rank-energy=0.9``."""
        if self.name:
            return self.name
        own = [f for f in dataclasses.fields(self) if f.name != "name"]
        given = [(f.name, getattr(self, f.name)) for f in own if getattr(self, f.name) != f.default]
        said = [f"{value}" if name == own[0].name else f"{name}={value}" for name, value in given]
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__).lower()
        return re.sub(r"[^\w.=+]+", "-", "-".join([kind, *said])).strip("-")

    def __call__(self, teacher: nn.Module, example: Example) -> nn.Module:
        """The student.

        Args:
            teacher: any network.
            example: what it is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments.

        Raises:
            ValueError: what cannot be built; the message names the layer.
        """
        return self.derive(teacher, example)[0]

    def check(self) -> None:  # noqa: B027  (a builder may have nothing to refuse)
        """Refuse arguments that are wrong whatever the teacher is, with a ``ValueError``."""

    def derive(self, teacher: nn.Module, example: Example) -> tuple[nn.Module, dict[str, Any]]:
        """The student and its structure, which :func:`save_structure` writes."""
        self.check()
        structure = self.choose(teacher, example)
        student = self.build(teacher, structure)
        try:
            watched(student, example, ())
        except Exception as error:
            layers = ", ".join(_changed(structure)[:4]) or "a layer"
            raise ValueError(
                f"{type(teacher).__name__}: {type(self).__name__} leaves a network that cannot be called: {error}; "
                f"something reads the weights of {layers} or others itself; name those in keep"
            ) from error
        return student, structure


def _changed(structure: Mapping[str, Any]) -> list[str]:
    return [repr(name) for part in structure.values() if isinstance(part, Mapping) for name in part]


def student_copy(network: nn.Module) -> nn.Module:
    """A copy in training mode, of which every parameter learns."""
    return copy.deepcopy(network).requires_grad_(True).train()


def save_structure(path: str | Path, builder: StudentBuilder, structure: Mapping[str, Any]) -> None:
    """Write a student's structure as JSON, whole or not at all."""
    write_json(Path(path), {"format": _FORMAT, "builder": type(builder).__name__, **structure})


def load_structure(path: str | Path) -> tuple[type[StudentBuilder], dict[str, Any]]:
    """The class of the builder and the structure, of what :func:`save_structure` wrote.

    Raises:
        ValueError: it is no such file, or of a builder that is not imported.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        form, builder = body.pop("format"), body.pop("builder")
        if form != _FORMAT:
            raise ValueError(f"format {form!r}, expected {_FORMAT}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of a student's structure: {error!r}") from error
    builders = {cls.__name__: cls for cls in StudentBuilder.__subclasses__()}
    if builder not in builders:
        raise ValueError(f"{path}: its builder {builder!r} is not imported{nearest(str(builder), builders)}")
    return builders[builder], body


def load_built(teacher_factory: Callable[[], nn.Module], structure: str | Path, weights: str | Path) -> nn.Module:
    """A derived student from its files: the structure as JSON, the weights as safetensors.

    Nothing in the files is executed; neither an example nor the teacher's weights are needed. A fake-quantised student
    comes back with its quantised values as plain weights, as its file holds them.

    Args:
        teacher_factory: makes the teacher's network; its weights do not matter.
        structure: the file that :func:`save_structure` wrote, or ``structure.json`` in a candidate's folder.
        weights: the student's weights (:func:`tutelage.models.save_weights`, or a run's ``student.safetensors``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the files do not fit the network or each other.

    >>> import tempfile
    >>> from tutelage import LowRank
    >>> from tutelage.models import MLP, save_weights
    >>> folder, teacher, builder = Path(tempfile.mkdtemp()), MLP(16, (32, 32), 3), LowRank(4)
    >>> student, structure = builder.derive(teacher, torch.zeros(1, 16))
    >>> save_structure(folder / "structure.json", builder, structure)
    >>> save_weights(student, folder / "student.safetensors")
    >>> again = load_built(lambda: MLP(16, (32, 32), 3), folder / "structure.json", folder / "student.safetensors")
    >>> bool((again.hidden[1][0][0].weight == student.hidden[1][0][0].weight).all())
    True
    """
    builder, body = load_structure(structure)
    try:
        student = builder.build(teacher_factory(), body)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{structure}: it does not fit this network: {error!r}") from error
    if any(map(parametrize.is_parametrized, student.modules())):
        freeze_quantized(student)
    load_weights(student, weights)
    return student


def derived(builder: StudentBuilder, teacher: nn.Module, train: Iterable[Any], views: Any, seed: int) -> nn.Module:
    """What a builder makes of the teacher as it is now, with the first batch as the example and fresh weights, if there
    are any, from the seed. Random numbers stay as they were."""
    from tutelage.deploy.calling import taken_by

    with torch.random.fork_rng():
        inputs = judging(views)(next(iter(train))).teacher
        torch.manual_seed(seed)
        return builder(teacher, taken_by(teacher, inputs.args or inputs.kwargs))


@dataclass(frozen=True)
class Call:
    """One call of a module: the first tensors of its arguments and of its result."""

    name: str
    given: Tensor | None
    returned: Tensor | None


def watched(network: nn.Module, example: Example, names: Iterable[str]) -> tuple[list[Call], Any]:
    """The calls of the named modules during one pass in eval mode, in their order, and the output."""
    from tutelage.deploy.calling import as_call, device_of

    calls: list[Call] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, output: calls.append(
            Call(name, _first([*args, *kwargs.values()]), _first(output))
        )

    modules = dict(network.named_modules())
    handles = [modules[name].register_forward_hook(note(name), with_kwargs=True) for name in names]
    try:
        with evaluating(network), torch.random.fork_rng():
            output = Inputs(*as_call(move(example, device_of(network)))).call(network)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _first(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := _first(part)) is not None), None)


def layers_in_use(
    teacher: nn.Module, example: Example, kinds: tuple[type[nn.Module], ...], keep: tuple[str, ...]
) -> tuple[dict[str, Any], list[Call], Any]:
    """The layers of exactly these classes that a pass calls and that nothing else shares weights with, in the order of
    their calls; the calls; and the output. Subclasses calculate something else, so they stay, and so do those in
    ``keep``.

    Raises:
        ValueError: an address in keep names nothing, or a parametrised layer.
    """
    if isinstance(keep, str):
        raise TypeError(f"keep={keep!r}: expected a list of addresses")
    network = student_copy(teacher)
    modules = {name: module for name, module in network.named_modules() if name}
    kept: set[str] = set()
    for address in keep:
        matching = fnmatch.filter(modules, address)
        if not matching:
            raise ValueError(f"keep: no module {address!r} in this {type(teacher).__name__}{nearest(address, modules)}")
        kept.update(n for n in modules if any(n == m or n.startswith(f"{m}.") for m in matching))
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name or type(teacher).__name__} is parametrised (fake quantisation, weight norm): derive the "
                "student of the plain network and parametrise the result"
            )
    owners: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    several = [name for name, module in modules.items() if type(module) in kinds]
    calls, output = watched(network, example, several)
    found = {
        call.name: modules[call.name]
        for call in calls
        if call.name not in kept and all(owners[id(p)] == 1 for p in modules[call.name].parameters())
    }
    return found, calls, output


def with_replaced(network: nn.Module, names: Iterable[str], make: Callable[[nn.Module, str], nn.Module]) -> nn.Module:
    """A copy to train in which the layers of these names are others, also where they are known under further names.

    Args:
        network: stays as it is.
        names: of the layers.
        make: the new layer of an old one and its name; it comes to the old one's device, type and mode.

    Raises:
        ValueError: the network has no such layer.
    """
    student = student_copy(network)
    modules = dict(student.named_modules())
    new = {}
    for name in names:
        if name not in modules:
            raise ValueError(f"{type(network).__name__} has no layer {name!r}{nearest(name, modules)}")
        new[modules[name]] = make(modules[name], name).to(next(modules[name].parameters()))
    for parent in modules.values():
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
    return student
