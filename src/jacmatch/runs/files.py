"""Files in a run folder: strict JSON, errors of the operating system, and the lock for one process at a time."""

import contextlib
import errno
import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jacmatch.errors import InputError
from jacmatch.files import check_single, inside, open_regular, read, replace

_FULL = "Free some space and run the same command again, or choose another {flag}."
_CLOSED = "Choose another {flag}, or make that one writable."
_LIMIT = "Raise the limit of the file size (`ulimit -f`) and run the same command again."
_LARGEST = 2**28  # bytes; the limit for a JSON file
_REMEDY = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _LIMIT}
_REMEDY |= {errno.EACCES: _CLOSED, errno.EPERM: _CLOSED, errno.EROFS: _CLOSED}


@contextlib.contextmanager
def disk(folder: Path, be: str = "writable", *, what: str = "run folder", flag: str = "--out") -> Iterator[None]:
    """Turn an `OSError` in the block into an `InputError` with the remedy."""
    try:
        yield
    except OSError as error:
        named, do = "", "Check its permissions."
        if be == "writable":
            named, do = f" (`{flag}`)", _REMEDY.get(error.errno or 0, "Choose another {flag}.").format(flag=flag)
        rule = f"The {what} {folder}{named} must be {be}."
        raise InputError(rule, got=f"'{error.strerror or error}'", do=do) from error


@contextlib.contextmanager
def undone_on_failure(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Create `folder` and its missing parents for the block; if it fails, remove them and the named files."""
    with disk(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise


def write_whole(folder: Path, name: str, data: bytes | memoryview, **where: str) -> Path:
    """Write a file atomically with `jacmatch.files.replace`, and return its path; `where` is for `disk`."""
    target = folder / name
    with disk(folder, **where):
        inside(folder, target.parent)
        replace(target, data)
    return target


def plain(value: object, where: str) -> Any:
    """Convert a value to the types of JSON: dict, list, str, int, float, bool, None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            do = "Write null where there is no number."
            raise InputError(f"`{where}` must be a finite number to be written as JSON.", got=value, do=do)
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"The keys of `{where}` must be strings to be written as JSON.", got=repr(key))
        return {str(key): plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    do = "Convert it to a number, a string, a list or a dict first."
    raise InputError(f"`{where}` must be a JSON value.", got=f"a {type(value).__name__}", do=do)


def encoded(value: object, where: str) -> bytes:
    """Return the bytes of a JSON file with this value. Raises as `plain` does."""
    return (json.dumps(plain(value, where), indent=2, allow_nan=False) + "\n").encode()


def decoded(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` names the text in messages."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not UTF-8
        raise _damaged(where, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(where, f"a {type(value).__name__}")
    return value


def load(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file."""
    with disk(file.parent, "readable"):
        text = read(file.parent, file, _LARGEST)
    return decoded(text, str(file))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the largest number")
    return value


def _int(text: str) -> int:
    _float(text)
    return int(text)


def _damaged(where: str, got: str) -> InputError:
    rule = f"{where} must be one JSON object."
    return InputError(rule, got=got, do="It is damaged: copy it again or run the job again.")


LOCK = ".lock"
"""The lock file; it is removed on release, and one left by a killed process is free."""
_BETWEEN = 0.2  # seconds between two attempts
_RETRY = 0.05  # seconds of one attempt: the owner may remove the file meanwhile
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # errors of a file system without locks

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
            _sign(folder / LOCK)  # the owner is not recorded, and the lock is valid anyway
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
