"""Other processes import nothing from the working folder, and listen to this machine alone."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jacmatch.cli import launch
from jacmatch.training import distributed

NAMES = ("json.py", "os.py", "yaml.py", "pickle.py", "socket.py", "multiprocessing.py", "runpy.py", "torch.py")


@pytest.fixture
def _hostile(tmp_path, monkeypatch):
    """A working folder with modules that leave a file where they are imported."""
    for name in NAMES:
        (tmp_path / name).write_text("open('ran', 'w').close()\nraise ImportError('of the working folder')\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_hostile")
def test_a_fresh_python_has_the_search_path_of_this_one(tmp_path):
    text = "import json, os, pickle, socket, runpy, multiprocessing; print(json.dumps(sys.path))"
    ran = subprocess.run(launch.python(text, "-S"), capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(sys.path).replace("'", '"')
    assert not (tmp_path / "ran").exists()


def listening(process):
    """Addresses at which a process listens, as the kernel writes them."""
    sockets = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            sockets.add(os.readlink(entry))
        except OSError:
            continue
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                addresses.append(local.partition(":")[0])
    return addresses


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's tables")
def test_the_processes_of_a_job_meet_in_a_private_file(monkeypatch):
    """Nothing listens in the process that starts the others; they get its address and the interface."""
    started = []

    class Process:
        returncode = 0

        def __init__(self, command, env, start_new_session):
            started.append((command, env))
            folder = Path(env[distributed.STORE]).parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert not listening(os.getpid())

        def poll(self):
            return 0

        def wait(self):
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    monkeypatch.setattr(launch, "_codes", lambda processes, store: 0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert launch.launch(["train"], 2) == 0
    for rank, (command, env) in enumerate(started):
        assert (env["RANK"], env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == (str(rank), "chosen", "lo")
        assert command[1] == "-c"
        assert command[-1] == "train"
        assert not Path(env[distributed.STORE]).parent.exists()


TWO = """
from torch import distributed
from jacmatch.training.distributed import joined
with joined("cpu") as ranks:
    ranks.barrier()
    print("here", flush=True)
    sys.stdin.read()
"""


@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's tables")
def test_processes_that_train_together_listen_to_this_machine_alone(tmp_path):
    about = {**os.environ, **launch._loopback(), distributed.STORE: str(tmp_path / "store"), "WORLD_SIZE": "2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(launch.python(TWO), env={**about, "RANK": str(rank)}, **pipes) for rank in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["here\n", "here\n"]
        addresses = [address for process in both for address in listening(process.pid)]
        assert set(addresses) == {"0100007F"}
    finally:
        for process in both:
            process.communicate()
    assert [process.returncode for process in both] == [0, 0]
