"""Full and read-only disks, processes that meet in one folder, and clocks that jump: nothing is lost in silence."""

import json
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from kills import JOBS, Job, commands, fresh, imported
from processes import Board, Moment, begun, contents, ended

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_as_users_run")]
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _imported():
    imported()


def script(*words):
    """What a script of this folder reports."""
    done = subprocess.run([sys.executable, HERE / "kills.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", [("--kills", "10", "--seed", "1"), ("--points", "2"), ("--points", "3", "--full")])
def test_a_few_kills(words):
    """Many: the scripts by themselves, with the numbers of docs/reliability.md."""
    report = script(*words)
    assert report["ended as undisturbed"] == report["stopped"] >= 10


@contextmanager
def small_disk(folder, kibibytes, *options):
    """A file system of that size in a folder."""
    size = ",".join((f"size={kibibytes}k", *options))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", ["train", "cached"])
def test_a_disk_that_is_full_sooner_or_later(name, tmp_path):
    """Bytes are missing in the middle of a file, not only at its end; with space, the same command resumes."""
    job, refused, log = Job(name, few=True), 0, tmp_path.with_suffix(".log")
    with small_disk(tmp_path, 1500):
        for free in range(0, 180, 20):
            folder = tmp_path / str(free)
            folder.mkdir()
            with fresh() as made:
                (folder / "data.npz").write_bytes((Path(made) / "data.npz").read_bytes())
            log.unlink(missing_ok=True)
            filler = tmp_path / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(b"\1" * 4096):
                        pass
                except OSError:
                    pass
                file.truncate(max(0, file.tell() - free * 1024))
            code = ended(begun(folder, job.commands, Board(), Moment(), log))
            filler.unlink()
            output = log.read_text().strip()
            assert code in (0, 2), output
            if code:
                refused += 1
                assert "Traceback" not in output
                assert "No space left on device" in output, output
                assert not list(folder.rglob("*.jacmatch-part"))
                assert ended(begun(folder, job.commands, Board(), Moment(), log)) == 0, log.read_text()
            assert contents(folder) == job.whole
            subprocess.run(["rm", "-r", folder], check=True)
    assert refused >= 5


def test_a_disk_that_cannot_be_written_to(tmp_path):
    with small_disk(tmp_path, 1000), fresh() as made:
        (tmp_path / "data.npz").write_bytes((Path(made) / "data.npz").read_bytes())
        (tmp_path / "log").touch()
        for path in ("run", "kept", "answers"):
            (tmp_path / path).mkdir()
        log = Path(made) / "log"
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        for name in JOBS:
            words = commands(name, few=True)
            absolute = [
                [str(tmp_path / word) if word in ("run", "answers") else word for word in each] for each in words
            ]
            assert ended(begun(Path(made), absolute, Board(), Moment())) == 2
            assert "'Read-only file system'" in log.read_text(), log.read_text()
            assert "Traceback" not in log.read_text()
            log.unlink()


@pytest.mark.parametrize("name", list(JOBS))
def test_two_processes_with_one_command(name):
    """One does the job and the other is refused; or it comes too late, and is refused for that."""
    job = Job(name, few=True)
    for number in range(3):
        with fresh() as text:
            folder = Path(text)
            first = begun(folder, job.commands, Board(), Moment())
            time.sleep(random.Random(number).uniform(0, 0.3) * (number > 0))
            second = begun(folder, job.commands, Board(), Moment())
            codes = sorted((ended(first), ended(second)))
            output = (folder / "log").read_text()
            assert codes in ([0, 2], [0, 0]), output
            if codes == [0, 2]:
                assert (
                    "in use by one process at a time" in output
                    or "must be finished" in output
                    or "a finished run" in output
                )
            assert ended(begun(folder, job.commands, Board(), Moment())) == 0
            assert contents(folder) == job.whole


def test_two_jobs_with_one_teacher():
    """Who comes second waits for the teacher instead of training it too."""
    job = Job("distill", few=True)
    with fresh() as text:
        folder = Path(text)
        others = [[word if word != "run" else "run2" for word in words] for words in job.commands]
        first = begun(folder, job.commands, Board(), Moment())
        second = begun(folder, others, Board(), Moment())
        assert (ended(first), ended(second)) == (0, 0), (folder / "log").read_text()
        here = contents(folder)
        assert {name: value for name, value in here.items() if not name.startswith("run2/")} == job.whole
        again = {name.replace("run2/", "run/"): value for name, value in here.items() if name.startswith("run2/")}
        assert again == {name: value for name, value in job.whole.items() if name.startswith("run/")}


WORKERS = """
import os, sys, time
from jacmatch_research.processes import end_with_parent, side_by_side

def work(number):
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(300)

if __name__ == "__main__":
    side_by_side(work, [1, 2], 2, print)
"""


def test_workers_end_with_the_process_that_began_them(tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    with subprocess.Popen([sys.executable, tmp_path / "workers.py"], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    until = time.monotonic() + 20
    while any(Path("/proc", str(worker)).exists() for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_clock_that_jumps(monkeypatch):
    """Hours forth and back at each question; only the start that is written into environment.json is of that clock."""
    job, choose = Job("train", few=True), random.Random(0)
    monkeypatch.setattr(time, "time", lambda: choose.uniform(0, 2e9))
    monkeypatch.setattr(time, "time_ns", lambda: choose.randrange(2 * 10**18))
    with fresh() as text:
        assert ended(begun(Path(text), job.commands, Board(), Moment())) == 0, (Path(text) / "log").read_text()
        assert contents(Path(text)) == job.whole
        result = json.loads((Path(text) / "run" / "result.json").read_text())
        assert 0 < result["seconds"] < 60
