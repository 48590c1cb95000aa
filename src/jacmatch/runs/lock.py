"""A lock for run folders: one process at a time, released when that process ends for any reason."""

import contextlib
import errno
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jacmatch.errors import InputError
from jacmatch.files import check_single, open_regular
from jacmatch.runs.files import disk

LOCK = ".lock"
"""The lock file; it is removed on release, and one left by a killed process is free."""
_BETWEEN = 0.2  # seconds between two attempts
_RETRY = 0.05  # seconds of one attempt: the owner may remove the file meanwhile
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # of a file system without locks

_locks: "weakref.WeakValueDictionary[tuple[str, int], Lock]" = weakref.WeakValueDictionary()


class Lock:
    """A file that is locked by this process as long as the object lives; see `try_lock` and `hold`."""

    def __init__(self, file: Path, lock: Any) -> None:
        self.release = weakref.finalize(self, _release, file, lock, os.getpid())


def try_lock(file: Path) -> Lock | None:
    """Lock a file, creating it if needed; return None if another process has the lock.

    `filelock` opens an existing file, so it is checked first: symbolic links, hard links and non-files are refused. On
    a file system without locks, the lock has no effect.
    """
    from filelock import FileLock, Timeout  # torch brings it

    lock = FileLock(file, thread_local=False)
    check_single(file)
    try:
        lock.acquire(timeout=_RETRY, poll_interval=_RETRY / 5)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return Lock(file, lock)


def hold(folder: Path, *, wait: Callable[[], None] | None = None) -> Lock:
    """Acquire the lock of an existing folder. Within one process it is the same object at every call.

    If another process has the lock, `wait` is called once, and this process waits. Without `wait`, this is an error.
    """
    name = os.path.realpath(folder), os.getpid()
    before = _locks.get(name)
    if before is not None and before.release.alive:
        return before
    with disk(folder):
        while (lock := try_lock(folder / LOCK)) is None:
            if wait is None:
                rule = f"The run folder {folder} (`--out`) must be in use by one process at a time."
                raise InputError(rule, got=f"another one{_owner(folder)}", do="Wait for it, or choose another --out.")
            wait()
            wait = _nothing
            time.sleep(_BETWEEN)
        with contextlib.suppress(OSError):  # on a full disk, or on Windows, where a locked file cannot be written:
            _sign(folder / LOCK)  # the owner is not recorded, and the lock is valid all the same
    _locks[name] = lock
    return lock


def _nothing() -> None:
    pass


def _sign(file: Path) -> None:
    """Write the process id into the lock file."""
    descriptor = open_regular(file, os.O_WRONLY, single=True)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    finally:
        os.close(descriptor)


def _owner(folder: Path) -> str:
    """The process id in the lock file, for a message."""
    try:
        descriptor = open_regular(folder / LOCK, os.O_RDONLY)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        signed = file.read(20).decode(errors="replace")
    return f" (process {signed})" if signed.isdecimal() else ""


def _release(file: Path, lock: Any, process: int) -> None:
    if os.getpid() != process:  # a forked copy, which never had the lock
        return
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)  # while it is locked: a process that has opened it meanwhile opens it again
    lock.release()
