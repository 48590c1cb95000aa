"""Writing the shards of a cache: whole or not at all."""

import errno
import hashlib
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from jacmatch.errors import UnsupportedError
from jacmatch.files import inside, replace, unfinished_name
from jacmatch.runs.files import encoded
from jacmatch.teachers.cached.layout import disk
from jacmatch.teachers.cached.shards import SUMS, memory_of


def write_shard(folder: Path, name: str, entries: Mapping[str, Tensor]) -> None:
    """Writes a shard as a memory-mapped tensordict: to a folder beside its place, then to the disk, then renamed.

    If another process has been faster, the shard is left as that one wrote it.

    Args:
        folder: Of the cache.
        name: Of the shard.
        entries: Its fields, on the CPU; a row for each sample.

    Raises:
        UnsupportedError: tensordict is not installed.
        InputError: The disk refuses.
    """
    try:
        from tensordict import TensorDict
    except ImportError as error:
        raise UnsupportedError("Writing a cache needs tensordict: pip install 'jacmatch[train]'.") from error
    target = folder / name
    part = target.with_name(unfinished_name(target.name))
    rows = len(entries["ids"])
    sums: dict[str, dict[str, Any]] = {}
    with disk(folder, "written to"):
        inside(folder, target)
        try:
            part.mkdir(parents=True)
            shard = TensorDict({}, batch_size=[rows]).memmap_(part)
            for field, tensor in entries.items():
                _reserve(part / f"{field}.memmap", tensor.nbytes)
                stored = shard.make_memmap(field, tensor.shape, dtype=tensor.dtype)
                stored.copy_(tensor)
                sums[field] = _sums(memory_of(tensor))
            replace(part / SUMS, encoded({"rows": rows, "fields": sums}, SUMS))
            for file in (*part.iterdir(), part):
                _to_disk(file)
            if not target.exists():
                _rename(part, target)
                _to_disk(target.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _rename(part: Path, target: Path) -> None:
    """Gives the folder its name, unless another process has been faster since it was looked for."""
    try:
        part.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _reserve(file: Path, size: int) -> None:
    """Takes the space from the disk at once: a full disk is then an error here, and not a signal while copying.

    Nor one of torch, which maps the file and says it in a way of its own.
    """
    if hasattr(os, "posix_fallocate") and size:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)


def _to_disk(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sums(data: memoryview) -> dict[str, Any]:
    return {"bytes": len(data), "crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest()}
