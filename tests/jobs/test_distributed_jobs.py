"""Jobs in two processes: the command line starts them, or torchrun does. Run by hand, a minute or two each."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
PERCEPTRON = ("--data", "digits", "--teacher", "mlp", "--student", "mlp", "--smoke", "--validation", "0.1")
TRAIN = (
    "train",
    "--data",
    "digits",
    "--model",
    "mlp",
    "--batch-size",
    "64",
    "--steps",
    "600",
    "--checkpoint-every",
    "20",
)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "jacmatch")


@pytest.fixture
def started(tmp_path):
    """Starts a command in the folder of the test."""
    processes = []

    def start(*words, module=("jacmatch",), **environment):
        own = {**os.environ, "JACMATCH_CACHE": str(tmp_path / "kept"), "OMP_NUM_THREADS": "1", **environment}
        own["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", *module, *map(str, words)],
            cwd=tmp_path,
            env=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def output_of(process, code=0):
    """What the command prints on both streams once it has ended with the code, without the lines of progress."""
    out, error = process.communicate(timeout=500)
    assert process.returncode == code, error
    lines = error.splitlines(keepends=True)
    return out, "".join(line for line in lines if not re.search(r"\d+/\d+(, \d+ s)?$", line.rstrip()))


def children(process):
    """The processes that the command has started, in order."""
    return [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def until(condition, seconds=120):
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_distill_in_two_processes_is_distill_in_one(started, tmp_path):
    output_of(started("distill", *PERCEPTRON, "--out", "one"))
    out, error = output_of(started("distill", *PERCEPTRON, "--out", "two", "--devices", "2"))
    assert out.count("labels + outputs + Jacobians") == 1
    assert not error
    output_of(started("distill", *PERCEPTRON, "--out", "torchrun", module=TORCHRUN))
    one = load_file(tmp_path / "one" / "student.safetensors")
    for name in ("two", "torchrun"):
        other = load_file(tmp_path / name / "student.safetensors")
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-4
        result, alone = (json.loads((tmp_path / each / "result.json").read_text()) for each in (name, "one"))
        assert result["student"] == pytest.approx(alone["student"], abs=0.02)


def test_a_cache_answers_in_two_processes(started, tmp_path):
    options = (*PERCEPTRON, "--views", "2")
    output_of(started("cache", "build", *options, "--cache", "cache", module=TORCHRUN))
    output_of(started("distill", *options, "--out", "live", "--devices", "2"))
    output_of(started("distill", *options, "--out", "cached", "--devices", "2", "--cache", "cache"))
    live, cached = (load_file(tmp_path / name / "student.safetensors") for name in ("live", "cached"))
    assert max(float((live[key] - cached[key]).abs().max()) for key in live) < 1e-5


@pytest.mark.parametrize("verb", ["robust", "transfer"])
def test_other_jobs_run_in_two_processes(started, tmp_path, verb):
    data = ("--data", "digits", "--model", "mlp") if verb == "robust" else ()
    output_of(started(verb, *data, "--smoke", "--out", "run", "--devices", "2"))
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(started, tmp_path, rank):
    process = started(*TRAIN, "--out", "run", "--devices", "2")
    until((tmp_path / "run" / "checkpoint.pt").is_file)
    pids = children(process)
    os.kill(pids[rank], signal.SIGKILL)
    before = time.monotonic()
    _out, error = output_of(process, 1)
    assert time.monotonic() - before < 60
    assert error.count("\n") == 1
    assert f"process {rank} of 2 was ended by SIGKILL" in error
    assert "Finished work is kept in run: run the same command again to resume." in error
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    output_of(started(*TRAIN, "--out", "run", "--devices", "2"))
    assert (tmp_path / "run" / "result.json").is_file()


def test_sigterm_saves_once_and_another_number_of_processes_is_refused(started, tmp_path):
    whole = started(*TRAIN, "--out", "whole", "--devices", "2")
    output_of(whole)
    process = started(*TRAIN, "--out", "run", "--devices", "2")
    until((tmp_path / "run" / "checkpoint.pt").is_file)
    process.terminate()
    _, error = output_of(process, 130)
    assert error == "jacmatch train: interrupted. Finished work is kept in run: run the same command again to resume.\n"
    _, error = output_of(started(*TRAIN, "--out", "run"), 2)
    assert "processes (2 there, 1 here)" in error
    output_of(started("train", "--resume", "run", "--devices", "2"))
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "run"))
    assert all((one[key] == other[key]).all() for key in one)


def test_what_is_wrong_in_one_process_is_reported_once(started, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nfrom jacmatch import datasets\nfrom jacmatch.errors import InputError\n"
        "def data(seed=0):\n"
        "    if os.environ['RANK'] == '1':\n        raise InputError('The disk of node 1 must be there.')\n"
        "    return datasets.load('digits', seed)\n"
    )
    process = started("train", "--data", "mine:data", "--model", "mlp", "--smoke", "--out", "run", "--devices", "2")
    before = time.monotonic()
    out, error = output_of(process, 2)
    assert time.monotonic() - before < 90
    assert error == "jacmatch train: The disk of node 1 must be there.\n"
    assert not out
    assert not (tmp_path / "run").exists()
    _, error = output_of(started("train", "--data", "nowhere", "--devices", "2"), 2)
    assert error.count("\n") == 1
    assert "nowhere" in error
