"""Writing without harm: beside, then renamed, so that a crash leaves the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks; two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the block ends well and removed otherwise.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as beside:
    ...     _ = beside.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: exporters choose their format by it.
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Nobody else is inside such a block with the same path; the lock ends with the process, however that ends.

    Args:
        path: of the file that is locked, made if need be.
        wait: until the others are out, instead of an error.

    Raises:
        BlockingIOError: another process (or another block of this one) holds it.

    >>> import tempfile
    >>> with locked(Path(tempfile.mkdtemp()) / "lock"):
    ...     pass
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise BlockingIOError(
                    f"{path.parent}: another process is at work there; wait for it or stop it"
                ) from None
            except OSError:
                pass  # a file system without locks: two runs in one folder are not noticed there either
        yield
