"""Clear words for bad input: the nearest right name, and which extra a missing package belongs to."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """A clause naming the choices most like ``name``, to end an error message with.

    >>> nearest("layr2", ["layer1", "layer2", "fc"], count=1)
    "; nearest: 'layer2'"
    >>> nearest("zzz", [])
    ''
    """
    choices = list(choices)
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), list(lower), n=count, cutoff=0.4)
    found = [lower[c] for c in close] or sorted(choices)[:count]
    return "; nearest: " + ", ".join(repr(f) for f in found) if found else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra of tutelage brings it.

    >>> require("json", extra="export").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {module!r}, which is not installed: pip install 'tutelage[{extra}]'"
        ) from error
