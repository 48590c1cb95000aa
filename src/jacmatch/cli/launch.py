"""`--devices N`: the same command in N processes of this machine, which train one network together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from torch import distributed

from jacmatch.errors import ElsewhereError
from jacmatch.training.distributed import ERROR, STORE

_GRACE = 20.0  # seconds in which the others can end by themselves after one has failed
_FORCE = 10.0  # seconds in which they can end after SIGTERM
_INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# Threads of gloo can abort a process while its interpreter shuts down, so the process ends before that.
_PROGRAM = (
    "import atexit, os; from jacmatch.cli import main; code = main(); "
    "atexit._run_exitfuncs(); sys.stdout.flush(); sys.stderr.flush(); os._exit(code)"
)


def launch(words: Sequence[str], count: int, *, numbered: bool = False) -> int:
    """Run the command in several processes and return its exit code.

    They connect through a file in a folder that only this user can enter, and communicate over the loopback interface:
    nothing listens where another machine could reach it. A TCPStore of torch listens on all interfaces, without a
    password.

    SIGTERM and Ctrl-C are passed on, once each: the processes save a checkpoint and end. If one fails, the others are
    ended as well.
    """
    processes: list[subprocess.Popen[bytes]] = []
    temporary = tempfile.TemporaryDirectory(prefix="jacmatch-", ignore_cleanup_errors=True)
    with temporary as folder, _passed_on(processes):
        meeting = os.path.join(folder, "store")
        store = distributed.FileStore(meeting, -1)  # type: ignore[attr-defined]
        threads = max(1, (os.cpu_count() or 1) // count)
        about = {
            **_loopback(),
            **({"JACMATCH_NUMBERED": "1"} if numbered else {}),
            STORE: meeting,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # a DDP warning that does not apply
        }
        for rank in range(count):
            own = {**os.environ, **about, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C reaches it through this process alone, and so only once.
            processes.append(subprocess.Popen([*python(_PROGRAM), *words], env=own, start_new_session=True))
        try:
            return _codes(processes, store)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _loopback() -> dict[str, str]:
    """Return the variables that make gloo and NCCL use the loopback interface, unless the user has chosen another."""
    try:
        names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    except OSError:
        names = []
    return {key: name for key in _INTERFACE if key not in os.environ for name in names[:1]}


def _codes(processes: list[subprocess.Popen[bytes]], store: distributed.Store) -> int:
    """Wait for all processes and return the exit code of the first that failed, 0 if none did."""
    failed, since, terminated, message = None, 0.0, False, b""
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        wrong = [rank for rank, process in enumerate(processes) if process.poll()]
        if wrong and failed is None:
            failed, since = wrong[0], time.monotonic()
            if (processes[failed].returncode or 0) < 0:  # killed by a signal, so it could not report an error
                own = json.dumps({"rank": failed, "code": 1, "signal": True})
                message = store.compare_set(ERROR, "", own)
                message = b"" if message == own.encode() else message
        waited = time.monotonic() - since
        if failed is not None and waited > _GRACE:
            for process in processes:
                if process.poll() is None and (not terminated or waited > _GRACE + _FORCE):
                    process.send_signal(signal.SIGKILL if terminated else signal.SIGTERM)
            terminated = True
    codes = [process.returncode for process in processes]
    failed = next((rank for rank, code in enumerate(codes) if code), None) if failed is None else failed
    if failed is None or codes[failed] > 0:
        return 0 if failed is None else codes[failed]
    if message:  # a process reported the error before another was aborted at its exit
        return int(json.loads(message)["code"])
    name = signal.Signals(-codes[failed]).name
    says = f"process {failed} of {len(codes)} was ended by {name}, perhaps for lack of memory; so were the others."
    raise ElsewhereError(1, says)


@contextlib.contextmanager
def _passed_on(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Forward SIGTERM and Ctrl-C to the processes within the block."""

    def send(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def python(program: str, *options: str) -> list[str]:
    """Return the command that runs a program in a new Python process with the search path of this one.

    `python -m` and `python -c` import from the working folder first: a `yaml.py` there would be run. Here the path is
    set before anything is imported but `sys`, which is built in. (Python 3.11 has the option -P for it.)
    """
    return [sys.executable, *options, "-c", f"import sys; sys.path[:] = {list(map(str, sys.path))!r}\n{program}"]
