"""Read files that may be missing, damaged, huge or of another kind."""

import csv
import hashlib
import os
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from jacmatch.errors import InputError, converted_errors

# What gzip, zip, tar, numpy (whose headers are Python), json and Pillow raise on broken files.
_OF_FORMATS = (zlib.error, zipfile.BadZipFile, tarfile.TarError, struct.error, SyntaxError, tokenize.TokenError)
_BROKEN = (OSError, EOFError, ValueError, LookupError, RuntimeError, MemoryError, csv.Error, *_OF_FORMATS)


def user_path(text: str) -> Path:
    """Return a user's path; `~` is the home folder, or unchanged if that is unknown."""
    return Path(os.path.expanduser(text))


def cache_folder() -> Path:
    """Return the cache folder: `JACMATCH_CACHE`, else `jacmatch` in the user's cache."""
    named = os.environ.get("JACMATCH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jacmatch"
    return user_path(str(named))


is_dir, is_file = os.path.isdir, os.path.isfile  # the methods of `Path` may raise for invalid names


def existing_folder(text: str, source: str) -> Path:
    """Return the path of an existing folder; `source` names the data set in messages, and `~` is the home folder."""
    return _existing(text, source, "DIR", "folder", f"data/{source}", is_dir)


def existing_file(text: str, source: str) -> Path:
    """Return the path of an existing file; otherwise like `existing_folder`."""
    return _existing(text, source, "FILE", "file", f"data.{source}", is_file)


def _existing(text: str, source: str, word: str, kind: str, example: str, is_kind: Callable[[Path], bool]) -> Path:
    flag = "--teacher" if source in ("csv", "parquet") else "--data"
    rule = f"`{flag} {source}:{word}` must name an existing {kind}."
    if not text:
        raise InputError(rule, got=f"no {kind}", do=f"Write for example {source}:{example}.")
    path = user_path(text)
    if not is_kind(path):
        raise InputError(rule, got=f"{text!r}, which {_what_is(path)}", do="Check the path.")
    return path


def _what_is(path: Path) -> str:
    if is_dir(path):
        return "is a folder"
    if is_file(path):
        return "is a file"
    return "is not a regular file" if os.path.lexists(path) else "does not exist"


def reading(path: Path | str, kind: str, do: str) -> AbstractContextManager[None]:
    """Turn any error of the block, which reads one file, into an `InputError` that names the file."""
    return converted_errors(f"{path} must be {kind}.", do, of=_BROKEN)


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name; an `InputError` if it cannot be listed."""
    with reading(folder, "a readable folder", "Check its permissions."):
        return sorted(folder.iterdir(), key=lambda path: path.name)


def check_file_size(path: Path, expected: int, do: str) -> None:
    """Refuse a file of another size in bytes."""
    size = path.stat().st_size
    if size != expected:
        raise InputError(f"{path} must have {expected:,} bytes.", got=f"{size:,}", do=do)


def check_digest(content: bytes | memoryview, expected: str, path: Path, do: str) -> None:
    """Refuse content with another SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        rule = f"{path} must contain the data set's official content (SHA-256 {expected[:12]}…)."
        raise InputError(rule, got=f"{digest[:12]}…", do=do)


def check_memory(needed: int, what: str, do: str) -> None:
    """Refuse data that do not fit into memory: a file of a few MB can claim terabytes."""
    available = _physical_memory()
    if needed > available:
        got = f"{needed / 2**30:,.1f} GiB on a machine with {available / 2**30:,.1f}"
        raise InputError(f"{what} must fit into memory.", got=got, do=do)


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # some systems lack these names
        return 2**63
