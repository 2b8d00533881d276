"""Files that know their checksum."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from tutelage.checked import Damaged, read_weights, read_weights_about, write_weights

WRITE = """
import sys, pathlib, torch
from tutelage.checked import write_weights
write_weights(pathlib.Path(sys.argv[1]), {"b": torch.arange(3.0), "a": torch.ones(2, 2)}, one="ä", two="2", three="3")
"""


def test_equal_weights_are_equal_files_whoever_writes_them(tmp_path):
    # safetensors writes what is said about the tensors in an order that every process draws anew
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file in files:
        subprocess.run([sys.executable, "-c", WRITE, file], check=True)
    assert len({file.read_bytes() for file in files}) == 1
    state, about = read_weights_about(files[0])
    assert torch.equal(state["b"], torch.arange(3.0))
    assert {**about, "crc32": ""} == {"format": "pt", "one": "ä", "two": "2", "three": "3", "crc32": ""}
    with safe_open(files[0], framework="pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.ones(2, 2))


def test_a_changed_tensor_is_damage_and_other_peoples_files_have_no_checksum(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    write_weights(file, {"a": torch.ones(4)})
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.safetensors is damaged: its tensors do not have their checksum"):
        read_weights(file)
    save_file({"a": torch.ones(4)}, file)
    assert torch.equal(read_weights(file)["a"], torch.ones(4))
