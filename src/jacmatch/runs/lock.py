"""One process at a time in a run folder: a lock that ends with the process that holds it, however that ends."""

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
"""The file in the folder; it goes when the lock is given back, and a lock that was left by a killed process is free."""
_BETWEEN = 0.2  # seconds between two questions whether a folder is free
_RETRY = 0.05  # seconds for one question: the holder may remove the file in the middle of it
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # of a file system without locks

_held: "weakref.WeakValueDictionary[tuple[str, int], Lock]" = weakref.WeakValueDictionary()


class Lock:
    """A file that is locked for this process for as long as the object lives; see `try_lock` and `hold`."""

    def __init__(self, file: Path, lock: Any) -> None:
        self.release = weakref.finalize(self, _release, file, lock, os.getpid())


def try_lock(file: Path) -> Lock | None:
    """Return the lock on a file, which is made if it is not there; None if another process has it.

    `filelock` opens a file that is already there, so it is looked at before: a link, a hard link too, and what is no
    file are refused. A file system without locks gives a lock that keeps nobody out.

    Raises:
        InputError: The file is one of these.
        OSError: The operating system refuses.
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
    """The lock of a folder. Within one process it is the same object however often it is asked for.

    Args:
        folder: An existing folder.
        wait: Called once if another process has it, before this one waits for its turn; None: that is an error.

    Raises:
        InputError: Another process has it, something else has its name, or the disk refuses.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> lock = hold(folder)
        >>> hold(folder) is lock
        True
        >>> _ = lock.release()
        >>> list(folder.iterdir())
        []
    """
    name = os.path.realpath(folder), os.getpid()
    before = _held.get(name)
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
        with contextlib.suppress(OSError):  # a full disk, or Windows, where a locked file is closed to all: who has the
            _sign(folder / LOCK)  # folder is not said, and it is held all the same
    _held[name] = lock
    return lock


def _nothing() -> None:
    pass


def _sign(file: Path) -> None:
    """Writes into the lock who has it."""
    descriptor = open_regular(file, os.O_WRONLY, single=True)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    finally:
        os.close(descriptor)


def _owner(folder: Path) -> str:
    """Who says to have the folder."""
    try:
        descriptor = open_regular(folder / LOCK, os.O_RDONLY)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        signed = file.read(20).decode(errors="replace")
    return f" (process {signed})" if signed.isdecimal() else ""


def _release(file: Path, lock: Any, process: int) -> None:
    if os.getpid() != process:  # a copy in a forked process, which never had the lock
        return
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)  # while it is held: a process that has opened it meanwhile opens it anew
    lock.release()
