"""What the tests of killed processes share: a process that kills itself at a chosen moment of its work with files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

KINDS = {
    "os.mkdir": "make a folder",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "remove",
}
HALF = "half a file"
OPENED = "an empty file"


class Dying:
    """Counts what this process does in a folder, by kind, and ends it with SIGKILL before the ``at``-th of a kind.

    Python's own audit events say when a file is opened to be written, renamed or removed; :meth:`tears` wraps what
    writes files in another language, and leaves the first half of the file.
    """

    def __init__(self, folder: Path, kind: str | None = None, at: int = 0):
        self.folder, self.kind, self.at = str(folder), kind, at
        self.process, self.counts = os.getpid(), Counter[str]()
        sys.addaudithook(self._heard)

    def comes_to(self, kind: str) -> bool:
        """Whether this is the moment."""
        if os.getpid() != self.process:  # a loader's worker
            return False
        self.counts[kind] += 1
        return kind == self.kind and self.counts[kind] == self.at

    def reaches(self, kind: str) -> None:
        if self.comes_to(kind):
            die()

    def tears(self, owner: Any, name: str, place: int) -> None:
        """Let ``owner.name`` die with half of the file written that it is given as its ``place``-th argument."""
        real = getattr(owner, name)

        def write(*args: Any, **kwargs: Any) -> Any:
            path = args[place]
            if isinstance(path, str | os.PathLike) and self._mine(path) and self.comes_to(HALF):
                real(*args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)
                die()
            return real(*args, **kwargs)

        setattr(owner, name, write)

    def _heard(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR) and self._mine(path):
                self.reaches(OPENED)
        elif event in KINDS and self._mine(args[0], *args[1:]):
            self.reaches(KINDS[event])

    def _mine(self, path: Any, *others: Any) -> bool:
        # a name that is relative to an open folder is of shutil.rmtree
        return os.fspath(path).startswith(self.folder) or (not os.path.isabs(path) and others[-1:] != (-1,))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_fork(work: Callable[[], None], words: Path, after: Callable[[int], None] = lambda process: None) -> int:
    """Do the work in a copy of this process, which has one thread and has imported everything.

    Returns its exit status, negative for the signal that ended it.

    Args:
        work: what is done.
        words: the file that is written to instead of the terminal.
        after: called with the process's number once it has begun.
    """
    process = os.fork()
    if process == 0:
        status = 1
        with contextlib.suppress(OSError):
            file = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(status)
    after(process)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def tree(folder: Path) -> list[str]:
    """The names of everything in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def torn(folder: Path) -> list[str]:
    """The files of a folder that do not load, except those that are being written or removed with an old checkpoint."""
    found = []
    for path in folder.rglob("*"):
        old = path.parent.name.startswith("step-") and path.parent != max(path.parent.parent.glob("step-*"))
        if ".part" in str(path.relative_to(folder)) or old:
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix in (".pt", ".bin"):
                torch.load(path, weights_only=True)
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


def timeless(value: Any) -> Any:
    """Plain values without what a clock said, which is checked to be no less than 0."""
    if isinstance(value, dict):
        for name, held in value.items():
            if name in CLOCKS and isinstance(held, int | float):
                assert held >= 0, f"{name} is {held}"
        return {name: timeless(held) for name, held in value.items() if name not in CLOCKS}
    return [timeless(held) for held in value] if isinstance(value, list) else value


CLOCKS = ("seconds", "times", "measurements", "peak_memory_bytes")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def same_figures(one: Path, other: Path) -> None:
    """Two files of JSON say the same, but for clocks, and for the checksum, which is of that too."""
    found = [timeless(read(path)) for path in (one, other)]
    for body in found:
        if isinstance(body, dict):
            body.pop("checksum", None)
    assert found[0] == found[1]


def same(one: Any, other: Any) -> None:
    """Two values are the same bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    else:
        assert one == other
