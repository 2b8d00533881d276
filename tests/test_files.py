from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from tutelage import files
from tutelage.files import beside_of, durable, locked, naming, replacing, workplace, writable


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


# The module by its file: importing the package would take longer than everything else here.
HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
try:
    with files.locked(sys.argv[2]):
        print("inside", flush=True)
        sys.stdin.read()
except BlockingIOError as error:
    print(error, flush=True)
"""


def holder(path):
    """Another process that asks for the lock, and keeps it until its input ends."""
    pytest.importorskip("fcntl")
    call = [sys.executable, "-c", HOLDER, files.__file__, str(path)]
    process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_a_lock_has_one_holder(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "new" / "lock"
    with locked(path):
        with pytest.raises(BlockingIOError, match=f"{path.parent}: another process is at work"), locked(path):
            pytest.fail("two are inside")
        with locked(tmp_path / "other"):
            pass
        process, said = holder(path)
        process.communicate()
        assert "another process is at work" in said
    with locked(path):
        pass


def test_an_error_inside_releases_the_lock(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "lock"):
        raise RuntimeError
    with locked(tmp_path / "lock"):
        pass


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    path = tmp_path / "lock"
    process, said = holder(path)
    assert said == "inside"
    with pytest.raises(BlockingIOError), locked(path):
        pytest.fail("two are inside")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(path):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*given):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock"):
        pass


# Holds the lock, and has a child that outlives it, as a loader's worker does.
PARENT = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.locked(sys.argv[2]):
    if os.fork() == 0:  # which has let go of the lock by the time that it comes here
        print(os.getpid(), flush=True)
        sys.stdin.read()
        os._exit(0)
    time.sleep(600)
"""


def test_a_copy_of_the_process_does_not_keep_its_lock(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "lock"
    call = [sys.executable, "-c", PARENT, files.__file__, str(path)]
    process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(child, 0)  # it is still there
    with locked(path):
        pass
    process.stdin.close()
    process.stdout.close()


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    if os.name == "nt":
        pytest.skip("there, folders are not written by themselves")
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(one, other):
        done.append("rename")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(tmp_path / "a.txt") as beside:
        beside.write_text("whole")
    assert done == ["file", "rename", "folder"]
    done.clear()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("x")
    durable(tmp_path)
    assert sorted(done) == ["file", "file", "folder", "folder"]


def test_what_killed_processes_left_of_a_file_is_removed_with_its_next_writing(tmp_path):
    if os.name == "nt":
        pytest.skip("there, nobody can be asked whether a process lives")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = beside_of(tmp_path / "a.txt").name
    names = {who: mine.replace(str(os.getpid()), str(who)) for who in (ended.pid, os.getppid())}
    others = [names[os.getppid()], mine.replace(platform.node(), f"{platform.node()}-2"), ".b.txt", "a.txt.part"]
    for name in (names[ended.pid], mine, *others):
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "a.txt") as beside:
        assert not (tmp_path / names[ended.pid]).exists()
        beside.mkdir()
        (beside / "content").touch()
    assert sorted(os.listdir(tmp_path)) == sorted(["a.txt", *others])


def test_a_workplace_goes_with_what_was_left_in_it(tmp_path):
    def fail():
        with workplace(tmp_path / "a.xml") as folder:
            (folder / "a.bin").touch()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("Permission denied (os error 13)"), errno.EACCES),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
    ],
)
def test_what_the_disk_refused_has_the_files_name(tmp_path, error, number):
    target = tmp_path / "a.txt"
    with pytest.raises(OSError, match=re.escape(str(target))) as found, replacing(target):
        raise error
    assert (found.value.errno, found.value.filename) == (number, str(target))
    assert found.value.__cause__ is error


def test_a_strange_error_is_a_full_disk_only_where_the_disk_is_full(tmp_path, monkeypatch):
    def fail(error):
        with naming(tmp_path / "a.txt"):
            raise error

    with pytest.raises(RuntimeError, match="iostream"):
        fail(RuntimeError("iostream error"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(OSError, match=f"{os.strerror(errno.ENOSPC)}: .*a.txt"):
        fail(RuntimeError("iostream error"))
    with pytest.raises(ValueError, match="no such layer"):
        fail(ValueError("no such layer"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        fail(FileNotFoundError(errno.ENOENT, "nothing there", "elsewhere"))


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path):
    writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write there: .*file"):
        writable(tmp_path / "file")
