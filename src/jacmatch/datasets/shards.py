"""WebDataset shards: tar files of images, with an index for random access."""

import hashlib
import io
import os
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Int64

from jacmatch.datasets.data import Data
from jacmatch.datasets.files import cache_folder, entries, is_dir, reading
from jacmatch.datasets.folders import is_hidden, parse, split_source
from jacmatch.datasets.streamed import MAX_BYTES, Names, check_size
from jacmatch.errors import InputError, few
from jacmatch.files import UNFINISHED, read, replace

IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
_LABEL_BYTES = 32
_FORMAT = 2  # format version of the cached index
_FIRST_DOT = "The extension begins at the first dot of a file name: use no other dots."
_REMEDY = "Write it again, uncompressed, for example with webdataset.TarWriter."


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar file, in its order."""

    keys: Names  # name of each sample: the part of its file names before the first dot
    offsets: Int64[np.ndarray, "sample"]  # where its image begins in the file
    sizes: Int64[np.ndarray, "sample"]  # size of its image in bytes
    labels: Int64[np.ndarray, "sample"]  # its class


def cached_index(path: Path) -> TarIndex:
    """Return the index of a tar file, from the user's cache if it was built before.

    The cache key is the file's path, size and modification time. A cache that cannot be written or is damaged is
    rebuilt without an error.
    """
    with reading(path, "a readable file", "Check its permissions."):
        state = path.stat()
    identity = f"{_FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    file = cache_folder() / "indices" / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}.npz"
    index = _load(file, state.st_size)
    if index is None:
        index = make_index(path)
        _save(file, index)
    return index


def make_index(path: Path) -> TarIndex:
    """Return the index of a tar file, from its headers."""
    samples: dict[str, _Sample] = {}
    last = ""
    with (
        reading(path, "an uncompressed tar file", _REMEDY),
        path.open("rb") as raw,
        tarfile.open(fileobj=raw, mode="r:") as tar,
    ):
        for member in tar:
            key, extension = _split(member.name)
            if member.isdir() or _no_sample(member.name):
                continue
            _check_member(path, member)
            if key != last and key in samples:
                raise _wrong(path, member.name, "samples with distinct names", "a name that occurred before")
            last = key
            _take(path, samples.setdefault(key, _Sample()), member, extension, raw)
        _check_end(path, raw, tar.offset)
    return _index(path, samples)


@dataclass
class _Sample:
    image: tuple[int, int] | None = None
    label: int | None = None
    image_extension: str = ""
    label_extension: str = ""
    dotted: set[tuple[str, str]] = field(default_factory=set)  # what is before the last dot of extensions, and of what

    def two_in_one(self) -> bool:
        """Whether it contains a second sample, as `a.2.png` and `a.2.cls` beside `a.png` and `a.cls`."""
        used = {self.image_extension.rpartition(".")[0], self.label_extension.rpartition(".")[0]}
        stems = [{stem for stem, kind in self.dotted if kind == each} for each in ("image", "class")]
        return bool(stems[0] & stems[1] - used)


def _no_sample(name: str) -> bool:
    """Whether a member is hidden, in a hidden folder, or metadata of webdataset."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(is_hidden(part) for part in parts) or re.match(r"__[^/]*__($|/)", name) is not None


def _split(name: str) -> tuple[str, str]:
    """Return key and extension, which begins at the first dot of the last part of the name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise _wrong(path, member.name, "ordinary files only", "a link, a device or a sparse file")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise _wrong(path, member.name, "names inside the archive only", "a path that leads out of the archive")


def _take(path: Path, sample: _Sample, member: tarfile.TarInfo, extension: str, raw: BinaryIO) -> None:
    """Record what a member says about its sample; files that are neither image nor class are ignored.

    As in webdataset, everything after the first dot is the extension, and its last part is the type. A sample with
    `png` and `mask.png` has one image, `png`; with `1.png` and `2.png` it would have two.
    """
    what, kind = f"{path}: {member.name!r}", extension.rpartition(".")[2]
    if "." in extension and kind in (*IMAGES, LABEL):
        sample.dotted.add((extension.rpartition(".")[0], "class" if kind == LABEL else "image"))
    if kind in IMAGES:
        if not _first(path, sample.image_extension, member, extension, "image"):
            return
        check_size(what, member.size)
        sample.image, sample.image_extension = (member.offset_data, member.size), extension
    elif kind == LABEL:
        if not _first(path, sample.label_extension, member, extension, "class"):
            return
        text = _text(raw, member) if member.size <= _LABEL_BYTES else b""
        if not (text.isdigit() and len(text) < 10):
            rule = f"{what} must be a class index, counted from 0, in digits."
            raise InputError(rule, got=repr(text.decode("ascii", "replace")), do="Number the classes.")
        sample.label, sample.label_extension = int(text), extension


def _first(path: Path, taken: str, member: tarfile.TarInfo, extension: str, what: str) -> bool:
    """Whether a file is used, where the sample may already have one of its type."""
    plain, other = "." not in extension, "." not in taken
    if taken and plain == other:
        do = _REMEDY if plain else _FIRST_DOT
        raise _wrong(path, member.name, f"one {what} in each sample", f"a second one ({taken} and {extension})", do)
    return not taken or plain


def _text(raw: BinaryIO, member: tarfile.TarInfo) -> bytes:
    position = raw.tell()
    raw.seek(member.offset_data)
    text: bytes = raw.read(member.size).strip()
    raw.seek(position)
    return text


def _check_end(path: Path, raw: BinaryIO, end: int) -> None:
    """Check that the tar file is complete: the standard library stops silently at a damaged or truncated header."""
    raw.seek(end)
    block = raw.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise InputError(f"{path} must be a complete tar file.", got=f"a damaged header at byte {end:,}", do=_REMEDY)


def _index(path: Path, samples: dict[str, _Sample]) -> TarIndex:
    if not samples:
        raise InputError(f"{path} must have samples.", got="none", do=_REMEDY)
    for key, sample in samples.items():
        if sample.image is None:
            raise _wrong(path, key, f"an image ({', '.join(IMAGES)}) in each sample", "none")
        if sample.label is None:
            raise _wrong(path, key, f"a class in each sample, as a file KEY.{LABEL}", "none")
        if sample.two_in_one():
            raise _wrong(path, key, "one sample of each name", "a second image and class", _FIRST_DOT)
    locations = [sample.image for sample in samples.values() if sample.image is not None]
    labels = [sample.label for sample in samples.values() if sample.label is not None]
    offsets, sizes = np.array(locations, dtype=np.int64).T.copy()
    return TarIndex(Names.of(list(samples)), offsets, sizes, np.array(labels, dtype=np.int64))


def _wrong(path: Path, name: str, rule: str, got: str, do: str = _REMEDY) -> InputError:
    return InputError(f"{path} must have {rule}.", got=f"{got}, at {name!r}", do=do)


def _save(file: Path, index: TarIndex) -> None:
    """Write the index atomically: readers see a complete file or none."""
    content = io.BytesIO()
    np.savez(
        content,
        blob=np.frombuffer(index.keys.blob, dtype=np.uint8),
        ends=index.keys.ends,
        offsets=index.offsets,
        sizes=index.sizes,
        labels=index.labels,
    )
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for orphan in file.parent.glob(f".{file.name}.*{UNFINISHED}"):  # left by a process that was killed
            orphan.unlink(missing_ok=True)
        replace(file, content.getbuffer())


def _load(file: Path, file_size: int) -> TarIndex | None:
    """Return the cached index if it is complete and fits a file of this size."""
    try:
        with np.load(io.BytesIO(read(file.parent, file)), allow_pickle=False) as arrays:
            blob, parts = arrays["blob"], [arrays[name] for name in ("ends", "offsets", "sizes", "labels")]
    except Exception:  # numpy raises a different type for each way in which a file can be damaged
        return None
    ends, offsets, sizes, labels = parts
    sound = blob.dtype == np.uint8 and all(part.dtype == np.int64 and part.shape == ends.shape for part in parts)
    if not sound or not len(ends) or ends[-1] != len(blob):
        return None
    if offsets.min() < 0 or sizes.min() <= 0 or sizes.max() > MAX_BYTES or (offsets + sizes).max() > file_size:
        return None
    return TarIndex(Names(blob.tobytes(), ends), offsets, sizes, labels)


_LAYOUT = "Lay it out as DIR/train/*.tar and DIR/test/*.tar, or DIR/train*.tar and DIR/test*.tar."
_PARTS = ("train", "test")
_OTHERS = ("val", "valid", "validation")


@dataclass(frozen=True, eq=False)
class Shards:
    """The images of several tar files; a `Source`."""

    folder: Path  # the folder of the tar files
    paths: list[Path]  # the tar files, in order
    indices: list[TarIndex]  # the index of each
    starts: Int64[np.ndarray, "shard"]  # number of the first image of each

    def name(self, number: int) -> str:
        """Return SHARD: KEY, the shard as a path from the folder."""
        shard, position = self._position(number)
        return f"{self.paths[shard].relative_to(self.folder).as_posix()}: {self.indices[shard].keys[position]}"

    def size(self, number: int) -> int:
        """Return the size in bytes."""
        shard, position = self._position(number)
        return int(self.indices[shard].sizes[position])

    def read(self, number: int) -> bytes:
        """Return the content."""
        shard, position = self._position(number)
        path, size = self.paths[shard], self.size(number)
        with reading(path, "a readable file", "Check that it is still there."), path.open("rb") as file:
            file.seek(int(self.indices[shard].offsets[position]))
            content = file.read(size)
        if len(content) != size:
            rule = f"{path} must not change after its index was made."
            raise InputError(rule, got="a shorter file", do="Do not change the data while a job runs.")
        return content

    def _position(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])


def load(argument: str, seed: int) -> Data:
    """Return WebDataset tar shards, left on disk: `wds:DIR` or `wds:DIR@SIZE`, with DIR/train/*.tar, DIR/test/….

    DIR/train*.tar and DIR/test*.tar are accepted as well. A sample is KEY.jpg, .jpeg, .png or .webp and KEY.cls, a
    class index from 0; other files of a sample are ignored. Samples are numbered in the order of the shards' names and
    of the files in them. Size, channels, mean, deviation and a missing test part are as in `stream:DIR`. Shards must
    not be compressed.
    """
    folder, size = parse(argument, "wds")
    name = f"wds:{argument}"
    train, test = (_shards_of(folder, part) for part in _PARTS)
    _check_test_folder(folder, train, test)
    paths = train + test
    indices = [cached_index(path) for path in paths]
    counts = [len(index.labels) for index in indices]
    labels = torch.from_numpy(np.concatenate([index.labels for index in indices]))
    shards = Shards(folder, paths, indices, np.cumsum([0, *counts[:-1]], dtype=np.int64))
    return split_source(name, shards, labels, sum(counts[: len(train)]), size, seed)


def _shards_of(folder: Path, part: str) -> list[Path]:
    """Return the tar files of one part, sorted by name."""
    below = entries(folder / part) if is_dir(folder / part) else []
    beside = [path for path in entries(folder) if path.name.startswith(part)]
    return [path for path in (*beside, *below) if path.name.endswith(".tar") and not is_dir(path)]


def _check_test_folder(folder: Path, train: list[Path], test: list[Path]) -> None:
    names = [path.name for path in entries(folder)]
    if not train:
        raise InputError(f"{folder} must have training shards.", got=few(names, 5) or "an empty folder", do=_LAYOUT)
    others = [name for name in names if name.startswith(_OTHERS)]
    if others and not test:
        rule = f"The held-out shards of {folder} must be called `test`."
        do = "Rename them, or move them away: a fifth of the training shards is then held out."
        raise InputError(rule, got=others[0], do=do)
