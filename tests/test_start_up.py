"""`import tutelage` costs next to nothing, and all that it exports is there when it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tutelage
from tutelage.cli import main
from tutelage.codecs import NAMES


def test_importing_the_library_imports_neither_torch_nor_anything_heavy():
    code = "import sys, tutelage; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "accelerate", "rich", "yaml"} & set(done.stdout.split())


def test_losses_do_not_import_what_only_extras_need():
    code = "import sys; from tutelage import *; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "torchvision",
        "timm",
        "transformers",
        "datasets",
        "onnx",
        "onnxruntime",
        "torchao",
        "matplotlib",
        "optuna",
    }
    assert "torch" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


def test_every_exported_name_is_there_and_type_checkers_see_the_same():
    for name in tutelage.__all__:
        assert getattr(tutelage, name) is not None
        assert name in dir(tutelage)
    stub = ast.parse(Path(tutelage.__file__).with_suffix(".pyi").read_text())
    stated = next(n.value for n in stub.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert sorted(ast.literal_eval(stated)) == sorted(tutelage.__all__)


@pytest.mark.parametrize("asked", ["--version", "--help", "cache --help"])
def test_the_command_line_explains_itself_without_torch(asked):
    code = f"import sys, tutelage.cli as c\ntry: c.main({asked.split()!r})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False")


def test_the_codecs_of_the_command_line_are_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert f"--codec {{{','.join(NAMES)}}}" in capsys.readouterr().out


def test_modules_are_there_without_an_import_of_their_own():
    code = "import tutelage as tl; print(tl.views.read_batch.__name__, tl.engine.fit.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["read_batch", "fit"]


def test_a_wrong_name_is_answered_with_the_nearest_right_one():
    with pytest.raises(AttributeError, match=r"module 'tutelage' has no 'FitNet'; nearest: 'FitNets'"):
        _ = tutelage.FitNet
    assert not hasattr(tutelage, "_private")
