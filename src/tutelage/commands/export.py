"""``tutelage export``."""

from __future__ import annotations

from typing import Any, Literal

from tutelage.commands import Add
from tutelage.commands.common import example, loaders_of, network_of, print_json
from tutelage.console import say

_NAMES = {"onnx": "ONNX", "torch.export": "torch.export", "executorch": "ExecuTorch", "openvino": "OpenVINO"}
_RANDOM = 64


def export(
    model: str,
    file: str,
    arg: list[str] | None = None,
    weights: str | None = None,
    input: str | None = None,
    data: str | None = None,
    root: str | None = None,
    samples: int = 500,
    quantize: Literal["int8"] | None = None,
    calibration: str | None = None,
    opset: int | None = None,
    fixed_batch: bool = False,
    max_batch: int | None = None,
    json: bool = False,
) -> None:
    """Write a model as a file whose outputs are checked against PyTorch: .onnx, .pt2, .pte or .xml.

    Args:
        model: resnet20, SmallCNN, timm:resnet18, torchvision:resnet18, transformers:FOLDER or package.module:function.
        file: Where to write; the ending chooses the format: student.onnx, student.pt2 (torch.export), student.pte
            (ExecuTorch) or student.xml (OpenVINO).
        arg: An argument of the model, such as width=8; repeat it for several.
        weights: File of weights to load (safetensors or a plain state dict), such as a run's student.safetensors.
        input: Shape of an input, or of token ids where it has two numbers (2,16); one of the data's if they are given,
            else 1,3,224,224.
        data: Real inputs to compare the file with PyTorch on, from the validation data of fashion_loaders,
            cifar10_loaders or cifar100_loaders; random ones if not given.
        root: Folder of these data (not of fashion_loaders, which are packaged).
        samples: How many of them.
        quantize: Weights and activations in 8 bits, with ranges from calibration data.
        calibration: For int8, whose training data give the ranges: fashion_loaders, ...; those of --data if not given.
        opset: ONNX operator set, 18 if not given; for .onnx only.
        fixed_batch: The file takes as many samples as the input has, and no other number.
        max_batch: Most samples in a call of a .pte file, 64 if not given.
        json: Print JSON.
    """
    from dataclasses import asdict, replace
    from itertools import islice

    from tutelage.deploy import export as export_file
    from tutelage.deploy.formats import format_of

    format_of(file)  # a wrong name is said before anything is built
    source = calibration or (data if quantize else None)
    loaders = {name: loaders_of(name, field, root) for field, name in (("data", data), ("calibration", source)) if name}
    batches = [_inputs(raw) for raw in islice(loaders[source].train, 4)] if source else None
    if data:
        judged = [_inputs(raw) for raw in loaders[data].validation]
        sample = example(input) if input else judged[0][:2]
    else:
        sample = example(input or "1,3,224,224")
        judged = [_random(sample)]
    done = export_file(
        network_of(model, arg, weights),
        sample,
        file,
        quantize=quantize,
        calibration=batches,
        data=judged,
        samples=samples,
        opset=opset,
        dynamic_batch=not fixed_batch,
        max_batch=max_batch,
    )
    done = replace(done, data=data or "random")
    if json:
        print_json({**asdict(done), "path": str(done.path)})
        return
    kind = _NAMES[done.format] + (f" opset {done.opset}" if done.opset else "") + (", int8" if done.quantized else "")
    inputs = f"validation inputs of {data}" if data else "random inputs (--data compares on real ones)"
    say(
        f"{done.path}: {kind}, {done.size_bytes / 1000:,.1f} kB; on {done.samples} {inputs}: "
        f"largest difference from PyTorch {done.max_abs_error:.2g}, same first choice {done.agreement:.1%}"
    )


def _inputs(batch: Any) -> Any:
    from tutelage.views import read_batch

    return read_batch(batch).student.args[0]


def _random(sample: Any) -> Any:
    """More inputs in the form of a sample; token ids are 0 and 1, which every vocabulary has."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (_RANDOM, *sample.shape[1:])
    if sample.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 2, shape, generator=generator)


def arguments(add: Add) -> None:
    """The command line's grammar of :func:`export`."""
    add("model")
    add("file")
    add("--arg", action="append", metavar="NAME=VALUE")
    add("--weights", metavar="FILE")
    add("--input", metavar="SHAPE")
    add("--data", metavar="LOADERS")
    add("--root", metavar="FOLDER")
    add("--samples", type=int, default=500, metavar="N")
    add("--quantize", choices=["int8"])
    add("--calibration", metavar="LOADERS")
    add("--opset", type=int, metavar="N")
    add("--fixed-batch", action="store_true")
    add("--max-batch", type=int, metavar="N")
    add("--json", action="store_true")
