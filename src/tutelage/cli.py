"""The command line: ``tutelage demo | distill | inspect | methods | measure | export``."""

from __future__ import annotations

import argparse
import inspect as inspect_module
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import docstring_parser
from rich.console import Console
from rich.table import Table

from tutelage.console import say


def demo(out: str = "demo", seeds: int = 3, keep: bool = False) -> None:
    """A real distillation on the packaged images: a table, report.html and student.onnx, in under two minutes.

    Args:
        out: Folder for everything that is written.
        seeds: How often student and control are trained, each time from other initial weights.
        keep: Refuse to replace an earlier demo in that folder.
    """
    from tutelage.demo import run_demo

    run_demo(out=out, seeds=seeds, overwrite=not keep)


def distill(
    recipe: str,
    set: list[str] | None = None,
    trust: list[str] | None = None,
    out: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Distil as a recipe says: a YAML file, or the name of a packaged one such as kd.

    Args:
        recipe: File, or name of a packaged recipe (`tutelage methods` lists them).
        set: A change to the recipe, such as training.epochs=3 or losses[1].init_args.weight=0.5.
        trust: Further package or module whose classes and functions the recipe may name, such as one of your own.
        out: Folder of the run: weights, history, checkpoints and report.html.
        seed: Instead of the recipe's.
        resume: Go on with the run in the folder.
        overwrite: Replace the run in the folder.
    """
    from pathlib import Path

    from tutelage.recipe import load

    changes = list(set or [])
    changes += [f"out={json.dumps(out)}"] if out is not None else []
    changes += [f"seed={seed}"] if seed is not None else []
    changes += ["resume=true"] if resume else []
    changes += ["overwrite=true"] if overwrite else []
    if trust:
        sys.path.append(os.getcwd())  # where a module of one's own is, and where an installed command does not look
    run = load(recipe, changes, trust or ())
    result = run()
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes, the first one reports
    report = result.report()
    folder = run.keywords.get("out")
    if report.rows:
        Console().print(report.table())
        if folder:
            report.html(Path(folder) / "report.html")
    if result.out:
        page = f"   page: {Path(folder) / 'report.html'}" if folder and report.rows else ""
        say(f"student: {result.out / 'student.safetensors'}{page}")


def inspect(
    model: str,
    arg: list[str] | None = None,
    input: str = "1,3,224,224",
    depth: int | None = None,
    json: bool = False,
) -> None:
    """List what can be tapped in a model: address, kind and shape of every tensor a loss may read.

    Args:
        model: resnet20, SmallCNN, timm:resnet18, torchvision:resnet18, transformers:FOLDER or package.module:function.
        arg: An argument of the model, such as width=8; repeat it for several.
        input: Shape of an input, or of token ids where it has two numbers (2,16).
        depth: Show only addresses with at most so many parts.
        json: Print JSON.
    """
    from tutelage.taps import tappable
    from tutelage.views import Inputs

    network = _create(model, arg).eval()
    lines = tappable(network, Inputs((_example(input),)))
    lines = [line for line in lines if depth is None or line.address.count(".") < depth]
    if json:
        _print_json([{"address": t.address, "kind": t.kind, "shape": list(t.shape)} for t in lines])
        return
    table = Table("address", "module", "shape", title=f"{model}: what a loss may read")
    for line in lines:
        table.add_row(line.address, line.kind, " × ".join(map(str, line.shape)))
    Console().print(table)
    Console().print("Inputs of a module: address:input; the model's logits: @logits", highlight=False)


def methods(section: str | None = None, json: bool = False) -> None:
    """List every method with its survey section, role, year and packaged recipe; with --json also its paper.

    Args:
        section: Only those of a section, such as 2.3, or of a chapter, such as 2.
        json: Print JSON: also paper, link, summary and default arguments.
    """
    from tutelage.catalogue import methods as catalogued

    found = [m for m in catalogued() if section is None or f"{m.section}.".startswith(f"{section}.")]
    if not found:
        sections = sorted({m.section for m in catalogued()})
        raise ValueError(f"section={section!r}: no methods there; sections with methods: {', '.join(sections)}")
    if json:
        _print_json(
            [
                {
                    "name": m.name,
                    "section": m.section,
                    "role": m.role,
                    "paper": m.paper,
                    "year": m.year,
                    "link": m.link,
                    "summary": m.summary,
                    "recipe": m.recipe,
                    "defaults": {k: repr(v) for k, v in m.defaults.items()},
                }
                for m in found
            ]
        )
        return
    table = Table("method", "section", "role", "year", "recipe", title="Methods (sections of arXiv 2006.05525)")
    for m in found:
        table.add_row(m.name, m.section, m.role, str(m.year), m.recipe.removesuffix(".yaml"))
    Console().print(table)


def measure(
    model: str,
    arg: list[str] | None = None,
    input: str = "1,3,224,224",
    weights: str | None = None,
    runs: int = 100,
    json: bool = False,
) -> None:
    """Measure a model or an ONNX file: parameters, size, MACs, latency, memory.

    Args:
        model: resnet20, SmallCNN, timm:resnet18, torchvision:resnet18, transformers:FOLDER or package.module:function;
            or a file that ends in .onnx.
        arg: An argument of the model, such as width=8; repeat it for several.
        input: Shape of an input, or of token ids where it has two numbers (2,16).
        weights: File of weights to load (safetensors or a plain state dict).
        runs: Forward passes to time.
        json: Print JSON.
    """
    from dataclasses import asdict

    from tutelage.deploy import measure as measure_model
    from tutelage.deploy import measure_onnx

    example = _example(input)
    if model.endswith(".onnx"):
        if weights or arg:
            raise ValueError(f"{model}: an ONNX file has its weights and arguments; leave --weights and --arg out")
        if not os.path.isfile(model):
            raise FileNotFoundError(f"no file {model}")
        try:
            found = measure_onnx(model, example, runs=runs)
        except Exception as error:  # onnxruntime's have no base of their own
            raise ValueError(f"{model}: {error}") from error
    else:
        found = measure_model(_create(model, arg, weights), example, runs=runs)
    if json:
        _print_json(asdict(found))
        return
    table = Table("figure", "value", title=model)
    for name, value in asdict(found).items():
        table.add_row(name, _shown(value))
    Console().print(table)


def export(
    model: str,
    file: str,
    arg: list[str] | None = None,
    weights: str | None = None,
    input: str = "1,3,224,224",
    quantize: Literal["int8"] | None = None,
    calibration: str | None = None,
) -> None:
    """Write a model as an ONNX file whose outputs are checked against PyTorch.

    Args:
        model: resnet20, SmallCNN, timm:resnet18, torchvision:resnet18, transformers:FOLDER or package.module:function.
        file: Where to write, such as student.onnx.
        arg: An argument of the model, such as width=8; repeat it for several.
        weights: File of weights to load (safetensors or a plain state dict), such as a run's student.safetensors.
        input: Shape of an input, or of token ids where it has two numbers (2,16).
        quantize: Weights and activations in 8 bits, with ranges from calibration data.
        calibration: For int8, where the data come from: fashion_loaders, or another such function of tutelage.data.
    """
    from itertools import islice

    from tutelage import data
    from tutelage.deploy import export_onnx
    from tutelage.errors import nearest
    from tutelage.views import read_batch

    batches = None
    if calibration:
        names = ["cifar10_loaders", "cifar100_loaders", "fashion_loaders"]
        if calibration not in names:
            raise ValueError(
                f"calibration={calibration!r}: expected one of {', '.join(names)}{nearest(calibration, names)}"
            )
        loaders = getattr(data, calibration)()
        batches = [read_batch(raw).student.args[0] for raw in islice(loaders.train, 4)]
    done = export_onnx(_create(model, arg, weights), _example(input), file, quantize=quantize, calibration=batches)
    say(
        f"{done.path}: {done.size_bytes / 1000:,.1f} kB, largest difference from PyTorch {done.max_abs_error:.2g}, "
        f"same first choice {done.agreement:.1%}"
    )


def _create(model: str, arguments: list[str] | None, weights: str | None = None) -> Any:
    import yaml

    from tutelage.models import create, load_weights

    given = {}
    for argument in arguments or ():
        name, mark, text = argument.partition("=")
        if not mark or not name.isidentifier():
            raise ValueError(f"arg={argument!r}: expected name=value, such as width=8")
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            given[name] = text
    if ":" in model:
        sys.path.append(os.getcwd())  # for package.module:function, where an installed command does not look
    network = create(model, **given)
    if weights:
        load_weights(network, weights)
    return network


def _example(text: str) -> Any:
    import torch

    try:
        shape = [int(n) for n in text.replace("x", ",").split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise ValueError(f"input={text!r}: expected whole numbers, 1 or more, such as 1,3,224,224")
    if len(shape) == 2:
        return torch.ones(shape, dtype=torch.long)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _shown(value: Any) -> str:
    if value is None:
        return "not known"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; the functions above are its commands, and their docstrings its help."""
    top = argparse.ArgumentParser(
        prog="tutelage",
        description="Knowledge distillation for PyTorch: train a small student of a large teacher, and deploy it.",
        epilog="Start with `tutelage demo`. `tutelage COMMAND --help` explains a command.",
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(function: Callable[..., None]) -> Callable[..., None]:
        described = docstring_parser.parse(inspect_module.getdoc(function) or "")
        summary = described.short_description
        summary = described.short_description
        sub = commands.add_parser(function.__name__, help=summary, description=summary)
        sub.set_defaults(function=function)
        helps = {p.arg_name: p.description for p in described.params}

        def argument(flag: str, **options: Any) -> None:
            default = f" Default: {options['default']}." if "default" in options else ""
            sub.add_argument(flag, help=f"{helps[flag.lstrip('-')]}{default}", **options)

        return argument

    add = command(demo)
    add("--out", default="demo", metavar="FOLDER")
    add("--seeds", type=int, default=3, metavar="N")
    add("--keep", action="store_true")

    add = command(distill)
    add("recipe")
    add("--set", action="append", metavar="FIELD=VALUE")
    add("--trust", action="append", metavar="PACKAGE")
    add("--out", metavar="FOLDER")
    add("--seed", type=int, metavar="N")
    add("--resume", action="store_true")
    add("--overwrite", action="store_true")

    add = command(inspect)
    add("model")
    add("--arg", action="append", metavar="NAME=VALUE")
    add("--input", default="1,3,224,224", metavar="SHAPE")
    add("--depth", type=int, metavar="N")
    add("--json", action="store_true")

    add = command(methods)
    add("--section", metavar="N")
    add("--json", action="store_true")

    add = command(measure)
    add("model")
    add("--arg", action="append", metavar="NAME=VALUE")
    add("--input", default="1,3,224,224", metavar="SHAPE")
    add("--weights", metavar="FILE")
    add("--runs", type=int, default=100, metavar="N")
    add("--json", action="store_true")

    add = command(export)
    add("model")
    add("file")
    add("--arg", action="append", metavar="NAME=VALUE")
    add("--weights", metavar="FILE")
    add("--input", default="1,3,224,224", metavar="SHAPE")
    add("--quantize", choices=["int8"])
    add("--calibration", metavar="LOADERS")
    return top


def _version() -> str:
    from tutelage import __version__

    return f"tutelage {__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; mistakes of the user become one line on standard error and exit status 2.

    With ``TUTELAGE_DEBUG=1`` in the environment they keep their traceback.
    """
    given = vars(parser().parse_args(arguments))
    function = given.pop("function")
    try:
        function(**given)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        say(str(stop) or "stopped")
        return 130
    except (BrokenPipeError, SystemExit):  # which rich makes of it
        # the reader of our output went away (`| head`): not an error, and nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("TUTELAGE_DEBUG"):
            raise
        say(f"tutelage: {' '.join(str(error).split())}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
