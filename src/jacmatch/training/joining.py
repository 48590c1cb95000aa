"""A process among those of its job: how it finds them, and how the error of one ends all, said once.

A process that fails leaves its error in the store of the job and goes. The others, which then wait for it in vain, lose
the connection, look into the store, and end with the same exit code without saying it again.
"""

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed

from jacmatch.errors import ElsewhereError, InputError, UnsupportedError
from jacmatch.training.distributed import Ranks
from jacmatch.training.evaluation import find_device

STORE = "JACMATCH_STORE"
"""Names the file of the store of a job that the command line has started; torchrun says it in its own way."""
ERROR = "jacmatch-error"
"""Key of the store under which the first error of the job stands."""
_PATIENCE = timedelta(minutes=10)  # of a step with the other processes: one of them may still compile
_BETWEEN, _FORCE = 1.0, 30.0  # seconds between two looks at the launcher, and until an end without saving
_TOLD_WITHIN = 5.0  # seconds in which the error of another process is in the store, if it is to come
_OF_CONNECTIONS = re.compile(r"gloo|nccl|connection|broken pipe|tim(ed|e) ?out|store", re.IGNORECASE)
_GONE = (
    "a process of this job has ended, or cannot be reached any more ({reason}). Look at what it said last; the system "
    "may have ended it for want of memory."
)


def is_of_connections(error: BaseException) -> bool:
    """Return whether an error may be that another process of the job has gone."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return several and isinstance(error, RuntimeError) and bool(_OF_CONNECTIONS.search(str(error)))


def expected() -> int:
    """How many processes the environment says there are, 1 without torchrun.

    Raises:
        InputError: RANK and WORLD_SIZE are no numbers that go together.
    """
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (all(each.isdecimal() for each in given) and int(given[0]) < int(given[1])):
        rule = "The environment's RANK must be a whole number below WORLD_SIZE."
        raise InputError(rule, got=f"{given[0]!r} and {given[1]!r}", do="torchrun sets both; else unset them.")
    return int(given[1])


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Within the block this process is one of those that torchrun or the command line has started.

    On GPUs they talk by NCCL, process n of a machine with GPU n; on the CPU by gloo.

    Args:
        device: `cpu`, `cuda` or `auto`.

    Raises:
        InputError: The device is a single GPU, the machine has too few, or the environment does not say who is who.
        ElsewhereError: Another process has failed.
    """
    if expected() == 1 or distributed.is_initialized():
        yield Ranks.here()
        return
    cuda = _own_gpu(device)
    rank, size = int(os.environ["RANK"]), expected()
    store = _store(rank, size)
    if STORE in os.environ:
        _end_with_launcher()
    kind = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        distributed.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        yield Ranks.here()
    except BaseException as error:
        raise _first(store, rank, error) from error
    finally:
        with contextlib.suppress(Exception):  # what is broken cannot be taken down in order
            distributed.destroy_process_group()


def _end_with_launcher() -> None:
    """Once the command that began this process has gone without a word, it saves and ends as with SIGTERM."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_BETWEEN)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_FORCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="jacmatch-launcher").start()


def _own_gpu(device: str) -> bool:
    """Takes the GPU of this process, if the job is to run on GPUs."""
    if find_device(device).type == "cpu":
        return False
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if ":" in device:
        raise InputError("`device` must name no single GPU for several processes.", got=device, do="Use --device cuda.")
    if local >= gpus:
        rule = "There must be a GPU for each process of a machine."
        raise InputError(rule, got=f"{gpus} for {os.environ.get('LOCAL_WORLD_SIZE', local + 1)}", do="Start fewer.")
    torch.cuda.set_device(local)
    return True


def _store(rank: int, size: int) -> distributed.Store:
    """The store of the job: of the command line, of torchrun's agent, or of the first process."""
    try:
        if STORE in os.environ:
            return distributed.FileStore(os.environ[STORE], -1)  # type: ignore[attr-defined]
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = distributed.TCPStore(host, int(port), size, is_master=ours)  # type: ignore[attr-defined]
        return distributed.PrefixStore(f"jacmatch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]
    except (KeyError, ValueError, RuntimeError) as error:
        rule = "MASTER_ADDR and MASTER_PORT of the environment must say where the processes of this job meet."
        raise InputError(rule, got=f"{error}", do="Start them with torchrun.") from error


def _first(store: distributed.Store, rank: int, error: BaseException) -> BaseException:
    """What this process ends with, given its own error: that error if it is the first of the job."""
    if isinstance(error, ElsewhereError):
        return error
    meant = isinstance(error, InputError | UnsupportedError)
    code = 2 if meant else 130 if isinstance(error, KeyboardInterrupt) else 1
    lost = isinstance(error, RuntimeError) and not meant and bool(_OF_CONNECTIONS.search(str(error)))
    own = json.dumps({"rank": rank, "code": code})
    try:
        until = time.monotonic() + _TOLD_WITHIN
        while lost and time.monotonic() < until and not store.check([ERROR]):
            time.sleep(0.05)
        found = store.compare_set(ERROR, "", own).decode()
    except RuntimeError:  # the store has gone with the process that held it
        found = own
    told = json.loads(found)
    if (told["code"] == 130 and rank == 0) or (found == own and code == 130):
        return KeyboardInterrupt() if rank == 0 else ElsewhereError(130)
    if found != own:
        return ElsewhereError(told["code"])
    if lost:
        reason = " ".join(str(error).split())[:200]
        return ElsewhereError(code, _GONE.format(reason=reason))
    return error
