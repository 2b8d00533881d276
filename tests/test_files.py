from __future__ import annotations

import os

import pytest

from tutelage.files import replacing


def test_the_file_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "new" / "folder" / "model.onnx"
    with replacing(target) as beside:
        beside.write_text("half")
        assert not target.exists()
        assert beside.parent == target.parent, "another file system could not be renamed from"
        assert beside.suffix == ".onnx"
    assert target.read_text() == "half"
    assert os.listdir(target.parent) == ["model.onnx"]


def test_a_crash_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write() -> None:
        with replacing(target) as beside:
            beside.write_text("new, unfinished")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_old_file_is_replaced_and_a_string_is_a_path(tmp_path):
    target = tmp_path / "a.txt"
    for content in ("one", "two"):
        with replacing(str(target)) as beside:
            beside.write_text(content)
        assert target.read_text() == content


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.read_text() == "old"


def test_a_folder_can_be_written_and_a_crash_removes_it(tmp_path):
    target = tmp_path / "shards"
    with replacing(target) as beside:
        beside.mkdir()
        (beside / "0").write_text("x")
    assert (target / "0").read_text() == "x"

    def write() -> None:
        with replacing(tmp_path / "other") as beside:
            beside.mkdir()
            (beside / "0").write_text("x")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert os.listdir(tmp_path) == ["shards"]
