"""Safe access to files in folders of other users: no link is followed, and writes are atomic.

Any name in a run folder or cache can be a symbolic link, a hard link, a named pipe or a folder. All reads and writes
there go through this module, so that no file outside the folder is changed or read. It needs the standard library only.
"""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from jacmatch.errors import InputError

UNFINISHED = ".jacmatch-part"
"""Suffix of the name of an incomplete file."""
# Windows has neither of the first two flags; there, only the check before opening protects.
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def inside(folder: Path, file: Path, largest: int | None = None) -> Path:
    """Return the file, after resolving links and checking that it is in the folder and has at most `largest` bytes."""
    top, real = os.path.realpath(folder), os.path.realpath(file)
    if os.path.commonpath([top, real]) != top:
        do = "Copy its target into the folder, if you trust it."
        raise InputError(f"{file} must lie in {folder}.", got="a link that leads out of it", do=do)
    if largest is not None and os.path.isfile(real) and os.path.getsize(real) > largest:
        raise InputError(f"{file} must have at most {largest:,} bytes.", got=f"{os.path.getsize(real):,}")
    return file


def open_regular(path: str | os.PathLike[str], flags: int, *, single: bool = False) -> int:
    """Return a descriptor of a regular file, following no link; `single` also refuses a file with a hard link.

    `flags` are those of `os.open`, except O_TRUNC, which would truncate the file before the check.
    """
    with contextlib.suppress(FileNotFoundError):  # first by name: to open a pipe or a device can have effects
        _check_regular(path, os.lstat(path), single)
    descriptor = os.open(path, flags | _CAREFUL, 0o666)
    try:
        _check_regular(path, os.fstat(descriptor), single)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: str | os.PathLike[str], status: os.stat_result, single: bool) -> None:
    got = None
    if not stat.S_ISREG(status.st_mode):
        got = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
    elif single and status.st_nlink > 1:
        got = "a file with a second name (a hard link)"
    if got is not None:
        do = "Replace it by a copy of its target if you trust that, or remove it."
        raise InputError(f"{path} must be a regular file.", got=got, do=do)


def check_single(file: Path) -> None:
    """Refuse anything of this name except a regular file without further hard links."""
    with contextlib.suppress(FileNotFoundError):
        _check_regular(file, os.lstat(file), single=True)


def check_entry(folder: Path, file: Path) -> None:
    """Refuse anything of this name except a regular file or a link to one in the same folder."""
    if os.path.lexists(file):
        real = os.path.realpath(inside(folder, file))
        _check_regular(file, os.lstat(real if os.path.lexists(real) else file), single=False)


def read(folder: Path, file: Path, largest: int | None = None) -> bytes:
    """Return the content of a file in a folder; a link is followed if it stays in the folder."""
    real = os.path.realpath(inside(folder, file, largest))
    with os.fdopen(open_regular(real, os.O_RDONLY), "rb") as stream:
        return stream.read()


def append(file: Path, data: bytes) -> None:
    """Append data to a file, which is created if it is missing."""
    with os.fdopen(open_regular(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, single=True), "ab") as stream:
        stream.write(data)


def unfinished_name(name: str) -> str:
    """Return an unpredictable temporary name beside `name`, so that nobody can create a link of that name before."""
    return f".{name}.{secrets.token_hex(8)}{UNFINISHED}"


def replace(target: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: to a temporary name, synced to disk, then renamed; readers see the old or the new file.

    A link of that name is replaced, not followed. On failure nothing is left behind.
    """
    unfinished = target.with_name(unfinished_name(target.name))
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFUL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
