"""One of several processes that train together is killed: the others end soon and say why; the command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from kills import fresh

pytestmark = pytest.mark.slow
WITHIN = 60.0
TRAIN = "train --data npz:data.npz --model mlp:8 --batch-size 32 --checkpoint-every 20 --steps 100000 --out run"
STARTED = {
    "devices": [sys.executable, "-m", "jacmatch", *TRAIN.split(), "--devices", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "jacmatch", *TRAIN.split()],
}


def ranks(parent):
    """The processes with a RANK below a process, by rank."""
    processes = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            rank = dict(each.split("=", 1) for each in (folder / "environ").read_text().split("\0") if "=" in each)
        except OSError:
            continue
        if above == parent and "RANK" in rank:
            processes[int(rank["RANK"])] = int(folder.name)
    return processes


def alive(process):
    """Whether a process is there and is not merely waited for."""
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def training(kind, folder):
    """Two processes that train, and have saved a checkpoint; with what they say in a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(STARTED[kind], cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            until = time.monotonic() + 300
            while not (folder / "run" / "checkpoint.pt").exists():
                assert process.poll() is None, (folder / "output").read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
            yield process, ranks(process.pid)
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("kind", list(STARTED))
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(kind, victim):
    with fresh() as text:
        folder = Path(text)
        with training(kind, folder) as (process, processes):
            assert sorted(processes) == [0, 1]
            os.kill(processes[victim], signal.SIGKILL)
            start = time.monotonic()
            code = process.wait(WITHIN)
            while any(alive(each) for each in processes.values()):
                assert time.monotonic() - start < WITHIN
                time.sleep(0.1)
        output = (folder / "output").read_text()
        print(f"{kind}, rank {victim}: {time.monotonic() - start:.1f} s, code {code}\n{output}")
        assert code != 0
        assert "killed" in output or "has ended" in output or "SIGKILL" in output
        assert (folder / "run" / "checkpoint.pt").exists()
        words = [*STARTED["devices"], "--max-steps", "1"]  # it is beyond that: the checkpoint is read, nothing is done
        again = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert again.returncode == 0, again.stderr


def test_the_process_that_began_the_others_is_killed():
    with fresh() as text, training("devices", Path(text)) as (process, processes):
        process.kill()
        start = time.monotonic()
        while any(alive(each) for each in processes.values()):
            assert time.monotonic() - start < WITHIN, [each for each in processes.values() if alive(each)]
            time.sleep(0.1)
        print(f"{time.monotonic() - start:.1f} s")


@pytest.mark.parametrize("kind", list(STARTED))
def test_sigterm_saves_a_checkpoint_of_all(kind):
    with fresh() as text:
        folder = Path(text)
        with training(kind, folder) as (process, processes):
            before = len((folder / "run" / "metrics.jsonl").read_bytes())
            process.send_signal(signal.SIGTERM)
            code = process.wait(WITHIN)
            time.sleep(1)
            assert not any(alive(each) for each in processes.values())
        output = (folder / "output").read_text()
        print(f"{kind}: code {code}\n{output}")
        assert "the same command" in output
        assert code == 130 or kind == "torchrun"  # which says 1 for whatever ends its processes
        assert len((folder / "run" / "metrics.jsonl").read_bytes()) >= before
        assert json.loads((folder / "run" / "settings.json").read_text())["job"] == "train"
