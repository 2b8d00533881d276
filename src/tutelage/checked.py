"""Files that know their checksum, so that a byte that a disk or a copy has changed is noticed when they are read.

The checksum is CRC-32: it finds every change of up to 32 bits in a row and misses one of four thousand million others,
at gigabytes a second. It is no protection from people, who can write a checksum as well; nothing that is read here is
executed, whatever it says.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from tutelage.files import replacing

_CHUNK = 2**22


class Damaged(ValueError):
    """A file is not what was written; the message names it."""


def checksum(path: Path) -> int:
    """CRC-32 of a file, which is read in pieces.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a"
    >>> path.write_bytes(b"123456789")
    9
    >>> hex(checksum(path))
    '0xcbf43926'
    """
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            found = zlib.crc32(piece, found)
    return found


def write_json(path: Path, value: Any, checked: bool = False) -> None:
    """Write plain values as JSON, whole or not at all; if ``checked``, a dictionary, with a ``checksum`` in it."""
    if checked:
        value = json.loads(json.dumps(value))  # as it will be read: keys become strings, and tuples lists
        value = {**value, "checksum": _of_fields(value)}
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote, without its checksum. A file without one is taken as it is.

    Raises:
        Damaged: it is no JSON, or does not have its checksum.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"steps": 12}, checked=True)
    >>> read_json(path)
    {'steps': 12}
    >>> _ = path.write_text(path.read_text().replace("12", "13"))
    >>> read_json(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    tutelage.checked.Damaged: .../a.json is damaged: it does not have its checksum (if you changed it yourself, ...
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if isinstance(value, dict) and "checksum" in value and value.pop("checksum") != _of_fields(value):
        raise Damaged(
            f"{path} is damaged: it does not have its checksum (if you changed it yourself, remove its field checksum)"
        )
    return value


def list_files(folder: Path) -> None:
    """Write ``files.json``: the size and the checksum of everything in a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    sums = {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "crc32": checksum(f)} for f in files}
    write_json(folder / "files.json", {"files": sums}, checked=True)


def compare_files(folder: Path) -> None:
    """See that a folder's files are what its ``files.json`` says, which has only sizes if it is older than checksums.

    Raises:
        Damaged: a file is another one; the message names it.
        OSError: one is not there, or cannot be read.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_text("one")
    >>> list_files(folder)
    >>> compare_files(folder)
    >>> _ = (folder / "a").write_text("two")
    >>> compare_files(folder)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    tutelage.checked.Damaged: .../a does not have its checksum
    """
    listed = read_json(folder / "files.json")
    if not isinstance(listed, dict):
        raise Damaged(f"{folder / 'files.json'} is no list of files")
    for name, entry in listed.get("files", listed).items():
        file = folder / name
        size = entry["bytes"] if isinstance(entry, dict) else entry
        if (there := file.stat().st_size) != size:
            raise Damaged(f"{file} has {there} bytes and not {size}")
        if isinstance(entry, dict) and checksum(file) != entry["crc32"]:
            raise Damaged(f"{file} does not have its checksum")


def write_weights(path: Path, state: dict[str, Tensor], **about: str) -> None:
    """Write a state dict as safetensors, whole or not at all, with its checksum and what else is known ``about`` it."""
    state = _unshared(state)
    with replacing(path) as beside:
        save_file(state, beside, metadata={"format": "pt", **about, "crc32": str(of_tensors(state))})
        _in_order(beside)


def _in_order(path: Path) -> None:
    """Sort what a safetensors file says about its tensors, which is in another order in every process: equal weights
    are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. One that was not written by us, and has no checksum, is taken as it is.

    Raises:
        Damaged: it is no safetensors file, or does not have its checksum.
    """
    return read_weights_about(path)[0]


def read_weights_about(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """:func:`read_weights`, and what :func:`write_weights` was told about them."""
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except SafetensorError as error:
        raise Damaged(f"{path} is damaged: it is not a whole safetensors checkpoint: {error}") from error
    if "crc32" in about and about["crc32"] != str(of_tensors(state)):
        raise Damaged(f"{path} is damaged: its tensors do not have their checksum")
    return state, about


def of_tensors(state: dict[str, Tensor]) -> int:
    """CRC-32 of names, types, shapes and values, in the order of the names."""
    found = 0
    for name, tensor in sorted(state.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.contiguous().reshape(-1).view(uint8).numpy().data, found)
    return found


def _of_fields(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out
