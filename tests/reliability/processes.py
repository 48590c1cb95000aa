"""Commands in processes that are killed, or refused by the disk, at a moment that one can choose.

A process is forked from this one, which has imported everything and never trained: it begins at once.
"""

import errno
import gc
import hashlib
import importlib
import io
import json
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

PHASES = ("elsewhere", "a step", "a checkpoint", "a shard of a cache", "the final write")
_MEASURED = ("seconds", "samples_per_second", "peak_memory_bytes", "tables", "made")
_EXISTS = ("environment.json", "report.html", "table.md", "table.csv")  # times are in them
_SPACE = ("fsync", "replace", "rename", "mkdir", "posix_fallocate", "open")  # what a full disk refuses


@dataclass
class Moment:
    """When to do what: at the disk operation of that number, counted from 0; None: never."""

    operation: int | None = None
    deed: str = "kill"


@dataclass
class Board:
    """What a forked process tells about itself, in memory that outlives it."""

    memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))

    @property
    def phase(self) -> str:
        """What it was doing."""
        return PHASES[self.memory[0]]

    @property
    def operations(self) -> int:
        """How many disk operations it made."""
        return int.from_bytes(self.memory[1:5], "little")


def begun(folder: Path, commands: list[list[str]], board: Board, moment: Moment, log: Path | None = None) -> int:
    """The id of a process that does the commands in a folder, one after the other."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        output = os.open(log or folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1, closefd=False) for each in (1, 2))  # not pytest's
        os.chdir(folder)
        os.environ["JACMATCH_CACHE"] = str(folder / "kept")
        _watch_phases(board)
        _watch_disk(board, moment)
        code = _all(commands)
        gc.collect()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def _all(commands: list[list[str]]) -> int:
    from jacmatch.cli import main

    for words in commands:
        out = Path(words[words.index("--out") + 1], "result.json") if "--out" in words else None
        finished = out is not None and out.exists()
        code = main(words)
        if code and not (finished and code == 2):
            return code
    return 0


def ended(process: int, *, kill_after: float | None = None) -> int:
    """The exit code of a process, below 0 if it was killed: by this function after so many seconds."""
    deadline = None if kill_after is None else time.perf_counter() + kill_after
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.perf_counter() >= deadline:
            os.kill(process, signal.SIGKILL)
            deadline = None
        time.sleep(0.0005)


WATCHED = (
    ("jacmatch.training.loop", "_train_step", "a step"),
    ("jacmatch.training.checkpoints", "keep", "a checkpoint"),
    ("jacmatch.teachers.cached.writer", "write_shard", "a shard of a cache"),
    ("jacmatch.teachers.cached.writer", "write_whole", "a shard of a cache"),
    ("jacmatch.jobs.networks", "save", "the final write"),
    ("jacmatch.jobs.study", "write_report", "the final write"),
    ("jacmatch.runs", "Run.write_result", "the final write"),
)
"""Where a function is looked up, its name, and the phase in which it runs."""


def watched() -> Iterator[tuple[object, str, str]]:
    """The owner, the name and the phase of each function of `WATCHED`."""
    for module, path, phase in WATCHED:
        *owners, name = path.split(".")
        yield reduce(getattr, owners, importlib.import_module(module)), name, phase


def _watch_phases(board: Board) -> None:
    def announced(owner: object, name: str, phase: str) -> None:
        real = getattr(owner, name)

        def inside(*given: object, **named: object) -> object:
            before, board.memory[0] = board.memory[0], PHASES.index(phase)
            try:
                return real(*given, **named)
            finally:
                board.memory[0] = before

        setattr(owner, name, inside)

    for owner, name, phase in watched():
        announced(owner, name, phase)


def _watch_disk(board: Board, moment: Moment) -> None:
    def counted(owner: object, name: str, counts: Callable[..., bool] = lambda *_, **__: True) -> None:
        real = getattr(owner, name)

        def inside(*given: object, **named: object) -> object:
            if counts(*given, **named):
                number = board.operations
                board.memory[1:5] = (number + 1).to_bytes(4, "little")
                if number == moment.operation:
                    if moment.deed == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if name in _SPACE:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))
            return real(*given, **named)

        setattr(owner, name, inside)

    for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "posix_fallocate"):
        counted(os, name)
    counted(io, "open", lambda file, mode="r", *_, **__: any(letter in mode for letter in "wax+"))


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds: a digest of each file, without what the clock decides."""
    return dict(_contents(folder))


def _contents(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() or name == "log":
            continue
        content = b"" if file.name in _EXISTS else file.read_bytes()
        if file.suffix in (".json", ".jsonl") and content:
            lines = content.splitlines() if file.suffix == ".jsonl" else [content]
            content = json.dumps([_plain(json.loads(line), folder) for line in lines]).encode()
        yield name, hashlib.sha256(content).hexdigest()


def _plain(value: object, folder: Path) -> object:
    if isinstance(value, dict):
        return {key: _plain(each, folder) for key, each in value.items() if key not in _MEASURED}
    if isinstance(value, list):
        return [_plain(each, folder) for each in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value
