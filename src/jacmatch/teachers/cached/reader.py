"""The reader of a cache: its shards, and the teacher that answers from them."""

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError, few
from jacmatch.files import inside, open_regular, read
from jacmatch.runs.files import decoded
from jacmatch.runs.identity import changed
from jacmatch.teachers.base import Answer, Question
from jacmatch.teachers.cached.format import TYPES, described, disk, positions_name, read_head, shard_name, unlike

SUMS = "shard.json"
_BLOCK = 1 << 20
_OPEN_FILES = 256  # maximum number; opening a file takes as long as ten reads of a row
_AGAIN = "Run the same `jacmatch cache build` to repair it."


def memory_of(tensor: Tensor) -> memoryview:
    """The tensor's memory, to read or to write."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


class Shards:
    """A cache of one seed on disk, open for reading. Only the content of `cache.json` is in memory.

    Rows are read at their positions in the files instead of through a memory map. The memory in use therefore does not
    grow with the number of rows read, and a truncated file is an error instead of a signal. The checksums of a shard
    are compared when it is first read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.head = folder, read_head(folder)
        self._fields = {field.name: field for field in self.head.fields}
        self._sound: set[tuple[int, int]] = set()
        self._sizes = {field.name: field.size for field in self.head.fields}
        self._opened = lru_cache(_OPEN_FILES)(partial(_File, folder))

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path]]:
        return Shards, (self.folder,)  # a copy, also in another process, opens the files anew

    def missing(self) -> list[str]:
        """Return the names of missing shards and position files; compares sizes, not contents."""
        absent = []
        for view in range(self.head.views):
            if not self._has_size(positions_name(view), 8 * self.head.samples):
                absent.append(positions_name(view))
            for shard in range(self.head.shards):
                name, rows = shard_name(view, shard), len(self.head.rows(shard))
                if not (self.folder / name).is_dir():
                    absent.append(name)
                    continue
                for field in self.head.fields:
                    if not self._has_size(f"{name}/{field.name}.memmap", rows * field.size):
                        raise _wrong(self.folder / name, f"no {field.name}.memmap")
        return absent

    def _has_size(self, name: str, size: int) -> bool:
        """Return whether the file exists; raise if it has another size."""
        with disk(self.folder, "readable"):
            try:
                actual = inside(self.folder, self.folder / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return False
        if actual != size:
            raise _wrong(self.folder / name, f"{actual:,} bytes instead of {size:,}")
        return True

    def verify(self, view: int, shard: int, *, strong: bool = False) -> None:
        """Compare a shard with the checksums beside it: CRC-32, or with `strong` SHA-256."""
        folder, rows = self.folder / shard_name(view, shard), len(self.head.rows(shard))
        with disk(self.folder, "readable"):
            if not (folder / SUMS).is_file():
                raise _wrong(folder, f"no {SUMS}")
            sums = decoded(read(self.folder, folder / SUMS, _BLOCK), str(folder / SUMS)).get("fields")
            for field in self.head.fields:
                stored = sums.get(field.name) if isinstance(sums, dict) else None
                file = inside(self.folder, folder / f"{field.name}.memmap")
                if not isinstance(stored, dict) or not file.is_file() or file.stat().st_size != rows * field.size:
                    raise _wrong(folder, f"another size or no checksum of {file.name}")
                name = "sha256" if strong else "crc32"
                if _of_file(file, strong) != stored.get(name):
                    raise _wrong(folder, f"another {name} of {file.name}")
        self._sound.add((view, shard))

    def read(self, view: int, ids: Tensor) -> dict[str, Tensor]:
        """The entries of samples, a row each, in the order of the ids."""
        wanted = ids.detach().to("cpu", torch.int64)
        numbers = wanted.numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.head.samples:
            rule = f"The ids of samples must be 0 to {self.head.samples - 1}, the rows of the training split."
            raise InputError(rule, got=f"{numbers.min()} to {numbers.max()}")
        with disk(self.folder, "readable"):
            shards = list(_runs(self._positions(view, numbers), self.head.shard))
            for shard, _ in shards:
                if (view, shard) not in self._sound:
                    self.verify(view, shard)
            rows = {  # only now have the sizes in the head been compared with the files
                name: torch.empty(len(numbers), *field.shape, dtype=TYPES[field.dtype])
                for name, field in self._fields.items()
            }
            memories = {name: memory_of(tensor) for name, tensor in rows.items()}
            for shard, runs in shards:
                for name, memory in memories.items():
                    self._fill(view, shard, name, memory, runs)
        if not torch.equal(rows["ids"], wanted):
            raise _wrong(self.folder / positions_name(view), "positions that are not those of the samples")
        return rows

    def stored(self, view: int, count: int) -> Tensor:
        """Return the ids of the first `count` entries of a view, in their order on disk."""
        parts: list[Tensor] = []
        for shard in range(-(-count // self.head.shard)):
            rows = self.head.rows(shard)
            part = torch.empty(min(len(rows), count - rows.start), dtype=torch.int64)
            with disk(self.folder, "readable"):
                self._fill(view, shard, "ids", memory_of(part), [(0, 0, len(part))])
            parts.append(part)
        return torch.cat(parts)

    def _fill(self, view: int, shard: int, name: str, memory: memoryview, runs: Sequence[tuple[int, int, int]]) -> None:
        self._opened(view, shard, name).fill(memory, self._sizes[name], runs)

    def _positions(self, view: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of the samples, usually consecutive, as they were written."""
        count = len(ids)
        start = int(self._looked_up(view, ids[:1])[0]) if count else 0
        if 0 <= start <= self.head.samples - count:
            positions, there = np.arange(start, start + count), torch.empty(count, dtype=torch.int64)
            for shard, runs in _runs(positions, self.head.shard):
                self._fill(view, shard, "ids", memory_of(there), runs)
            if np.array_equal(there.numpy(), ids):
                return positions
        return self._looked_up(view, ids)

    def _looked_up(self, view: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same from the file of positions, one by one."""
        positions = np.empty(len(ids), np.int64)
        runs = [(number, sample, 1) for number, sample in enumerate(ids.tolist())]
        self._opened(view, None, "").fill(memoryview(positions.data).cast("B"), 8, runs)
        if len(positions) and not 0 <= positions.min() <= positions.max() < self.head.samples:
            raise _wrong(self.folder / positions_name(view), "positions beyond the last")
        return positions


class _File:
    """A file of a shard, or the positions of a view, that stays open for reading while it is in use."""

    def __init__(self, folder: Path, view: int, shard: int | None, name: str) -> None:
        self.path = f"{folder}/{positions_name(view) if shard is None else f'{shard_name(view, shard)}/{name}.memmap'}"
        self.descriptor = open_regular(os.path.realpath(self.path), os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # not if it could not be opened
            os.close(self.descriptor)

    def fill(self, memory: memoryview, size: int, runs: Sequence[tuple[int, int, int]]) -> None:
        """Read runs of rows (first row in the memory, first in the file, how many) of `size` bytes each."""
        for first, position, count in runs:
            part = memory[first * size : (first + count) * size]
            if _read(self.descriptor, [part], position * size) != count * size:
                raise _wrong(Path(self.path), "a file that is cut off")


def _read_by_seeking(file: int, memories: Sequence[memoryview], offset: int) -> int:
    """Do what `os.preadv` does, which Windows lacks, for one memory."""
    os.lseek(file, offset, os.SEEK_SET)
    data = os.read(file, len(memories[0]))
    memories[0][: len(data)] = data
    return len(data)


_read = getattr(os, "preadv", _read_by_seeking)


def _runs(positions: NDArray[np.int64], shard: int) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """The positions by shard, those that follow each other as one run."""
    runs: dict[int, list[tuple[int, int, int]]] = {}
    cuts = np.flatnonzero((np.diff(positions) != 1) | (positions[1:] % shard == 0)) + 1
    for first, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(positions)], strict=True):
        if first < end:
            number, position = divmod(int(positions[first]), shard)
            runs.setdefault(number, []).append((first, position, end - first))
    yield from runs.items()


def _of_file(file: Path, strong: bool) -> str | int:
    digest, crc = hashlib.sha256(), 0
    with os.fdopen(open_regular(os.path.realpath(file), os.O_RDONLY), "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            if strong:
                digest.update(block)
            else:
                crc = zlib.crc32(block, crc)
    return digest.hexdigest() if strong else crc


def _wrong(path: Path, got: str) -> InputError:
    return InputError(f"{path} must have the size and checksums that it was written with.", got=got, do=_AGAIN)


_LISTED = 3  # samples in a message


class CachedTeacher:
    """A teacher that reads the answers of another teacher from a folder of `jacmatch cache build`.

    An entry is identified by the sample's id and the draw (the view). It is returned only for the query for which it
    was stored: readout, products, probe and step must be equal, and two random projections of the input and of the
    directions must agree with the stored ones up to 10⁻⁴ of the norm. Directions are computed again from (seed, id,
    draw). Outputs and products are returned bit for bit as they were stored.

    Args:
        folder: Folder of one seed, `CACHE/seed0`.
        expected: Fingerprint of the current job; None accepts any.
        views: Number of views that the job needs.

    Raises:
        InputError: The folder is not a finished cache, was built with other settings, or has too few views.

    Example:
        After `jacmatch cache build --cache answers`, use
        `Distillation(student, CachedTeacher("answers/seed0"))`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, expected: Mapping[str, str] | None = None, views: int = 1
    ) -> None:
        self.shards = Shards(Path(folder))
        self.head = self.shards.head
        if expected is not None:
            self._is_of(expected)
        available = "every view" if self.head.constant else f"{self.head.views} views"
        if not self.head.constant and views > self.head.views:
            do = f"Train with --views {self.head.views}, or build a longer cache (--steps, --views)."
            raise InputError(f"The cache {folder} must have {views} views.", got=available, do=do)
        missing = self.shards.missing()
        if missing:
            do = "Run its `jacmatch cache build` again to finish it."
            raise InputError(f"The cache {folder} must be finished.", got=f"{few(missing)} missing", do=do)

    def _is_of(self, expected: Mapping[str, str]) -> None:
        there = dict(self.head.fingerprint)
        if expected.get("probe") == "none":  # outputs do not depend on the products of the query
            there["probe"] = "none"
        apart = changed(there, expected)
        if apart:
            do = "Build one for this job: jacmatch cache build --cache OTHER, with the flags of this command."
            raise InputError(f"The cache {self.shards.folder} must belong to this job.", got=apart, do=do)

    @property
    def answers_vjp(self) -> bool:
        """Whether vᵀJ was stored."""
        return self.head.question["products"] == "vᵀJ"

    def answer(self, x: Float[Tensor, "batch *input"], question: Question | None = None) -> Answer:
        """Return the stored outputs, and the products if the query has directions, in the dtype of x."""
        question = question or Question()
        with_products = question.cotangents is not None or question.tangents is not None
        self._fits(question, with_products)
        assert question.ids is not None
        assert question.draw is not None or self.head.constant
        view = 0 if self.head.constant else int(question.draw or 0)
        if not 0 <= view < self.head.views:
            do = f"Train with --views {self.head.views}, or build a longer cache."
            rule = f"`draw` of a query to {self.shards.folder} must be below {self.head.views}, its number of views."
            raise InputError(rule, got=view, do=do)
        rows = self.shards.read(view, question.ids)
        self._same("input", x, rows["input_sums"], question, view)
        outputs = _as(x, rows["outputs"])
        values = _as(x, rows["values"]) if "values" in rows else outputs
        if not with_products:
            return Answer(_as(x, rows.get("outputs_alone", rows["outputs"])), values)
        directions = question.tangents
        if question.cotangents is not None:
            given = question.cotangents
            directions = (given(values) if callable(given) else given).detach()
        assert directions is not None
        self._same("direction", directions.transpose(0, 1), rows["direction_sums"], question, view)
        products = _as(x, rows["products"].transpose(0, 1).contiguous())
        return Answer(outputs, values, products, cotangents=directions if question.tangents is None else None)

    def _fits(self, question: Question, with_products: bool) -> None:
        """Refuse a query whose answers are not stored."""
        if question.layers or question.readout.layers:
            raise UnsupportedError("CachedTeacher has outputs only. Use a readout of the outputs, or a live teacher.")
        if question.ids is None or (question.draw is None and not self.head.constant):
            rule = "A query to `CachedTeacher` must have `ids` and `draw`, which identify its entries."
            do = "Call the objective with ids= (rows of the training split) and draw= (the view)."
            raise InputError(rule, got=f"ids {'missing' if question.ids is None else 'given'}", do=do)
        if question.arguments is not None:
            raise UnsupportedError(
                "`CachedTeacher` stores no `context` of a batch, nor inputs of several tensors, so it cannot "
                "compare them. Use the teacher itself, or MemoizedTeacher."
            )
        here, there = described(question), dict(self.head.question)
        if not with_products:
            here, there = {"readout": here["readout"]}, {"readout": there["readout"]}
        apart = changed(there, here)
        if apart:
            do = "Build a cache for this query, or pass the query that the cache was built for."
            raise InputError(f"A query to the cache {self.shards.folder} must be the stored one.", got=apart, do=do)

    def _same(self, what: str, given: Tensor, stored: Tensor, question: Question, view: int) -> None:
        """Refuse inputs or directions other than the stored ones."""
        if len(given) != len(stored):
            rule = f"A query to `CachedTeacher` must have one {what} for each of the {len(stored)} ids."
            raise InputError(rule, got=len(given))
        wrong = unlike(given, stored)
        if bool(wrong.any()):
            assert question.ids is not None
            ids = question.ids[wrong.to(question.ids.device)].tolist()
            rule = f"The {what}s of a query to {self.shards.folder} must be those that the cache was built for."
            got = f"others for {len(ids)} of {len(given)} samples (ids {ids[:_LISTED]}, view {view})"
            do = "Data, augmentation, partners, point, probe and seed must be those of the cache."
            raise InputError(rule, got=got, do=do)


def _as(x: Tensor, stored: Tensor) -> Tensor:
    """The stored tensor with the type and on the device of x."""
    if x.device.type == "cuda" and stored.device.type == "cpu":
        stored = stored.pin_memory()
    return stored.to(x.device, non_blocking=True).to(x.dtype)


def bits_of(answer: Answer) -> list[Tensor]:
    """Return the tensors of an answer."""
    parts = (answer.outputs, answer.values, answer.products, answer.cotangents, *answer.features.values())
    return [part for part in parts if part is not None]


def agree(one: Answer, other: Answer, tolerance: float) -> bool:
    """Return whether two answers are equal up to `tolerance` times the largest number; 0 means bit for bit."""
    for first, second in zip(bits_of(one), bits_of(other), strict=True):
        if first.shape != second.shape:
            return False
        if torch.equal(first, second):
            continue
        limit = tolerance * torch.maximum(first.abs().max(), second.abs().max())
        if not tolerance or bool(((first - second).abs() > limit).any()):
            return False
    return True
