"""Finished steps on disk, so that whatever was interrupted goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.checked import read_json, write_json

_DEEPEST = 6
_BYTE = torch.uint8


def key_of(depends: Any) -> str:
    """A hash of plain values.

    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1})
    True
    """
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()


def network_key(model: nn.Module) -> str:
    """A hash of a network's structure and of all its weights and buffers.

    >>> layer = nn.Linear(2, 1)
    >>> before = network_key(layer)
    >>> nn.init.zeros_(layer.bias) is layer.bias, network_key(layer) == before
    (True, False)
    """
    found = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # As bytes, since NumPy has no bfloat16; a scalar cannot be seen as bytes before it has a dimension.
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(_BYTE).numpy().tobytes())
    return found.hexdigest()


def file_key(path: Path) -> str:
    """A hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(thing: Any, depth: int = 0) -> Any:
    """An object as plain values: its class, and its public attributes as far as they are plain themselves.

    >>> from tutelage import KD
    >>> found = described(KD(temperature=2.0))
    >>> found["class"], found["temperature"]
    ('tutelage.knowledge.response.kd.KD', 2.0)
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if depth > _DEEPEST:
        return type(thing).__name__
    if isinstance(thing, Mapping):
        return {str(k): described(v, depth + 1) for k, v in thing.items()}
    if isinstance(thing, list | tuple | set | frozenset):
        return [described(v, depth + 1) for v in thing]
    if isinstance(thing, Tensor):
        return key_of([str(thing.dtype), thing.tolist()])
    if isinstance(thing, functools.partial):
        return [described(part, depth + 1) for part in (thing.func, thing.args, thing.keywords)]
    if callable(thing) and hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    kind = type(thing)
    values: dict[str, Any] = vars(thing) if hasattr(thing, "__dict__") else {}
    public = {k: described(v, depth + 1) for k, v in values.items() if not k.startswith("_")}
    modules = {k: described(v, depth + 1) for k, v in thing.named_children()} if isinstance(thing, nn.Module) else {}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **public, **modules}


class Steps:
    """The steps of one folder, each with a JSON file of what it depended on and what came of it.

    Args:
        folder: where they lie; made when the first one ends.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def do(
        self, name: str, depends: dict[str, Any], work: Callable[[], dict[str, Any]], files: Iterable[str] = ()
    ) -> dict[str, Any]:
        """What came of the step: from its file, if it was done with the same ``depends``, or by doing it.

        Args:
            name: of the step and of its file.
            depends: plain values: everything that decides what comes of it.
            work: does it; returns plain values.
            files: that it writes, in the folder. If one is gone or was changed, the step is done again.

        >>> import tempfile
        >>> steps = Steps(Path(tempfile.mkdtemp()))
        >>> [steps.do("sum", {"of": n}, lambda: print("adding") or {"sum": 3}) for n in (2, 2)]
        adding
        [{'sum': 3}, {'sum': 3}]
        """
        mark, key = self.folder / f"{name}.json", key_of(depends)
        done = self._read(mark)
        if done is not None and done["key"] == key and done["files"] == self._files(files):
            return done["result"]
        result = work()
        body = {"key": key, "depends": depends, "result": result, "files": self._files(files)}
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_json(mark, body, checked=True)
        # What a later run will read, and not what it was made from: tuples become lists now, not then.
        return json.loads(json.dumps(result))

    def _files(self, names: Iterable[str]) -> dict[str, str | None]:
        return {n: file_key(self.folder / n) if (self.folder / n).is_file() else None for n in names}

    @staticmethod
    def _read(mark: Path) -> dict[str, Any] | None:
        try:
            body = read_json(mark)
        except (OSError, ValueError):
            return None  # not there, or not ours: the step is done again
        return body if isinstance(body, dict) and {"key", "result", "files"} <= body.keys() else None
