"""What test_fuzz_recipes.py makes recipes of: names out of reach, values that do not fit, files that explode."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

CANARY = "canary_package"
# Installed or part of Python, and named by no packaged recipe; antigravity opens a browser.
FOREIGN = (CANARY, "antigravity", "this", "antlr4", "ray", "ruamel", "lightning", "sklearn", "tkinter", "ensurepip")


def node(path: Any, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


WEIGHTS = "torchvision.models.resnet.Weights"
HOSTILE = [
    *("os.system", "posix.system", "subprocess.Popen", "subprocess.check_output", "builtins.eval", "builtins.exec"),
    *(
        "builtins.__import__",
        "importlib.import_module",
        "runpy.run_path",
        "pickle.loads",
        "pickle.load",
        "marshal.loads",
    ),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.export.load", "torch.ops.load_library"),
    *("torch.package.PackageImporter", "torch.utils.cpp_extension.load_inline", "torch.classes.load_library"),
    *(
        "numpy.load",
        "numpy.fromfile",
        "yaml.unsafe_load",
        "joblib.load",
        "shutil.rmtree",
        "ctypes.CDLL",
        "webbrowser.open",
    ),
    *(
        "torch.nn.modules.module.os.system",
        "torch.nn.functional.importlib.import_module",
        "torch.optim.optimizer.torch.load",
    ),
    *(
        "torch.nn.modules.module.torch.hub.load",
        "torch.os.system",
        "torch.nn.np.load",
        "torch.serialization.pickle.loads",
    ),
    *(
        "torchvision.models._api.load_state_dict_from_url",
        f"{WEIGHTS}Enum.get_state_dict",
        "torch.nn.Module.load_state_dict",
    ),
    *("torchvision.models.ResNet18_Weights.DEFAULT.get_state_dict", "torchvision.transforms.transforms.torch.hub.load"),
    *("tutelage.cli.main", "tutelage.recipe.load", "tutelage.recipe.distil_recipe", "tutelage.building.Builder"),
    *("tutelage.trusted.named_object", "tutelage.errors.require", "tutelage.models.loading._called"),
    *("tutelage.models.loading.importlib.import_module", "tutelage.files.replacing", "tutelage.comparison.pool.run"),
    *("tutelage.deploy.running.open_model", "tutelage.data.packed.zipfile.ZipFile", "tutelage.data.datasets.require"),
    *(
        "torch.nn.Module.__init__.__globals__",
        "torch.nn.Linear.__class__.__base__.__subclasses__",
        "torch.nn.__loader__",
    ),
    *("torch.nn.Linear.__reduce__", "__import__", "__builtins__.eval", "torch.nn.Linear.forward.__code__"),
    *(f"{root}.Thing" for root in FOREIGN),
    *(f"{CANARY}.inner.Thing", f"{CANARY}.make", f"torch.nn.{CANARY}", f"tutelage.{CANARY}.Thing", f"{CANARY}"),
    *(
        f"__import__('{CANARY}')",
        f"{CANARY}:make",
        f"torch.nn.Linear; import {CANARY}",
        f"../{CANARY}",
        f"{CANARY}.\u0000",
    ),
    *(
        "os .system",
        "os..system",
        ".os.system",
        "os.system.",
        "ｏｓ.system",
        "os\u200b.system",
        "оs.system",
        "",
        ".",
        "𝔬𝔰.system",
    ),
]
PAYLOADS = [
    *(node(path) for path in HOSTILE),
    *(
        node(path, command=f"import {CANARY}")
        for path in ("os.system", "builtins.exec", "torch.nn.modules.module.os.system")
    ),
    node("create", spec=f"{CANARY}:make"),
    node("create", spec=f"transformers:{CANARY}", trust_remote_code=True),
    node("create", spec=f"transformers:{CANARY}", weights_only=False),
    node("create", spec=f"transformers:{CANARY}", attn_implementation=f"{CANARY}/kernel"),
    node("create", spec=f"transformers:{CANARY}", use_kernels=True),
    node("create", spec="timm:resnet10t", checkpoint_path="evil.pth"),
    node("create", spec="timm:resnet10t", pretrained_cfg={"file": "evil.pth"}),
    node("create", spec="timm:hf-hub:evil/model"),
    node("tutelage.models.loading.create", spec=f"{CANARY}:make"),
    node("huggingface", source="pandas", data_files="evil.pkl"),
    node("dataset_loaders", train=node("torchvision_dataset", name="LSUN", root=".")),
    node(
        "born_again",
        generations=2,
        fresh=node(f"{WEIGHTS}Enum.get_state_dict", self=node(WEIGHTS, url="file:evil.pth")),
    ),
    node("SmallCNN", width=node(f"{CANARY}.Thing")),
    node("SmallCNN", width=json.dumps(node(f"{CANARY}.Thing"))),
    json.dumps(node(f"{CANARY}.Thing")),
    f"!!python/object/apply:{CANARY}.make []",
    {"class_path": "SmallCNN", "init_args": {}, "trust": [CANARY]},
    {"class_path": ["os", "system"]},
    {"class_path": {"class_path": "os.system"}},
    {"init_args": {"class_path": f"{CANARY}.Thing"}},
    {"class_path": "SmallCNN", "init_args": [f"{CANARY}.Thing"]},
    {"class_path": "SmallCNN", "init_args": {"__class__": f"{CANARY}.Thing"}},
    {"class_path": "torch.nn.Sequential", "init_args": {"args": [node(f"{CANARY}.Thing")]}},
    {"class_path": "torchvision.transforms.Lambda", "init_args": {"lambd": "builtins.eval"}},
    {"class_path": "functools.partial", "init_args": {"func": "os.system"}},
]
VALUES = [
    *(None, True, False, 0, -1, 2**31, 2**63, 10**40, 1e308, -0.0, float("nan"), float("inf"), "", " ", "kd", "true"),
    *("x" * 3000, "0x10", "1e3", "\u202eabc", "🎓", "\x07\x1b[31mred", "é" * 40, "a.b.c", "@logits", ":input", "*"),
    *(
        [],
        {},
        [[]],
        [None],
        [[[[[[[1]]]]]]],
        {"a": {"b": {"c": {}}}},
        {1: 2},
        {None: 1},
        {True: 0},
        b"\x80\x04.",
        [1, "a", None],
    ),
    *("tutelage.KD", "KD", "SmallCNN", "TaskLoss", "torch.nn.ReLU", "torch.nn.Identity", "fashion_loaders", "${HOME}"),
]
TOKENS = [
    *("&a ", "*a ", "<<: *a", "!!python/object:os.system ", "!!python/name:os.system ", "!!python/module:os ", "!tag "),
    *(
        "!!bool ",
        "!!int ",
        "!!float ",
        "!!timestamp ",
        "!!binary ",
        "!!set ",
        "!!omap ",
        "!!null ",
        "? ",
        "- ",
        ": ",
        "{",
    ),
    *(
        "}",
        "[",
        "]",
        ",",
        "#",
        "|",
        ">",
        "'",
        '"',
        "%YAML 9.9\n",
        "---\n",
        "...\n",
        "\t",
        "\x00",
        "\x1b[31m",
        "\ufeff",
        "\u2028",
    ),
    *(
        "\x85",
        "😀",
        "`",
        "@",
        "\\ud800",
        "0" * 5000,
        "9" * 5000,
        "0x" + "f" * 9000,
        "1:" * 50,
        "{" * 300,
        "[" * 3000,
        "- " * 900,
    ),
]


CONTROL = {"student": node(f"{CANARY}.Thing"), "data": node("fashion_loaders")}


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that stand for more than a machine has, or for nothing at all."""
    names = "abcdefghijkl"
    laughs = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    laughs += [f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]" for m, n in itertools.pairwise(names)]
    merged = ["a: &a {" + ", ".join(f"k{i}: 1" for i in range(9)) + "}"]
    merged += [f"{n}: &{n} {{<<: [{', '.join([f'*{m}'] * 9)}]}}" for m, n in itertools.pairwise(names)]
    keyed = [
        "? &a [x, y]\n: 1",
        *(f"? &{n} [{', '.join([f'*{m}'] * 9)}]\n: 1" for m, n in itertools.pairwise(names)),
    ]
    for field in ("losses", "student", "training", "stages", "procedure"):
        yield f"laughs in {field}", "\n".join([*laughs, f"{field}: *l", "data: fashion_loaders"]).encode()
    yield "laughs that are no field", "\n".join(laughs).encode()
    yield "merged laughs", "\n".join(merged).encode()
    yield "laughs as keys", "\n".join(keyed).encode()
    yield "a list in itself", b"student: &a [*a]\ndata: *a"
    yield "a mapping in itself", b"&a {student: *a, data: *a}"
    yield "a key in itself", b"&a {*a : 1}"
    yield "merged with itself", b"student: &a {<<: *a}\ndata: 1"
    yield "deep list", b"student: " + b"[" * 5_000
    yield "deep list, closed", b"student: " + b"[" * 400 + b"]" * 400
    yield "deep mapping", b"student: " + b"{a: " * 5_000
    yield "deep by indentation", b"".join(b" " * n + b"a:\n" for n in range(600))
    chain = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000)), "student: *a1999"]
    yield "deep by aliases", "\n".join(chain).encode()
    yield "many fields", b"\n".join(b"a%d: 1" % n for n in range(12_000))
    yield "larger than any recipe", b"# " + b"x" * 2**21
    yield "long line", b"student: " + b"x" * 900_000
    yield "whole number of 8,000 digits", b"seed: " + b"9" * 8000
    yield "whole number of 8,000 hexadecimal digits", b"seed: 0x" + b"f" * 8000
    yield "number of base 60", b"seed: " + b"9:" * 4000 + b"9"
    for tag, text in (
        ("bool", "x"),
        ("int", "''"),
        ("int", "x"),
        ("float", "''"),
        ("timestamp", "x"),
        ("binary", "é"),
        ("set", "x"),
    ):
        yield f"wrong {tag} {text}", f"student: !!{tag} {text}".encode()
    for tag in (
        "object:os.system",
        "object/apply:os.system ['true']",
        "object/new:os.system",
        "name:os.system",
        "module:os",
    ):
        yield f"tag {tag}", f"student: !!python/{tag}\ndata: 1".encode()
    yield "tag of the canary", f"student: !!python/object/apply:{CANARY}.make []".encode()
    yield "empty", b""
    yield "blank", b"  \n\n"
    yield "null", b"~"
    yield "text", b"kd"
    yield "list", b"- kd"
    yield "two documents", b"student: a\n---\nstudent: b"
    yield "NUL bytes", b"student: \x00SmallCNN\n\x00"
    yield "binary", bytes(range(256)) * 20
    yield "pickle", b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    yield "UTF-16", "student: SmallCNN".encode("utf-16")
    yield "UTF-32", "student: SmallCNN".encode("utf-32")
    yield "Latin-1", "student: Übung".encode("latin-1")
    yield "lone surrogate", b'student: "\\ud800"\ndata: "\\udfff"'
    yield "escape sequences", b'"\\e[31mstudent\\x07": 1'
    yield "trust in the recipe", f"trust: [{CANARY}]\nstudent: {CANARY}.Thing\ndata: fashion_loaders".encode()
    yield "trust in the arguments", f"student: {{class_path: {CANARY}.Thing, trust: [{CANARY}]}}\ndata: 1".encode()
