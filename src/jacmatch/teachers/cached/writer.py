"""The writer of a cache, for any number of processes; each continues what others have not finished.

A shard is written whole or not at all: to a folder beside the final one, then to the disk, then renamed.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacmatch import files
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.files import UNFINISHED, inside, unfinished_name
from jacmatch.runs.files import Lock, encoded, try_lock
from jacmatch.runs.identity import COARSE, SINGLE, changed, probe
from jacmatch.teachers.base import Answer, Question
from jacmatch.teachers.cached.format import (
    HEAD,
    Field,
    Head,
    Storage,
    described,
    disk,
    fields_of,
    folder_of,
    positions_name,
    read_head,
    rows_of,
    shard_name,
    write_whole,
)
from jacmatch.teachers.cached.reader import SUMS, Shards, agree, memory_of
from jacmatch.version import __version__

_NAME = ".claim"
_BETWEEN = 0.02  # seconds between two attempts to lock
_MEGABYTE = 1 << 20
_ON_GPU = 1e-4  # sums on a GPU have no fixed order


class Claims:
    """Locks on numbers in a folder, with one file for each number that is locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def on(self, number: int) -> Iterator[bool]:
        """Lock the number for the block; False if another process has it."""
        lock = self._try(f"{_NAME}-{number:05d}")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run the block in one process at a time; other processes wait."""
        while (lock := self._try(_NAME)) is None:
            time.sleep(_BETWEEN)
        try:
            yield
        finally:
            lock.release()

    def _try(self, name: str) -> Lock | None:
        with disk(self.folder):
            return try_lock(self.folder / name)


def write_shard(folder: Path, name: str, entries: Mapping[str, Tensor]) -> None:
    """Write a shard as a memory-mapped tensordict: to a folder beside the final one, then to the disk, then renamed.

    A shard that another process has written first is not replaced.
    """
    try:
        from tensordict import TensorDict
    except ImportError as error:
        raise UnsupportedError("Writing a cache needs tensordict: pip install 'jacmatch[train]'.") from error
    target = folder / name
    part = target.with_name(unfinished_name(target.name))
    rows = len(entries["ids"])
    sums: dict[str, dict[str, Any]] = {}
    with disk(folder):
        inside(folder, target)
        try:
            part.mkdir(parents=True)
            shard = TensorDict({}, batch_size=[rows]).memmap_(part)
            for field, tensor in entries.items():
                _reserve(part / f"{field}.memmap", tensor.nbytes)
                stored = shard.make_memmap(field, tensor.shape, dtype=tensor.dtype)
                stored.copy_(tensor)
                sums[field] = _sums(memory_of(tensor))
            files.replace(part / SUMS, encoded({"rows": rows, "fields": sums}, SUMS))
            for file in (*part.iterdir(), part):
                _to_disk(file)
            if not target.exists():
                _rename(part, target)
                _to_disk(target.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _rename(part: Path, target: Path) -> None:
    """Rename the folder, unless another process has created the target meanwhile."""
    try:
        part.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _reserve(file: Path, size: int) -> None:
    """Allocate the space now: a full disk is then an error here, and not a signal while the file is mapped."""
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


@dataclass
class Counts:
    """Numbers of shards: written, already present (`found`), repaired (`mended`), or left to another process."""

    written: int = 0
    found: int = 0
    mended: int = 0
    left: int = 0


@dataclass(frozen=True, eq=False)
class Answers:
    """A query for a batch, its answer, and the answer to the same query without products."""

    x: Tensor
    question: Question
    answer: Answer
    alone: Answer | None = None


@dataclass(frozen=True, eq=False)
class Queries:
    """The queries of one run to its teacher, in the order of its training."""

    seed: int  # seed of the run
    samples: int  # samples in the training split
    batch_size: int  # samples in a query
    views: int  # views of each sample
    constant: bool  # whether the query is the same in every view
    fingerprint: dict[str, str]  # everything that determines the answers, by name
    order: Callable[[int], Tensor]  # the rows in the order of a view
    answers: Callable[[Tensor, int], Answers]  # the answers for some rows in a view

    def entries(self, rows: Tensor, view: int, fields: Sequence[Field]) -> dict[str, Tensor]:
        """Return the answers as entries of a shard."""
        answers = self.answers(rows, view)
        return rows_of(answers.answer, answers.x, answers.question, fields, answers.alone)

    def entries_at(self, view: int, positions: range, fields: Sequence[Field]) -> dict[str, Tensor]:
        """Return the entries at these positions in the order of a view, queried in the batches of the training.

        Rows after the last full batch are queried together with those before them: on a CPU the last digits of an
        answer depend on the size of the batch.
        """
        order, size = self.order(view), self.batch_size
        parts = []
        for start in range(positions.start, positions.stop, size):
            first = min(start, len(order) - size)
            entries = self.entries(order[first : first + size], view, fields)
            parts.append({name: tensor[start - first :] for name, tensor in entries.items()})
        return {field.name: torch.cat([part[field.name] for part in parts]) for field in fields}

    def positions_of(self, view: int) -> Tensor:
        """Return the position of each row in the order of a view."""
        return self.order(view).cpu().argsort()


def head_of(source: Queries, storage: Storage, megabytes: float, settings: dict[str, Any]) -> Head:
    """Return the head of this cache; the teacher is queried twice for the first batch."""
    first, again = (source.answers(source.order(0)[: source.batch_size], 0) for _ in range(2))
    device = first.x.device
    if not agree(first.answer, again.answer, _ON_GPU if device.type == "cuda" else 0.0):
        rule = "The teacher of a cache must give the same answer twice."
        do = "Something in it is random, or a query changes it: its answers cannot be stored."
        raise InputError(rule, got="two different answers for one batch", do=do)
    fields = fields_of(first.answer, first.question, storage, first.alone)
    size = source.batch_size
    each = sum(field.size for field in fields)
    batches = max(1, int(megabytes * _MEGABYTE) // (size * each))
    made = {"jacmatch": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    loose = SINGLE if device.type == "cpu" else COARSE
    made["outputs"] = probe(first.answer.outputs.double().flatten().tolist(), loose)  # outputs of the first samples
    return Head(
        fingerprint=source.fingerprint,
        question=described(first.question),
        fields=fields,
        samples=source.samples,
        views=source.views,
        constant=source.constant,
        batch=size,
        shard=size * min(batches, -(-source.samples // size)),
        settings=settings,
        made={**made, "device": str(device)},
    )


def resolve_head(folder: Path, head: Head) -> Head:
    """Return the head of the cache in a folder, after extending it if it has fewer views than this head.

    Call it from one process at a time.
    """
    _remove_orphans(folder / HEAD)
    if (folder / HEAD).is_file():
        there = read_head(folder)
        apart = changed(_compared(there), _compared(head))
        if not apart and "outputs" in there.made:  # what leaves no trace in a fingerprint, a hook for instance
            apart = changed({"teacher outputs": there.made["outputs"]}, {"teacher outputs": head.made["outputs"]})
        if apart:
            rule = f"The folder {folder} (`--cache`) must be new, or contain this cache."
            raise InputError(rule, got=f"one that differs in {apart}", do="Choose another --cache.")
        if there.views >= head.views:
            return there
        head = replace(there, views=head.views, settings=head.settings)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder, HEAD, head.text())
    return head


def _compared(head: Head) -> dict[str, str]:
    """Return what must be equal in the cache of the folder and the requested one."""
    stored = {f"stored {field.name}": f"{field.dtype} {list(field.shape)}" for field in head.fields}
    query = {f"query {name}": value for name, value in head.question.items()}
    return {**head.fingerprint, **query, **stored, "samples in a shard": str(head.shard)}


def build(
    sources: list[tuple[Queries, Head]],
    cache: Path,
    rank: int = 0,
    size: int = 1,
    on_shard: Callable[[int], None] | None = None,
) -> Counts:
    """Write the shards of this process that are missing or damaged.

    Each shard is assigned to one process. Two processes that were started separately never write the same shard at the
    same time: the second one skips it. `sources` are the queries of each run and the head of its cache; `cache` is the
    folder that contains all of them. `on_shard` is called with the number of finished shards.
    """
    counts, number = Counts(), 0
    for source, head in sources:
        folder = folder_of(cache, source.seed)
        claims = Claims(folder)
        for index, (view, shard) in enumerate(head.names()):
            number += 1
            if (number - 1) % size == rank:
                with claims.alone():
                    _write_positions(source, folder, head, view)
                with claims.on(index) as mine:
                    _one(source, folder, head, view, shard, counts if mine else None)
                    counts.left += not mine
                if on_shard is not None:
                    on_shard(sum(asdict(counts).values()))
    return counts


def _one(source: Queries, folder: Path, head: Head, view: int, shard: int, counts: Counts | None) -> None:
    """Write a shard, unless it is complete."""
    if counts is None:
        return
    name = shard_name(view, shard)
    inside(folder, folder / name)
    _remove_orphans(folder / name)
    if (folder / name).exists():
        with contextlib.suppress(InputError):
            Shards(folder).verify(view, shard)
            counts.found += 1
            return
        with disk(folder):
            shutil.rmtree(folder / name)
        counts.mended += 1
    else:
        counts.written += 1
    write_shard(folder, name, source.entries_at(view, head.rows(shard), head.fields))


def _remove_orphans(path: Path) -> None:
    """Remove what a killed process left of a file or a shard; call it where no other process writes that."""
    with disk(path.parent):
        for orphan in path.parent.glob(f".{path.name}.*{UNFINISHED}"):
            if orphan.is_dir() and not orphan.is_symlink():
                shutil.rmtree(orphan)
            else:
                orphan.unlink()


def _write_positions(source: Queries, folder: Path, head: Head, view: int) -> None:
    """Write the position of each sample in a view, once; one process at a time."""
    file = inside(folder, folder / positions_name(view))
    _remove_orphans(file)
    with disk(folder):
        if file.is_file() and file.stat().st_size == 8 * head.samples:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder, positions_name(view), source.positions_of(view).numpy().tobytes())
