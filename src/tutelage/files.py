"""Writing without harm: beside, to the disk, then renamed, so that a crash or a power failure leaves the old file or
the new one; and every refusal of the disk names the path."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks; two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

_FULL = 2**16  # bytes left where a write has failed, for which it was too much


def durable(path: str | Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk and would survive a power failure.

    Raises:
        OSError: it could not be written: some file systems notice only now that they are full.

    >>> import tempfile
    >>> durable(tempfile.mkdtemp())
    """
    path = Path(path)
    if path.is_dir():
        for child in path.iterdir():
            durable(child)
        _entries_durable(path)
    else:
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _entries_durable(folder: Path) -> None:
    """Wait until what was made, renamed or removed in a folder is on the disk."""
    if os.name == "nt":
        return  # Windows writes the entries of a folder with its files
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no such thing for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the block ends well and removed otherwise.

    What killed processes of this machine left of the same file is removed as well.

    Raises:
        OSError: of whatever the disk refused in the block, with ``path`` as the file's name.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as beside:
    ...     _ = beside.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = beside_of(path)
        try:
            yield beside
            durable(beside)
            os.replace(beside, path)
            _entries_durable(path.parent)
        finally:
            _remove(beside)


@contextlib.contextmanager
def workplace(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` to make it in, for what does not fit through :func:`replacing` alone.

    >>> target = Path(tempfile.mkdtemp()) / "a.xml"
    >>> with workplace(target) as folder:
    ...     folder.is_dir()
    True
    """
    path = Path(path)
    folder = beside_of(path.with_name(f"{path.name}.files"))
    with naming(path):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def beside_of(path: Path) -> Path:
    """Where this process may write what is to become ``path``; what killed processes left there is removed.

    The name says whose it is: ``.<stem>.<machine>-<process>.part<suffix>``.
    """
    # The suffix is kept: exporters choose their format by it.
    begin, end = f".{path.stem}.{platform.node()}-", f".part{path.suffix}"
    for left in path.parent.glob(f"{glob.escape(begin)}*{glob.escape(end)}"):
        number = left.name[len(begin) : -len(end)]
        if number.isdecimal() and (int(number) == os.getpid() or not _alive(int(number))):
            _remove(left)
    return path.with_name(f"{begin}{os.getpid()}{end}")


def _alive(process: int) -> bool:
    if os.name == "nt":
        return True  # there, asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is somebody else's
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What a library makes of a disk that is full or a folder that is closed, as an ``OSError`` that names ``path``.

    torch and OpenVINO speak of their streams then, and safetensors raises an error of its own; neither says which file.

    >>> with naming("student.safetensors"):
    ...     raise RuntimeError("I/O error: No space left on device (os error 28)")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'student.safetensors'
    """
    try:
        yield
    except OSError as error:
        temporary = error.filename is None or ".part" in str(error.filename)
        if error.errno is None or not temporary:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (ValueError, TypeError, ImportError):
        raise  # of what is written, and not of where
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = int(said[1]) if said else errno.ENOSPC if _full(Path(path).parent) else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL
    except OSError:
        return False


def writable(folder: str | Path) -> None:
    """See now, and not after hours of work, that files can be written into a folder, which is made if need be.

    Raises:
        OSError: they cannot; it names the folder.

    >>> writable(tempfile.mkdtemp())
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write there: {error.strerror}", str(folder)) from error


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
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


_held: set[IO[Any]] = set()


def _let_go() -> None:
    """In a process that was forked (a loader's worker): it would keep its parent's locks when that is killed."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
