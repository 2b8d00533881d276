"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tutelage import __version__, methods
from tutelage.cli import main
from tutelage.models import SmallCNN, save_weights

SMALL = ["--input", "1,1,28,28", "--arg", "width=4"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tutelage", *arguments]


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.delenv("TUTELAGE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    save_weights(SmallCNN(width=4), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A teacher of 8 epochs and a student of as many, all of them short."""
    settings = "{epochs: 8, lr: 0.01, progress: false}"
    text = f"""
        student: {{class_path: SmallCNN, init_args: {{width: 2}}}}
        teacher: {{class_path: SmallCNN, init_args: {{width: 3}}}}
        data: {{class_path: fashion_loaders, init_args: {{limit: 64, validation: 20, batch_size: 32}}}}
        training: {settings}
        teacher_training: {settings}
        """
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(line.removeprefix(" " * 8) for line in text.splitlines()))
    return file


ONE_EPOCH = ["--set", "training.epochs=1", "--set", "teacher_training.epochs=1"]


def failed(capsys, *arguments: str) -> str:
    """The one line on standard error of a command that the user got wrong."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("tutelage: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


# Help


def test_every_argument_is_explained(capsys):
    for name in ("demo", "distill", "inspect", "methods", "measure", "export"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "None" not in text
        assert max(map(len, text.splitlines())) <= 80


def test_version_and_a_missing_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tutelage {__version__}\n"
    for wrong in ([], ["distil"], ["distill"], ["export", "SmallCNN"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2


# methods


def test_methods_table_fits_a_terminal_and_names_every_method(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for method in methods():
        assert any(
            method.name in line and str(method.year) in line and method.recipe.removesuffix(".yaml") in line
            for line in text.splitlines()
        )


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == [method.name for method in methods()]
    kd = next(entry for entry in found if entry["name"] == "KD")
    assert kd["link"] == "https://arxiv.org/abs/1503.02531"
    assert kd["defaults"]["temperature"] == "4.0"
    assert main(["methods", "--section", "2", "--json"]) == 0
    assert {entry["section"].split(".")[0] for entry in json.loads(capsys.readouterr().out)} == {"2"}


def test_methods_of_a_section_that_has_none(capsys):
    assert "section='77'" in failed(capsys, "methods", "--section", "77")


# inspect


def test_inspect(capsys):
    assert main(["inspect", "SmallCNN", *SMALL, "--depth", "1", "--json"]) == 0
    found = {entry["address"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["stage2"] == {"address": "stage2", "kind": "Sequential", "shape": [1, 8, 14, 14]}
    assert not any("." in address for address in found)
    assert main(["inspect", "SmallCNN", *SMALL]) == 0
    assert "stage1.0" in capsys.readouterr().out


@pytest.mark.parametrize(("library", "name", "last"), [("timm", "resnet10t", "fc"), ("torchvision", "resnet18", "fc")])
def test_inspect_models_of_libraries(capsys, library, name, last):
    pytest.importorskip(library)
    assert main(["inspect", f"{library}:{name}", "--input", "1,3,32,32", "--depth", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1] == {"address": last, "kind": "Linear", "shape": [1, 1000]}


def test_mistakes_about_models(capsys):
    assert "'resnet20'" in failed(capsys, "inspect", "resnet21")
    assert "'foo'" in failed(capsys, "inspect", "foo:bar")
    assert "'widht'" in failed(capsys, "inspect", "SmallCNN", "--arg", "widht=3")
    assert "arg='width'" in failed(capsys, "inspect", "SmallCNN", "--arg", "width")
    for shape in ("a", "1,0", ""):
        assert f"input='{shape}'" in failed(capsys, "inspect", "SmallCNN", "--input", shape)
    assert "channels" in failed(capsys, "inspect", "resnet8", "--input", "1,1,8,8")


# measure and export


def test_measure_a_model(capsys, weights):
    assert main(["measure", "SmallCNN", *SMALL, "--weights", str(weights), "--runs", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(p.numel() for p in SmallCNN(width=4).parameters())
    assert main(["measure", "SmallCNN", *SMALL, "--runs", "2"]) == 0
    assert f"{found['parameters']:,}" in capsys.readouterr().out


def test_weights_that_do_not_fit(capsys, weights, tmp_path):
    other = ["measure", "SmallCNN", "--input", "1,1,28,28", "--weights"]
    assert "no checkpoint at" in failed(capsys, *other, str(tmp_path / "none.safetensors"))
    assert "not a checkpoint of this SmallCNN" in failed(capsys, *other, str(weights))
    for name in ("junk.safetensors", "junk.pt"):
        (tmp_path / name).write_text("hello")
        assert "not a" in failed(capsys, *other, str(tmp_path / name))


def test_export_and_measure_the_file(capsys, weights, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "student.onnx"
    assert main(["export", "SmallCNN", str(file), *SMALL, "--weights", str(weights)]) == 0
    assert str(file) in capsys.readouterr().err
    student = SmallCNN(width=4).eval()
    student.load_state_dict(load_file(weights))
    x = torch.randn(3, 1, 28, 28)
    (logits,) = ort.InferenceSession(str(file)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), student(x).detach(), atol=1e-4, rtol=1e-4)

    assert main(["measure", str(file), "--input", "1,1,28,28", "--runs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == file.stat().st_size
    assert "leave --weights" in failed(capsys, "measure", str(file), "--weights", str(weights))
    assert "student.onnx" in failed(capsys, "measure", str(file), "--input", "1,3,28,28")
    assert "no file" in failed(capsys, "measure", str(tmp_path / "none.onnx"))
    (tmp_path / "junk.onnx").write_text("hello")
    assert "junk.onnx" in failed(capsys, "measure", str(tmp_path / "junk.onnx"))


def test_export_int8(capsys, weights, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export = ["export", "SmallCNN", str(tmp_path / "s8.onnx"), *SMALL, "--weights", str(weights), "--quantize", "int8"]
    assert "needs calibration" in failed(capsys, *export)
    assert "'fashion_loaders'" in failed(capsys, *export, "--calibration", "fashion")
    assert not (tmp_path / "s8.onnx").exists()
    assert main([*export, "--calibration", "fashion_loaders"]) == 0
    import onnx

    kinds = {node.op_type for node in onnx.load(tmp_path / "s8.onnx").graph.node}
    assert "QuantizeLinear" in kinds


# distill


def test_distill_writes_a_run_and_refuses_to_replace_it(capsys, recipe, tmp_path):
    out = tmp_path / "run"
    run = ["distill", str(recipe), "--out", str(out), *ONE_EPOCH]
    assert main([*run, "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert "student" in said.out
    assert str(out / "report.html") in said.err
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "student", "teacher"]
    assert json.loads((out / "student" / "run.json").read_text())["training"]["seed"] == 3
    first = load_file(out / "student" / "student.safetensors")
    SmallCNN(width=2).load_state_dict(first)

    assert "already holds a run" in failed(capsys, *run)
    assert main([*run, "--seed", "4", "--overwrite"]) == 0
    second = load_file(out / "student" / "student.safetensors")
    assert not torch.equal(first["linear.weight"], second["linear.weight"])


def test_mistakes_about_recipes(capsys, recipe, tmp_path):
    assert "'kd'" in failed(capsys, "distill", "kdd")
    assert "--set 'x'" in failed(capsys, "distill", str(recipe), "--set", "x")
    assert "'epochs'" in failed(capsys, "distill", str(recipe), "--set", "training.epoch=1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    changes = ["--set", "teacher_training=null", *ONE_EPOCH[:2]]
    assert "holds other files" in failed(capsys, "distill", str(recipe), *changes, "--out", str(tmp_path / "full"))
    assert "give one of them" in failed(
        capsys, "distill", str(recipe), "--out", str(tmp_path / "n"), "--resume", "--overwrite"
    )
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_trust_finds_a_module_in_the_working_directory(capsys, recipe, tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text("from tutelage.models import SmallCNN\nclass Mine(SmallCNN):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    run = ["distill", str(recipe), *ONE_EPOCH, "--set", "student={class_path: my_networks.Mine}"]
    assert "--trust my_networks" in failed(capsys, *run)
    assert main([*run, "--trust", "my_networks"]) == 0


def test_debugging_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("TUTELAGE_DEBUG", "1")
    with pytest.raises(ValueError, match="kdd"):
        main(["distill", "kdd"])


# Processes


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(command("methods", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_a_mistake_is_one_line_and_status_2():
    done = subprocess.run(command("inspect", "resnet21"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def interrupted(arguments: list[str], sign: Path) -> str:
    """Run until a file appears, press Ctrl-C, and return what was said."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    while not sign.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    return said


def test_ctrl_c_in_either_training_then_resume_is_as_if_nothing_had_happened(capsys, recipe, tmp_path):
    out = tmp_path / "run"
    run = ["distill", str(recipe), "--out", str(out)]
    said = interrupted(run, out / "teacher" / "history.json")
    assert f"a checkpoint is in {out / 'teacher'}, go on with resume" in " ".join(said.split())
    assert not (out / "student").exists()
    said = interrupted([*run, "--resume"], out / "student" / "history.json")
    assert str(out / "student") in said
    assert len(json.loads((out / "teacher" / "history.json").read_text())) == 8
    assert main([*run, "--resume"]) == 0
    assert main(["distill", str(recipe), "--out", str(tmp_path / "whole")]) == 0
    for network in ("teacher", "student"):
        assert len(json.loads((out / network / "history.json").read_text())) == 8
        mine, theirs = (load_file(folder / network / "student.safetensors") for folder in (out, tmp_path / "whole"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
