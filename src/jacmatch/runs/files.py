"""Strict JSON, and errors of the operating system in a run folder."""

import contextlib
import errno
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jacmatch.errors import InputError
from jacmatch.files import inside, read, replace

_FULL = "Free some space and run the same command again, or choose another {flag}."
_CLOSED = "Choose another {flag}, or make that one writable."
_LARGEST = 2**28  # of a JSON file that is read
_REMEDY = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EACCES: _CLOSED, errno.EPERM: _CLOSED, errno.EROFS: _CLOSED}


@contextlib.contextmanager
def disk(folder: Path, deed: str = "written to", *, what: str = "run folder", flag: str = "--out") -> Iterator[None]:
    """Turn an `OSError` inside the block into an `InputError` that names the remedy."""
    try:
        yield
    except OSError as error:
        rule = f"The {what} {folder} (`{flag}`) must be one that can be {deed}."
        do = _REMEDY.get(error.errno or 0, "Choose another {flag}.").format(flag=flag)
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
    raise InputError(f"`{where}` must be a value that JSON has.", got=f"a {type(value).__name__}", do=do)


def encoded(value: object, where: str) -> bytes:
    """Return the bytes of a JSON file with this value. Raises as `plain` does."""
    return (json.dumps(plain(value, where), indent=2, allow_nan=False) + "\n").encode()


def decoded(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` names the text in messages."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int)
    except (ValueError, RecursionError) as error:  # also: bytes that are no UTF-8
        raise _damaged(where, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(where, f"a {type(value).__name__}")
    return value


def load(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file."""
    with disk(file.parent, "read"):
        text = read(file.parent, file, _LARGEST)
    return decoded(text, str(file))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the largest number")
    return value


def _int(text: str) -> int:
    _float(text)
    return int(text)


def _damaged(where: str, got: str) -> InputError:
    return InputError(
        f"{where} must be one JSON object.", got=got, do="It is damaged: copy it again or run the job again."
    )
