"""One process at a time in a run folder: a lock that ends with the process that holds it, however that ends."""

import contextlib
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from jacmatch.errors import InputError
from jacmatch.runs.files import disk

try:
    import fcntl
except ImportError:  # not on Windows: there nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file in the folder; it goes when the lock is given back, and a lock that was left by a killed process is free."""
_BETWEEN = 0.2  # seconds between two questions whether a folder is free

_held: "weakref.WeakValueDictionary[tuple[str, int], Lock]" = weakref.WeakValueDictionary()


class Lock:
    """A folder that belongs to this process for as long as the object lives; see `hold`."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self.release = weakref.finalize(self, _release, folder / LOCK, descriptor, os.getpid())


def hold(folder: Path, *, wait: Callable[[], None] | None = None) -> Lock:
    """The lock of a folder. Within one process it is the same object however often it is asked for.

    A file system without locks gives one that keeps nobody out.

    Args:
        folder: An existing folder.
        wait: Called once if another process has it, before this one waits for its turn; None: that is an error.

    Raises:
        InputError: Another process has it, or the disk refuses.

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
    while (descriptor := _try(folder)) is None:
        if wait is None:
            rule = f"The run folder {folder} (`--out`) must be in use by one process at a time."
            raise InputError(rule, got=f"another one{_owner(folder)}", do="Wait for it, or choose another --out.")
        wait()
        wait = _nothing
        time.sleep(_BETWEEN)
    _held[name] = lock = Lock(folder, descriptor)
    return lock


def _nothing() -> None:
    pass


def _try(folder: Path) -> int | None:
    """A descriptor of the file with the lock on it; None if another process has it."""
    file = folder / LOCK
    with disk(folder):
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            if fcntl is None:
                return descriptor
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                return None
            except OSError:
                return descriptor  # a file system without locks
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    break
            except FileNotFoundError:
                pass
            os.close(descriptor)  # its owner has removed the file between the two lines: once more
        with contextlib.suppress(OSError):  # a full disk: who has the folder is not said, and it is held all the same
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _owner(folder: Path) -> str:
    """Who says to have the folder."""
    try:
        said = (folder / LOCK).read_text()
    except OSError:
        return ""
    return f" (process {said})" if said.isdecimal() else ""


def _release(file: Path, descriptor: int, process: int) -> None:
    if os.getpid() != process:  # a copy in a forked process, which never had the lock
        return
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
    os.close(descriptor)
