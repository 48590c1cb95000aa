"""`jacmatch cache` and `distill --cache`, in one process and in several that are killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.jobs import Cache, Distill
from jacmatch.jobs.study import Progress
from jacmatch.teachers import CachedTeacher

from .cache_jobs import SETTINGS, contents, job

COMMAND = {**SETTINGS, "teacher": "mlp:6", "teacher_steps": 3, "student": "mlp:4", "per_class": 3, "steps": 3}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A cache that the command has built, with the settings that built it."""
    folder = tmp_path_factory.mktemp("command")
    patch = pytest.MonkeyPatch()
    patch.setenv("JACMATCH_CACHE", str(folder / "teachers"))
    result = Cache(action="build", cache=folder / "answers", **COMMAND).run(Progress(quiet=True))
    yield folder, result
    patch.undo()


def test_build_check_and_info_say_what_there_is(command):
    folder, result = command
    (part,) = result["parts"]
    assert result["shards"] == {"written": 1, "found": 0, "mended": 0, "left": 0, "own": 1, "all": 1}
    assert (part["entries"], part["samples"], part["views"], part["missing"]) == (30, 30, 1, [])
    assert part["bytes"] == part["bytes_per_entry"] * part["entries"]
    assert part["fingerprint"]["probe"] == "RandomOutputs(count=1, law='gaussian') on the output side"
    assert min(part["reading"].values()) > 0
    checked = Cache(action="check", cache=folder / "answers", samples=9).run(Progress(quiet=True))
    assert checked["entries"] == 9
    assert Cache(action="info", cache=folder / "answers").run()["parts"][0]["fields"] == part["fields"]


@pytest.mark.ci
def test_distill_takes_its_answers_from_there(command, tmp_path):
    folder, _ = command
    live, cached = (
        Distill(out=tmp_path / name, methods=("outputs", "jacobians"), doctor=False, **settings, **COMMAND)
        for name, settings in (("live", {}), ("cached", {"cache": folder / "answers"}))
    )
    live.run(Progress(quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        queries = []
        answer = CachedTeacher.answer
        patch.setattr(CachedTeacher, "answer", lambda self, *given: queries.append(1) or answer(self, *given))
        cached.run(Progress(quiet=True))
    assert len(queries) == 6
    for method in ("outputs", "jacobians"):
        name = f"seed0/{method}/student.safetensors"
        assert (tmp_path / "live" / name).read_bytes() == (tmp_path / "cached" / name).read_bytes()


@pytest.mark.usefixtures("as_users_run")
def test_code_of_a_cache_runs_only_where_it_is_allowed(command, tmp_path):
    folder, _ = command
    shutil.copytree(folder / "answers", tmp_path / "answers")
    head = tmp_path / "answers/seed0/cache.json"
    head.write_text(head.read_text().replace('"data": "digits"', '"data": "os:getcwd"'))
    with pytest.raises(
        InputError, match=r"code outside the package.* Got 'os:getcwd'\. If you trust it, add --allow-code"
    ):
        Cache(action="check", cache=tmp_path / "answers").run(Progress(quiet=True))
    head.write_text(head.read_text().replace('"data": "os:getcwd"', '"data": "digits", "lr": "fast"'))
    with pytest.raises(InputError, match=r"The settings in .*cache\.json must be those of a cache"):
        Cache(action="check", cache=tmp_path / "answers").run(Progress(quiet=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"`--cache` of `cache` must be given\. Write jacmatch cache build --cache DIR"),
        ({"cache": "x", "out": "y"}, r"`--out` of `cache` must be left out: it writes to --cache"),
    ],
)
def test_a_cache_needs_one_folder(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Cache(action="build", **{name: tmp_path / value for name, value in settings.items()})


def test_a_folder_without_a_cache_is_refused(tmp_path):
    for action in ("check", "info"):
        with pytest.raises(InputError, match=r"must be a teacher's cache\. Got a folder without seed0/cache\.json"):
            Cache(action=action, cache=tmp_path).run(Progress(quiet=True))


def test_a_shard_needs_a_size(tmp_path):
    with pytest.raises(InputError, match=r"`--shard-megabytes` of `cache` must be above 0\. Got 0"):
        replace(job(tmp_path), shard_megabytes=0.0).run(Progress(quiet=True))


# Processes --------------------------------------------------------------------------------------------------------

LONG = "--per-class 30 --steps 60 --seeds 1 --teacher mlp:6 --teacher-steps 3 --batch-size 8 --shard-megabytes 0.01"


def start(folder, *before, **environment):
    words = [sys.executable, *before, "-m", "jacmatch", "cache", "build", "--cache", str(folder), *LONG.split()]
    return subprocess.Popen(
        words, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_killed_at_any_point_and_run_again_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "teachers"))
    assert start(tmp_path / "straight").wait() == 0
    killed = 0
    for number in range(60):
        process = start(tmp_path / "cut")
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            done = len(list((tmp_path / "cut").glob("seed0/*/shard-*")))
            if done > 3 * number:  # somewhere in the middle of the next ones
                time.sleep(0.0007 * number)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
        killed += 1
    assert killed > 5
    assert process.returncode == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("crew", ["torchrun", "independent"])
def test_several_processes_write_one_cache(crew, tmp_path, monkeypatch):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "teachers"))
    if crew == "torchrun":
        several = [start(tmp_path / "several", "-m", "torch.distributed.run", "--nproc-per-node", "2")]
    else:
        several = [start(tmp_path / "several") for _ in range(3)]
    assert [process.wait() for process in several] == [0] * len(several)
    assert start(tmp_path / "alone").wait() == 0
    assert contents(tmp_path / "several") == contents(tmp_path / "alone")


@pytest.mark.ci
def test_a_check_is_of_the_teacher_that_is_named(command, capsys, monkeypatch):
    folder, _ = command
    monkeypatch.setenv("JACMATCH_CACHE", str(folder / "teachers"))
    check = ["cache", "check", "--cache", str(folder / "answers"), "--samples", "4"]
    assert main([*check, "--teacher", "mlp:6"]) == 0
    assert main([*check, "--teacher", "mlp:5", "--doctor"]) == 2
    err = capsys.readouterr().err
    assert "answers/seed0 must belong to this job. Got teacher weights (" in err
    assert main([*check, "--probe", "every-row"]) == 2
    assert "Got probe (RandomOutputs(count=1, law='gaussian') on the output side there" in capsys.readouterr().err
    assert main([*check, "--teacher-steps", "600"]) == 2, "a default that is given counts"
    assert "Got teacher weights (" in capsys.readouterr().err
    for changes in ({"teacher": "mlp:5"}, {"data": "synthetic:D=4,K=2,N=40,T=20"}):
        with pytest.raises(InputError):
            Cache(action="check", cache=folder / "answers", **changes).run(Progress(quiet=True))
