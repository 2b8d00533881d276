"""No source loads a pickle, evaluates text or starts a shell, but for the places that are listed with their reasons."""

from __future__ import annotations

import ast
import contextlib
import functools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tutelage.checkpoint import RunFolder

ROOT = Path(__file__).resolve().parents[2]

# (file, function, rule): why it may
ALLOWED = {
    ("src/tutelage/building.py", "_hints", "eval"): "type hints of classes and functions that a recipe may name",
    ("src/tutelage/deploy/footprint.py", "_program_weights", "torch.export.load"): "a .pt2 file, which the user opens",
    ("src/tutelage/deploy/running.py", "_torch_export", "torch.export.load"): "a .pt2 file, which the user opens",
    ("scripts/make_figures.py", "pages", "runpy.run_path"): "a script of this repository",
}
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "pty", "ctypes"}
NEVER = {
    *("eval", "exec", "os.system", "os.popen", "tempfile.mktemp"),
    *("torch.jit.load", "torch.export.load", "torch.hub.load"),
    *("torch.hub.load_state_dict_from_url", "torch.package.PackageImporter", "torch.utils.cpp_extension.load"),
    *("torch.utils.cpp_extension.load_inline", "torch.ops.load_library", "torch.classes.load_library"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "numpy.fromregex"),
    *("pandas.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path", "builtins.eval"),
    *("tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive"),
}
# Methods, of whatever object: accelerate reads what is registered so with weights_only=False
METHODS = {"register_for_checkpointing", "extractall"}
SAFE_LOADERS = {"RecipeLoader", "SafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}


class Finder(ast.NodeVisitor):
    """Finds (function, rule, line) in one source, whatever the modules are called in it."""

    def __init__(self, tree: ast.Module):
        self.found: list[tuple[str, str, int]] = []
        self.inside, self.called = ["<module>"], {"np": "numpy"}
        self.visit(tree)

    def note(self, node: ast.AST, rule: str) -> None:
        self.found.append((self.inside[-1], rule, node.lineno))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.called[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )
            if alias.name.partition(".")[0] in MODULES:
                self.note(node, f"import {alias.name}")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.called[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        if (node.module or "").partition(".")[0] in MODULES:
            self.note(node, f"import {node.module}")

    def path(self, node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self.path(node.value)}.{node.attr}"
        return self.called.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.path(node) in NEVER:  # also where it is not called but handed on
            self.note(node, self.path(node))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if self.path(node) in NEVER:
            self.note(node, self.path(node))

    def visit_Call(self, node: ast.Call) -> None:
        path = self.path(node.func)
        given = {k.arg: k.value for k in node.keywords}

        def is_constant(name: str, value: object) -> bool:
            return isinstance(given.get(name), ast.Constant) and given[name].value is value

        if path == "torch.load" and not is_constant("weights_only", True):
            self.note(node, "torch.load without weights_only=True")
        if path == "numpy.load" and not is_constant("allow_pickle", False):
            self.note(node, "numpy.load without allow_pickle=False")
        if path == "yaml.load":
            loaders = [*node.args[1:], *([given["Loader"]] if "Loader" in given else [])]
            if not any((self.path(one).rpartition(".")[2] if one else "") in SAFE_LOADERS for one in loaders):
                self.note(node, "yaml.load with another loader")
        if "shell" in given and not is_constant("shell", False):
            self.note(node, "shell=")
        for name in ("allow_pickle", "trust_remote_code", "weights_only"):
            bad = name != "weights_only"
            if is_constant(name, bad):
                self.note(node, f"{name}={bad}")
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            self.note(node, node.func.attr)
        self.generic_visit(node)


def found_in(source: str) -> list[tuple[str, str, int]]:
    return Finder(ast.parse(source)).found


@functools.cache
def findings() -> dict[tuple[str, str, str], int]:
    files = [file for part in ("src", "scripts", "benchmarks") for file in sorted((ROOT / part).rglob("*.py"))]
    assert len(files) > 150
    return {
        (str(file.relative_to(ROOT)), function, rule): line
        for file in files
        for function, rule, line in found_in(file.read_text(encoding="utf-8"))
    }


def test_no_source_loads_a_pickle_or_runs_text():
    wrong = [f"{file}:{line} {function}: {rule}" for (file, function, rule), line in findings().items()
             if (file, function, rule) not in ALLOWED]  # fmt: skip
    assert wrong == []


def test_the_exceptions_are_still_there():
    assert ALLOWED.keys() - findings().keys() == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "def f():\n    import dill",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import torch\ntorch.load('a', weights_only=flag)",
        "from torch import load\nload('a')",
        "import torch as t\nt.load('a', 'cpu')",
        "import torch\nx = torch.hub.load",
        "import numpy as np\nnp.load('a')",
        "import numpy\nnumpy.load('a', allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text, Loader=yaml.UnsafeLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "import subprocess\nsubprocess.run('a', shell=True)",
        "import os\nos.system('a')",
        "from os import system as s\ns('a')",
        "eval('1')",
        "map(exec, lines)",
        "import tempfile\ntempfile.mktemp()",
        "archive.extractall('x')",
        "accelerator.register_for_checkpointing(x)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
    ],
)
def test_the_finder_finds(source):
    assert len(found_in(source)) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a', map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load('a', allow_pickle=False)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from m import RecipeLoader\nimport yaml\nyaml.load(text, RecipeLoader)",
        "import subprocess\nsubprocess.run(['a'])",
        "model.eval()\nself.load('a')",
        "import json\njson.load(f)",
    ],
)
def test_the_finder_leaves_the_rest_alone(source):
    assert found_in(source) == []


# What is read back


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_no_file_of_a_checkpoint_is_unpickled(tmp_path):
    """What accelerate reads back of it, and our own file."""
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    folder = RunFolder(tmp_path / "run", {"student": "a", "losses": []}, False, False, accelerator)
    folder.save(accelerator, 1, {"epoch": 1})
    (checkpoint,) = folder.checkpoints()
    files = [f for f in checkpoint.iterdir() if f.suffix in (".bin", ".pkl", ".pt")]
    assert {f.suffix for f in files} == {".bin", ".pkl", ".pt"}
    mark = tmp_path / "unpickled"
    for file in files:
        torch.save(Evil(mark), file)
        with contextlib.suppress(Exception):
            accelerator.load_state(str(checkpoint))
        with pytest.raises(ValueError, match="resume"):
            folder.load(accelerator)
        assert not mark.exists(), file
    folder.close()
    torch.load(files[0], weights_only=False)  # which would have left it
    assert mark.exists()
