"""The steps of a compression, each kept on disk when it is finished."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tutelage.algorithms.quantized.fake_quantized import freeze_quantized
from tutelage.architecture.builders import load_structure, save_structure
from tutelage.console import say
from tutelage.deploy.calling import resized, taken_by
from tutelage.deploy.candidates import Candidate, Precision, Shrink
from tutelage.deploy.compressed import Point, Skipped
from tutelage.deploy.export import Exported, export_onnx
from tutelage.deploy.limits import Limits, Miss
from tutelage.deploy.measure import Measurement, measure, measure_onnx, measure_together
from tutelage.deploy.running import open_exported
from tutelage.deploy.steps import Steps, described, file_key, key_of, network_key
from tutelage.distilling import distill
from tutelage.evaluation import Metrics, evaluate_together
from tutelage.knowledge.base import Loss
from tutelage.models import load_weights
from tutelage.run import random_state, restore_random, seed_epoch
from tutelage.schedule import Stage
from tutelage.training import Training
from tutelage.views import Inputs, judging

TEACHER = "teacher"
"""The folder of the teacher's file; no candidate may be called so."""
# How far beyond a limit an untrained network's file must be for its training to be left out. Sizes differ by what the
# file format spends on small numbers; times by what else the machine does.
_SIZE_MARGIN, _LATENCY_MARGIN = 1.05, 2.0
# Settings that change what is shown or saved, and not what is learned.
_NOT_LEARNED = ("progress", "trackers", "log_every", "checkpoint_every", "gradient_shares")


@dataclass(frozen=True)
class ExportedFile:
    """A file, before it is known how good and how fast it is."""

    candidate: str
    precision: str
    file: Path
    parity: dict[str, Any]
    network: dict[str, Any]
    example: Any
    metrics: Metrics | None = None


class OnFile(nn.Module):
    """An exported file as a module, so that it is evaluated by what evaluates networks."""

    def __init__(self, file: Path):
        super().__init__()
        self.run = open_exported(file)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        known = {name: value for name, value in kwargs.items() if name in self.run.inputs}
        if len(kwargs) == 1 and not known:  # one input, under another name than the network's own
            args, known = tuple(kwargs.values()), {}
        return torch.from_numpy(self.run(*args, **known))


@dataclass
class Pipeline:
    """What all candidates share, and the steps."""

    teacher: nn.Module
    train: Iterable[Any]
    validation: Iterable[Any]
    out: Path
    precisions: tuple[Precision, ...]
    losses: Sequence[Loss] | None
    stages: Sequence[Stage] | None
    views: Any
    training: Training
    calibration: int
    runs: int
    data: dict[str, Any]
    teacher_key: str = ""
    batches: list[Any] = field(default_factory=list)
    reference: list[ExportedFile] = field(default_factory=list)

    def prepare_teacher(self, settings: Training | None) -> None:
        """Train the teacher if need be, and write and judge its own file."""
        folder = self.out / TEACHER
        steps = Steps(folder)
        if settings is not None:
            settings = dataclasses.replace(settings, seed=self.training.seed)
            depends = {"weights": network_key(self.teacher), "training": _learned(settings), "data": self.data}
            run = f"run-{key_of(depends)[:8]}"

            def train() -> dict[str, Any]:
                say("training the teacher")
                result = distill(
                    self.teacher,
                    None,
                    self.train,
                    self.validation,
                    training=settings,
                    out=folder / run,
                    resume=True,
                )
                return {"validation": result.metrics.known() if result.metrics else {}}

            steps.do("training", depends, train, [f"{run}/student.safetensors"])
            load_weights(self.teacher, folder / run / "student.safetensors")
        self.teacher_key = network_key(self.teacher)
        self.batches = self._calibration()
        about = self._size(self.teacher, teacher=True)
        self.reference = self._judged([self._file(TEACHER, self.teacher, "float32", about)])

    def student(self, candidate: Candidate) -> tuple[nn.Module, dict[str, Any]]:
        """A candidate's network with its first weights, and what is known of it without a clock."""
        steps = Steps(self.out / candidate.label)
        if isinstance(candidate, Shrink):
            about = steps.do("student", {"network": network_key(candidate.model)}, lambda: self._size(candidate.model))
            return copy.deepcopy(candidate.model), about
        depends = {"builder": described(candidate), "teacher": self.teacher_key, "seed": self.training.seed}

        def derive() -> dict[str, Any]:
            student, structure = candidate.derive(self.teacher, self.example(self.teacher, teacher=True))
            steps.folder.mkdir(parents=True, exist_ok=True)
            save_structure(steps.folder / "structure.json", candidate, structure)
            return self._size(student)

        with torch.random.fork_rng():
            torch.manual_seed(self.training.seed)
            about = steps.do("student", depends, derive, ["structure.json"])
            builder, structure = load_structure(steps.folder / "structure.json")
            torch.manual_seed(self.training.seed)  # the same first weights, whether the structure was there or not
            return builder.build(self.teacher, structure), about

    def screened(
        self, candidate: Candidate, student: nn.Module, about: dict[str, Any], limits: Limits
    ) -> Skipped | None:
        """Why training it would be in vain, if it would."""
        if limits.max_size is None and limits.max_latency is None:
            return None
        steps = Steps(self.out / candidate.label)
        loose = dataclasses.replace(
            limits,
            max_size=limits.max_size and round(_SIZE_MARGIN * limits.max_size),
            max_latency=limits.max_latency and _LATENCY_MARGIN * limits.max_latency,
        )
        example = self.example(student)
        found: list[tuple[Precision, list[Miss]]] = []
        for precision in reversed(self.precisions):  # int8 is mostly the smaller one, and one that fits is enough

            def screen(precision: Precision = precision) -> dict[str, Any]:
                steps.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=steps.folder, prefix=".screening-") as folder:
                    file = self._export(_stirred(student), example, Path(folder) / "untrained.onnx", precision).path
                    cost = measure_onnx(file, example, runs=self.runs)
                return {"size_bytes": cost.size_bytes, "latency_ms": cost.latency_p50_ms}

            depends = {"student": network_key(student), **self._precision(precision), **self._timing()}
            cost = steps.do(f"screening-{precision}", depends, screen)
            if not loose.misses(cost["size_bytes"], cost["latency_ms"], None):
                return None
            found.append((precision, limits.misses(cost["size_bytes"], cost["latency_ms"], None)))
        precision, misses = min(found, key=lambda entry: max(miss.by for miss in entry[1]))
        return Skipped(candidate.label, precision, tuple(misses), about["parameters"])

    def distilled(self, candidate: Candidate, student: nn.Module) -> Path:
        """The file of a candidate's weights, best on validation."""
        steps = Steps(self.out / candidate.label)
        depends = {
            "student": network_key(student),
            "teacher": self.teacher_key,
            "losses": described(self.losses),
            "stages": described(self.stages),
            "training": _learned(self.training),
            "data": self.data,
        }
        # The folder is named after what the run depends on: with other settings it is another run.
        run = f"run-{key_of(depends)[:8]}"

        def learn() -> dict[str, Any]:
            result = distill(
                student,
                self.teacher,
                self.train,
                self.validation,
                losses=copy.deepcopy(self.losses),
                stages=copy.deepcopy(self.stages),
                views=self.views,
                training=self.training,
                out=steps.folder / run,
                resume=True,
            )
            return {"validation": result.metrics.known() if result.metrics else {}}

        steps.do("distillation", depends, learn, [f"{run}/student.safetensors"])
        return steps.folder / run / "student.safetensors"

    def exported(
        self, candidate: Candidate, student: nn.Module, weights: Path, about: dict[str, Any]
    ) -> list[ExportedFile]:
        """A candidate's files, checked and judged on the validation data."""
        plain = _plain(student).cpu()
        load_weights(plain, weights)
        return self._judged([self._file(candidate.label, plain, precision, about) for precision in self.precisions])

    def points(self, files: Sequence[ExportedFile]) -> tuple[Point, list[Point]]:
        """The teacher's file and all others with their latency, measured in turn."""
        everything = {self._name(f): f for f in (*self.reference, *files)}
        depends = {"files": {name: file_key(f.file) for name, f in everything.items()}, **self._timing()}

        def time() -> dict[str, Any]:
            say(f"measuring {len(everything)} files in turn")
            costs = measure_together(
                {name: f.file for name, f in everything.items()},
                self.reference[0].example,
                examples={name: f.example for name, f in everything.items()},
                runs=self.runs,
            )
            return {name: dataclasses.asdict(cost) for name, cost in costs.items()}

        costs = Steps(self.out).do("latency", depends, time)
        found = []
        for name, f in everything.items():
            # The files do not say how many weights their network has.
            cost = Measurement(**{**costs[name], **f.network, "precision": f.precision})
            assert f.metrics is not None
            found.append(Point(f.candidate, f.precision, f.file.relative_to(self.out), cost, f.metrics, **f.parity))
        return found[0], found[1:]

    def tested(self, chosen: Point, teacher: Point, test: Iterable[Any]) -> dict[str, Metrics]:
        """The chosen file's and the teacher's figures on the test data."""
        files = {"student": self.out / chosen.file, "teacher": self.out / teacher.file}
        depends = {**{name: file_key(file) for name, file in files.items()}, "data": self.data}
        depends["test"] = about_loader(test)

        def judge() -> dict[str, Any]:
            say(f"testing {chosen.name} and the teacher")
            return self._evaluated({"student": files["student"]}, test)

        found = Steps(self.out / "tests").do(chosen.name.replace(" ", "-"), depends, judge)
        return {name: Metrics(**figures) for name, figures in found.items()}

    def example(self, model: nn.Module, teacher: bool = False) -> Any:
        """The inputs of one sample, as the student or the teacher sees it."""
        with torch.random.fork_rng():  # a loader's iterator draws a number
            batch = judging(self.views)(next(iter(self.validation)))
            inputs = batch.teacher if teacher else batch.student
            return taken_by(model, resized(inputs.args or inputs.kwargs, 1))

    @staticmethod
    def _name(file: ExportedFile) -> str:
        return f"{file.candidate} {file.precision}"

    def _file(self, label: str, model: nn.Module, precision: Precision, about: dict[str, Any]) -> ExportedFile:
        steps, file = Steps(self.out / label), self.out / label / f"{precision}.onnx"
        depends = {"weights": network_key(model), **self._precision(precision)}
        example = self.example(model, teacher=label == TEACHER)

        def export() -> dict[str, Any]:
            teacher = label == TEACHER  # which sees other batches than the student, perhaps
            done = export_onnx(model, example, file) if teacher else self._export(model, example, file, precision)
            return {"max_abs_error": done.max_abs_error, "parity": done.agreement}

        parity = steps.do(f"export-{precision}", depends, export, [file.name])
        return ExportedFile(label, precision, file, parity, about, example)

    def _judged(self, files: list[ExportedFile]) -> list[ExportedFile]:
        """The files of one network with their figures on the validation data."""
        steps = Steps(files[0].file.parent)
        depends = {"files": {f.precision: file_key(f.file) for f in files}, "teacher": self.teacher_key}
        students = {f.precision: f.file for f in files if f.candidate != TEACHER}
        found = steps.do("accuracy", depends | {"data": self.data}, lambda: self._evaluated(students, self.validation))
        names = [f.precision if students else TEACHER for f in files]
        return [dataclasses.replace(f, metrics=Metrics(**found[name])) for f, name in zip(files, names, strict=True)]

    def _evaluated(self, students: dict[str, Path], data: Iterable[Any]) -> dict[str, Any]:
        """The figures of files and of the teacher's, in one pass over the data."""
        teacher = OnFile(self.out / TEACHER / "float32.onnx")
        networks = {name: OnFile(file) for name, file in students.items()}
        found = evaluate_together(networks, data, teacher, views=self.views, device="cpu")
        return {name: metrics.known() for name, metrics in found.items()}

    def _precision(self, precision: Precision) -> dict[str, Any]:
        """What a file of this precision depends on beside the network."""
        ranges = {"calibration": self.calibration, "seed": self.training.seed, "data": self.data}
        return {"precision": precision, **ranges}

    def _export(self, model: nn.Module, example: Any, file: Path, precision: Precision) -> Exported:
        """Write a student's file, compared with the network on the batches that int8 ranges come from."""
        named = isinstance(example, Mapping)
        batches = [b if named or not isinstance(b, Mapping) else tuple(b.values()) for b in self.batches]
        return export_onnx(model, example, file, quantize="int8" if precision == "int8" else None, calibration=batches)

    def _calibration(self) -> list[Any]:
        """The first training batches as the student sees them: always the same, without using up random numbers."""
        before = random_state()
        seed_epoch(self.training.seed, -1, self.train)
        try:
            views = judging(self.views)
            several: list[Inputs] = [views(raw).student for raw in islice(self.train, self.calibration)]
        finally:
            restore_random(before)
        return [inputs.args or inputs.kwargs for inputs in several]

    def _size(self, model: nn.Module, teacher: bool = False) -> dict[str, Any]:
        found = measure(model, self.example(model, teacher), runs=1, warmup=0)
        return {"parameters": found.parameters, "buffers": found.buffers, "macs": found.macs}

    def _timing(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }


def _plain(student: nn.Module) -> nn.Module:
    """A copy with plain weights, of a student that is fake-quantised as well."""
    plain = copy.deepcopy(student)
    return freeze_quantized(plain) if any(map(parametrize.is_parametrized, plain.modules())) else plain


def _stirred(student: nn.Module) -> nn.Module:
    """A copy whose file is as large and fast as after training: exporters leave out what is 0, as first biases are."""
    plain, generator = _plain(student), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand(tensor.shape, generator=generator).to(tensor))
    return plain


def _learned(training: Training) -> dict[str, Any]:
    return {k: described(v) for k, v in vars(training).items() if k not in _NOT_LEARNED}


def about_loader(loader: Iterable[Any]) -> dict[str, Any]:
    """What can be known of a loader's data without reading them."""

    def length(thing: Any) -> int | None:
        try:
            return len(thing)
        except TypeError:
            return None

    return {
        "kind": type(loader).__name__,
        "batches": length(loader),
        "samples": length(getattr(loader, "dataset", None)),
    }
