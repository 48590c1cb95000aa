"""One process at a time in a run folder."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.runs import Run
from jacmatch.runs import files as lock

HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, end="", flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another(folder):
    """A process that holds the lock of a folder."""
    command = [sys.executable, "-S", "-c", HOLDER, str(folder / lock.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def begun(folder):
    return Run.create(folder, "evaluate", {"lr": 0.1}, "0.0.1")


def result():
    return {"job": "evaluate", "version": "0.0.1", "seed": 0, "seconds": 1.0, "settings": {"lr": 0.1}}


def test_a_second_process_is_refused_and_changes_nothing(tmp_path):
    run = begun(tmp_path)
    run.log({"step": 1})
    (tmp_path / ".student.1.jacmatch-part").write_text("half of a file that the other one is writing")
    run.lock.release()
    before = sorted(path.name for path in tmp_path.iterdir())
    with another(tmp_path) as process:
        rule = rf"must be in use by one process at a time\. Got another one \(process {process.pid}\)\. Wait for it"
        with pytest.raises(InputError, match=rule):
            begun(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [lock.LOCK, *before]
    assert begun(tmp_path).resumed


def test_a_new_folder_that_another_process_begins_is_left_to_it(tmp_path, monkeypatch):
    """Both have seen that it is not there."""
    folder, real = tmp_path / "new", lock.hold

    def late(path):
        with another(path):
            return real(path)

    monkeypatch.setattr("jacmatch.runs.folder.hold", late)
    with pytest.raises(InputError, match="one process at a time"):
        begun(folder)
    assert [path.name for path in folder.iterdir()] == [lock.LOCK]
    monkeypatch.undo()
    assert not begun(folder).resumed


def test_a_lock_ends_with_its_process_and_leaves_no_file_behind(tmp_path):
    with another(tmp_path):
        pass
    assert (tmp_path / lock.LOCK).exists()  # as a killed process leaves it
    run = begun(tmp_path)
    assert (tmp_path / lock.LOCK).read_text() == str(os.getpid())
    run.write_result(result())
    assert "result.json" in os.listdir(tmp_path)
    assert lock.LOCK not in os.listdir(tmp_path)


def test_a_run_that_is_forgotten_gives_its_folder_and_its_file_handle_back(tmp_path):
    handles = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        begun(tmp_path / str(number % 7)).log({"step": number})
    assert len(os.listdir("/proc/self/fd")) == handles
    assert list(tmp_path.rglob(lock.LOCK)) == []


def test_one_that_waits_says_so_once_and_gets_its_turn(tmp_path):
    messages = []
    with another(tmp_path) as process:
        threading.Timer(0.5, process.kill).start()
        start = time.perf_counter()
        own_lock = lock.hold(tmp_path, wait=lambda: messages.append("waits"))
    assert time.perf_counter() - start > 0.4
    assert messages == ["waits"]
    own_lock.release()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    with another(tmp_path):
        monkeypatch.setattr(fcntl, "flock", none)
        lock.hold(tmp_path)


def test_a_command_leaves_a_folder_alone_in_which_another_has_begun_meanwhile(tmp_path, monkeypatch, capsys):
    """Both found no folder. The second one is refused, and must not tidy up what it takes for its own."""
    real = Run.create.__func__
    with ExitStack() as processes:

        def late(cls, folder, *given, **named):
            folder.mkdir()
            (folder / "settings.json").write_text('{"job": "doctor", "version": "0", "settings": {}}')
            processes.enter_context(another(folder))
            return real(cls, folder, *given, **named)

        monkeypatch.setattr(Run, "create", classmethod(late))
        assert main(["doctor", "mlp:4", "--data", "synthetic:D=3,K=2,N=30,T=10", "--out", str(tmp_path / "run")]) == 2
        assert "must be in use by one process at a time" in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path / "run")) == [lock.LOCK, "settings.json"]


def test_a_full_disk_leaves_no_lock_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    own_lock = lock.hold(tmp_path)
    assert (tmp_path / lock.LOCK).read_bytes() == b""
    own_lock.release()
    assert list(tmp_path.iterdir()) == []
