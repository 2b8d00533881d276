"""From a teacher to a file within limits: real trainings on few images, interrupted wherever they can be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tutelage import KD, TaskLoss, Training, load_built
from tutelage.data import fashion_loaders
from tutelage.deploy import check_onnx, pipeline
from tutelage.deploy import compress as compressing
from tutelage.deploy.compress import Limits, Prune, Shrink, compress
from tutelage.deploy.steps import Steps, network_key
from tutelage.models import SmallCNN

for _package in ("torch_pruning", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package)

ONE = Training(epochs=1, optimizer="adamw", lr=0.02, scheduler="onecycle", progress=False)
WIDE = Limits(max_size=10**7)


class Watched:
    """A loader that notes when it is read."""

    def __init__(self, loader, events: list, name: str):
        self.loader, self.events, self.name = loader, events, name
        self.dataset = loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.events.append(self.name)
        return iter(self.loader)


@pytest.fixture(scope="module")
def data():
    found = fashion_loaders(limit=800, validation=200, batch_size=40)
    found.test.dataset.indices = found.test.dataset.indices[:300]
    return found


@pytest.fixture(scope="module")
def written():
    """Files that were exported in this module: the exporter needs seconds for what these tests need again and again."""
    return {}


@pytest.fixture(autouse=True)
def exports(monkeypatch, tmp_path_factory, written):
    real = pipeline.export_onnx

    def once(model, example, path, *, quantize=None, calibration=None):
        batches = hashlib.sha256(b"".join(b[0].numpy().tobytes() for b in calibration or ())).hexdigest()
        key = network_key(model), quantize, batches
        if key not in written:
            file = tmp_path_factory.mktemp("exported") / "file.onnx"
            written[key] = real(model, example, file, quantize=quantize, calibration=calibration)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(written[key].path, path)
        return dataclasses.replace(written[key], path=Path(path))

    monkeypatch.setattr(pipeline, "export_onnx", once)


def teacher() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN(width=8)


def small() -> SmallCNN:
    torch.manual_seed(1)
    return SmallCNN(width=3)


def run(data, out, candidates=None, limits=WIDE, test=None, **changes):
    settings = {"training": ONE, "teacher_training": ONE, "runs": 2, "resume": True, **changes}
    return compress(
        teacher(),
        data.train,
        data.validation,
        data.test if test is None else test,
        candidates=candidates or [Prune(0.5)],
        limits=limits,
        out=out,
        **settings,
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, written):
    """Two candidates, one file of each is within the limits; read only."""
    with pytest.MonkeyPatch.context() as patch:
        events: list[str] = []
        choose = compressing.choose
        patch.setattr(compressing, "choose", lambda *given: events.append("choice") or choose(*given))
        found = run(
            data,
            tmp_path_factory.mktemp("compressed") / "out",
            [Prune(0.5), Shrink(small(), "small")],
            Limits(max_size=9_000),
            Watched(data.test, events, "test"),
            resume=False,
        )
    return found, events


# What comes of it


def test_every_file_is_there_with_its_figures(whole, data):
    found, _ = whole
    assert [p.name for p in found.points] == [
        f"{candidate} {precision}" for candidate in ("prune-0.5", "small") for precision in ("float32", "int8")
    ]
    for point in (found.teacher, *found.points):
        file = found.out / point.file
        assert file.stat().st_size == point.size_bytes
        assert point.metrics.samples == 200
        assert point.latency_ms > 0
        assert 0 <= point.parity <= 1
    assert found.teacher.measurement.parameters == sum(p.numel() for p in teacher().parameters())
    pruned = found.points[0].measurement
    assert pruned.parameters < 0.4 * found.teacher.measurement.parameters
    assert pruned.macs < 0.4 * found.teacher.measurement.macs


def test_accuracies_are_those_of_the_files_themselves(whole, data):
    import onnxruntime

    found, _ = whole
    for point in found.points:
        session = onnxruntime.InferenceSession(str(found.out / point.file), providers=["CPUExecutionProvider"])
        right = [
            torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]).argmax(1) == y
            for x, y, _ in data.validation
        ]
        assert point.accuracy == pytest.approx(torch.cat(right).float().mean().item())


def test_the_pruned_network_is_loaded_from_its_files_and_is_what_was_exported(whole, data):
    found, _ = whole
    folder = found.out / "prune-0.5"
    weights = next(folder.glob("run-*/student.safetensors"))
    network = load_built(teacher, folder / "structure.json", weights)
    x = next(iter(data.validation))[0]
    assert check_onnx(folder / "float32.onnx", network, x, tolerance=1e-4).agreement == 1.0


def test_the_choice_meets_the_limits_and_is_copied(whole):
    found, _ = whole
    meeting = [p for p in found.points if p.size_bytes <= 9_000]
    assert 0 < len(meeting) < len(found.points)
    assert found.chosen in meeting
    assert found.chosen.accuracy == max(p.accuracy for p in meeting)
    assert found.file.read_bytes() == (found.out / found.chosen.file).read_bytes()
    assert found.chosen in found.front
    assert str(found).startswith(f"{found.chosen.name}: ")
    assert "student.onnx" in str(found)


def test_test_data_are_read_once_and_after_the_choice(whole):
    found, events = whole
    assert events == ["choice", "test"]
    assert found.test.samples == found.teacher_test.samples == 300
    assert found.looks == [found.chosen.name.replace(" ", "-")]


def test_what_is_written_down_is_what_was_found(whole):
    found, _ = whole
    body = json.loads((found.out / "compress.json").read_text())
    assert body == json.loads(json.dumps(found.plain()))
    assert body["chosen"] == found.chosen.name
    assert body["finished"]
    assert body["parity"]["same_first_choice"] == found.chosen.parity
    assert body["test"]["accuracy"] == found.test.accuracy
    assert {p["name"]: p["metrics"]["accuracy"] for p in body["points"]} == {p.name: p.accuracy for p in found.points}
    assert str(found.out) not in (found.out / "compress.json").read_text()


def test_table_and_page_name_every_file(whole, tmp_path, capsys):
    from rich.console import Console

    found, _ = whole
    Console(width=80).print(found.table())
    said = capsys.readouterr().out
    report = found.report()
    for point in found.points:
        assert point.name in said
    assert said.count("chosen") == 1
    assert [row.kind for row in report.rows] == ["teacher"] + 4 * ["student"]
    assert [row.accuracy for row in report.rows] == [[p.accuracy] for p in (found.teacher, *found.points)]
    assert any("validation data" in note for note in report.notes)
    assert any(note.startswith("Chosen: ") for note in report.notes)


def test_teacher_and_candidates_are_left_as_they_were(data, tmp_path):
    taught, student = teacher(), small()
    before = network_key(student)
    compress(
        taught,
        data.train,
        data.validation,
        candidates=[Shrink(student)],
        limits=WIDE,
        out=tmp_path / "out",
        precisions=["float32"],
        training=ONE,
        runs=2,
    )
    assert network_key(student) == before
    assert network_key(taught) == network_key(teacher())


# Limits that nothing meets


def test_where_nothing_meets_the_limits_nothing_is_claimed(whole, data):
    """In the same folder, after a choice: the earlier copy goes, everything else stays."""
    found, _ = whole
    events: list[str] = []
    out = found.out.with_name("again")
    shutil.copytree(found.out, out)
    none = run(
        data,
        out,
        [Prune(0.5), Shrink(small(), "small")],
        Limits(max_size=10**7, min_accuracy=1.0),
        Watched(data.test, events, "test"),
    )
    assert none.chosen is none.file is none.test is None
    assert events == []
    assert not (out / "student.onnx").exists()
    best = max(none.points, key=lambda p: p.accuracy)
    assert none.nearest()[0] in [p.name for p in none.points if p.accuracy == best.accuracy]
    assert f"{100 - 100 * best.accuracy:.2f} points under the 100 % of min_accuracy" in str(none)
    assert all((out / p.file).is_file() for p in found.points)
    assert json.loads((out / "compress.json").read_text())["nearest"]["name"] == none.nearest()[0]


def test_what_cannot_fit_is_not_trained(data, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(pipeline, "distill", lambda *a, **k: trained.append(a) or pytest.fail("trained"))
    found = run(data, tmp_path / "out", [Prune(0.5)], Limits(max_size=1000), teacher_training=None)
    assert trained == []
    assert found.points == []
    (skipped,) = found.skipped
    name, misses = found.nearest()
    assert name == skipped.name
    assert [miss.limit for miss in misses] == ["max_size"]
    assert "no file meets the limits; the nearest is prune-0.5" in str(found)
    assert "over the 1 kB of max_size" in str(found)
    assert "prune-0.5 was not trained" in " ".join(found.report().notes)


def test_a_latency_that_is_far_out_of_reach_is_not_trained_for(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "distill", lambda *a, **k: pytest.fail("trained"))
    found = run(data, tmp_path / "out", [Prune(0.5)], Limits(max_latency=1e-6), teacher_training=None)
    assert [miss.limit for miss in found.skipped[0].misses] == ["max_latency"]


def test_screened_sizes_are_those_of_the_trained_files(whole):
    """To what the margin allows for: the reason why leaving out before training is safe."""
    found, _ = whole
    for candidate in ("prune-0.5", "small"):
        screened = json.loads((found.out / candidate / "screening-int8.json").read_text())["result"]["size_bytes"]
        trained = next(p.size_bytes for p in found.points if p.name == f"{candidate} int8")
        assert trained == pytest.approx(screened, rel=0.02)


def test_without_limits_on_size_or_time_nothing_is_screened(data, tmp_path):
    found = run(data, tmp_path / "out", [Shrink(small())], Limits(min_accuracy=0.01), precisions=["float32"])
    assert not list(found.out.rglob("screening*"))
    assert found.chosen.name == "SmallCNN float32"


# Interruptions


class Boom(Exception):
    """What ends a run in these tests."""


@pytest.fixture
def works(monkeypatch):
    """Which steps were worked at; those in ``crash`` fail when they have done their work, before it is noted."""
    done, crash, real = [], set(), Steps.do

    def do(self, name, depends, work, files=()):
        def counted():
            step = f"{self.folder.name}/{name}"
            result = work()
            if step in crash:
                raise Boom(step)
            done.append(step)
            return result

        return real(self, name, depends, counted, files)

    monkeypatch.setattr(Steps, "do", do)
    return done, crash


def figures(found):
    points = [(p.name, p.size_bytes, p.metrics, p.parity, p.max_abs_error) for p in (found.teacher, *found.points)]
    return points, found.chosen.name, found.test, found.teacher_test, found.file.read_bytes()


def test_no_finished_step_is_repeated_wherever_it_is_interrupted(data, tmp_path, works):
    done, crash = works
    expected = run(data, tmp_path / "a" / "out", resume=False)
    steps = list(done)
    assert steps == [
        "teacher/training",
        "teacher/export-float32",
        "teacher/accuracy",
        "prune-0.5/student",
        "prune-0.5/screening-int8",
        "prune-0.5/distillation",
        "prune-0.5/export-float32",
        "prune-0.5/export-int8",
        "prune-0.5/accuracy",
        "out/latency",
        f"tests/{expected.chosen.name.replace(' ', '-')}",
    ]
    done.clear()
    for step in steps:
        crash.clear()
        crash.add(step)
        with pytest.raises(Boom, match=step):
            run(data, tmp_path / "b" / "out")
        assert not json.loads((tmp_path / "b" / "out" / "compress.json").read_text())["finished"]
        assert not [f for f in (tmp_path / "b" / "out").rglob("*") if ".part" in f.name]
    crash.clear()
    found = run(data, tmp_path / "b" / "out")
    assert done == steps
    assert figures(found) == figures(expected)
    assert figures(run(data, tmp_path / "b" / "out")) == figures(expected)
    assert done == steps


def test_it_goes_on_inside_a_distillation(data, tmp_path, monkeypatch):
    two, epochs, real = dataclasses.replace(ONE, epochs=2), [], pipeline.distill

    def watched(*given, **named):
        def after(line):
            epochs.append(line.epoch)
            if stop:
                raise Boom

        return real(*given, after_epoch=after, **named)

    settings = {"training": two, "teacher_training": None, "precisions": ["float32"]}
    expected = run(data, tmp_path / "a", **settings)
    monkeypatch.setattr(pipeline, "distill", watched)
    stop = True
    with pytest.raises(Boom):
        run(data, tmp_path / "b", **settings)
    stop = False
    found = run(data, tmp_path / "b", **settings)
    assert epochs == [0, 1]
    assert figures(found) == figures(expected)


def test_other_settings_are_another_run_and_the_rest_stays(data, tmp_path, works):
    done, _ = works
    settings = {"teacher_training": None, "precisions": ["float32"], "losses": [TaskLoss(), KD(temperature=2.0)]}
    run(data, tmp_path / "out", **settings)
    done.clear()
    run(data, tmp_path / "out", **{**settings, "losses": [TaskLoss(), KD(temperature=8.0)]})
    again = [f"prune-0.5/{step}" for step in ("distillation", "export-float32", "accuracy")]
    assert done[:4] == [*again, "out/latency"]
    assert len(list((tmp_path / "out" / "prune-0.5").glob("run-*"))) == 2
    done.clear()
    run(data, tmp_path / "out", **{**settings, "about": "other images of the same number"})
    assert "prune-0.5/distillation" in done
    assert "prune-0.5/student" not in done


def test_another_choice_measures_nothing_again_but_the_test_data(whole, data, works, monkeypatch):
    found, _ = whole
    done, _ = works
    out = found.out.with_name("limits")
    shutil.copytree(found.out, out)
    monkeypatch.setattr(compressing, "choose", lambda points, limits: max(points, key=lambda p: p.size_bytes))
    other = run(data, out, [Prune(0.5), Shrink(small(), "small")], WIDE)
    assert other.chosen.name == "prune-0.5 int8" != found.chosen.name
    assert other.file.read_bytes() == (out / "prune-0.5" / "int8.onnx").read_bytes()
    assert done == ["tests/prune-0.5-int8"]
    # that they were read twice is told
    assert len(other.looks) == 2
    assert any("read for 2 choices" in note for note in other.report().notes)


# What else networks and data may be


def test_named_inputs_and_other_eyes_of_the_teacher(tmp_path, monkeypatch):
    """Batches of named fields, of which student and teacher see different ones."""
    from tutelage.views import Paired

    monkeypatch.undo()  # the exports of this one are its own
    torch.manual_seed(0)
    batch = {"wide": torch.randn(16, 6), "narrow": torch.randn(16, 3), "label": torch.arange(16) % 2}
    big = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    student = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = compress(
        big,
        [batch],
        [batch],
        candidates=[Shrink(student, "narrow")],
        limits=WIDE,
        out=tmp_path / "out",
        views=Paired(student="narrow", teacher="wide"),
        training=ONE,
        runs=2,
    )
    assert [p.metrics.samples for p in found.points] == [16, 16]
    assert found.points[0].metrics.agreement is not None
    assert found.test is None


def test_fake_quantised_students_are_exported_plain(data, tmp_path):
    pytest.importorskip("torchao")
    from tutelage import fake_quantize

    student = fake_quantize(small())
    settings = {"teacher_training": None, "precisions": ["float32"]}
    found = run(data, tmp_path / "out", [Shrink(student, "eight-bit")], **settings)
    assert found.points[0].measurement.parameters == sum(p.numel() for p in small().parameters())


# Refusals


def test_mistakes_are_named_before_anything_is_written(data, tmp_path):
    bound = [KD()]
    bound[0].pairs = [("@logits", "@logits")]
    cases = [
        ({"candidates": []}, "candidates: expected one or more"),
        ({"candidates": [Prune(0.5), Prune(0.5)]}, "two are called 'prune-0.5'"),
        ({"candidates": [Prune(1.5)]}, "ratio=1.5"),
        ({"candidates": [Shrink(small(), "teacher")]}, "'teacher' cannot be a folder's name"),
        ({"candidates": [Shrink(small(), "../up")]}, "cannot be a folder's name"),
        ({"precisions": ["int4"]}, "expected float32, int8 or both"),
        ({"precisions": []}, "expected float32, int8 or both"),
        ({"losses": bound}, "KD was bound to other networks"),
        ({"calibration": 0}, "calibration=0"),
        ({"runs": 0}, "runs=0"),
    ]
    for changes, said in cases:
        with pytest.raises(ValueError, match=said):
            compress(
                teacher(),
                data.train,
                data.validation,
                **{"candidates": [Prune(0.5)], "limits": WIDE, "out": tmp_path / "out", **changes},
            )
    with pytest.raises(TypeError, match="teacher: expected a network, got NoneType"):
        compress(None, data.train, data.validation, candidates=[Prune(0.5)], limits=WIDE, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        run(data, tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        run(data, tmp_path / "thesis.txt")
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_compression_is_not_written_over_by_accident(whole, data):
    found, _ = whole
    with pytest.raises(FileExistsError, match="holds a compression already; resume it"):
        run(data, found.out, resume=False)


def test_several_processes_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        run(data, tmp_path / "out")
