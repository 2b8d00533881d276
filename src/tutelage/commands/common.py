"""What several commands need: models and inputs from words, figures for people."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any


def network_of(model: str, arguments: list[str] | None, weights: str | None = None) -> Any:
    """A model by name, with ``name=value`` arguments and weights from a file.

    The word may hold both itself, as in ``SmallCNN(width=8)@student.safetensors``; its own arguments come first.
    """
    from tutelage.models import create, load_weights

    name, own, file = parts_of(model)
    if file and weights:
        raise ValueError(f"{model}: its weights are {file} already; leave --weights {weights} out")
    given = {**values_of(arguments or ()), **values_of(own)}
    if ":" in name:
        sys.path.append(os.getcwd())  # for package.module:function, where an installed command does not look
    network = create(name, **given)
    if file or weights:
        load_weights(network, file or weights or "")
    return network


def parts_of(model: str) -> tuple[str, list[str], str | None]:
    """Name, arguments and weights of ``NAME(argument=value, ...)@FILE``."""
    if os.path.isdir(model.removeprefix("transformers:")):  # a folder may be called anything
        return model, [], None
    found = re.fullmatch(r"(?P<name>[^(@]+)(?:\((?P<arguments>.*)\))?(?:@(?P<file>.+))?", model)
    if not found:
        raise ValueError(
            f"model {model!r}: expected a name, with arguments and weights if need be, such as SmallCNN(width=8)@FILE"
        )
    # A comma may be part of a value: only one before another name ends an argument.
    arguments = re.split(r",(?=\s*\w+\s*=)", found["arguments"] or "")
    return found["name"], [a.strip() for a in arguments if a.strip()], found["file"]


def values_of(arguments: Iterable[str]) -> dict[str, Any]:
    import yaml

    given = {}
    for argument in arguments:
        name, mark, text = argument.partition("=")
        name = name.strip()
        if not mark or not name.isidentifier():
            raise ValueError(f"arg={argument!r}: expected name=value, such as width=8")
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            given[name] = text
    return given


def example(text: str) -> Any:
    """An input of the given shape: token ids where it has two numbers."""
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


LOADERS = ("cifar10_loaders", "cifar100_loaders", "fashion_loaders")


def loaders_of(name: str, field: str, root: str | None, **options: Any) -> Any:
    """Loaders by their name; ``options`` are those that all of them have."""
    from tutelage import data
    from tutelage.errors import nearest

    if name not in LOADERS:
        raise ValueError(f"{field}={name!r}: expected one of {', '.join(LOADERS)}{nearest(name, LOADERS)}")
    if name == "fashion_loaders":
        return data.fashion_loaders(**options)
    return getattr(data, name)(root, **options)


def shown(value: Any) -> str:
    """A figure for people."""
    if value is None:
        return "not known"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def print_json(value: Any) -> None:
    """Indented JSON on standard output."""
    print(json.dumps(value, indent=1))
