"""Where the images of a tar file are, so that any of them can be read without reading the others.

A file in an uncompressed tar lies in one piece, so its offset and size are all that is needed. Headers are read once
and what they say is kept (see `kept_index`). Nothing is ever unpacked to disk, and nothing is unpickled.
"""

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
from jaxtyping import Int64

from jacmatch.datasets.files import cache_folder, reading
from jacmatch.datasets.folders import is_hidden
from jacmatch.datasets.streamed import MAX_BYTES, Names, check_size
from jacmatch.errors import InputError
from jacmatch.files import UNFINISHED, read, replace

IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
_LABEL_BYTES = 32
_FORMAT = 2  # of the kept index
_FIRST_DOT = "All after the first dot of a file's name is its extension: write names without other dots."
_WAY_OUT = "Write it again, uncompressed, for example with webdataset.TarWriter."


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of one tar file, in its order.

    Attributes:
        keys: Name of each sample: the part before the first dot of the names of its files.
        offsets: Where the bytes of its image begin in the file.
        sizes: How many they are.
        labels: Its class.
    """

    keys: Names
    offsets: Int64[np.ndarray, "sample"]
    sizes: Int64[np.ndarray, "sample"]
    labels: Int64[np.ndarray, "sample"]


def kept_index(path: Path) -> TarIndex:
    """The index of a tar file, from the user's cache if it was made before.

    It is found again by path, size and time of change of the file. A cache that cannot be written or is damaged is made
    again and is no error.

    Raises:
        InputError: The file is no tar file of samples.
    """
    with reading(path, "a readable file", "Check its permissions."):
        state = path.stat()
    identity = f"{_FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    kept = cache_folder() / "indices" / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}.npz"
    index = _load(kept, state.st_size)
    if index is None:
        index = make_index(path)
        _save(kept, index)
    return index


def make_index(path: Path) -> TarIndex:
    """The index of a tar file, from its headers.

    Raises:
        InputError: It is compressed, cut off or damaged; a member is a link, sparse, larger than 64 MiB, or has a name
            that leads out of the archive; a sample has no image, no class or two of one; or a name occurs twice.
    """
    samples: dict[str, _Sample] = {}
    last = ""
    with (
        reading(path, "an uncompressed tar file", _WAY_OUT),
        path.open("rb") as raw,
        tarfile.open(fileobj=raw, mode="r:") as tar,
    ):
        for member in tar:
            key, extension = _split(member.name)
            if member.isdir() or _no_sample(member.name):
                continue
            _check_member(path, member)
            if key != last and key in samples:
                raise _wrong(path, member.name, "samples of different names", "a name that came before")
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
        """Whether a second sample is in it, as `a.2.png` and `a.2.cls` beside `a.png` and `a.cls`."""
        used = {self.image_extension.rpartition(".")[0], self.label_extension.rpartition(".")[0]}
        stems = [{stem for stem, kind in self.dotted if kind == each} for each in ("image", "class")]
        return bool(stems[0] & stems[1] - used)


def _no_sample(name: str) -> bool:
    """Whether a member is hidden, in a hidden folder, or metadata of webdataset."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(is_hidden(part) for part in parts) or re.match(r"__[^/]*__($|/)", name) is not None


def _split(name: str) -> tuple[str, str]:
    """Key and extension, which begins at the first dot of the last part of the name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise _wrong(path, member.name, "ordinary files only", "a link, a device or a sparse file")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise _wrong(path, member.name, "names that stay inside", "a path that leads out of the archive")


def _take(path: Path, sample: _Sample, member: tarfile.TarInfo, extension: str, raw: BinaryIO) -> None:
    """Notes what a member says about its sample; what is neither image nor class is passed over.

    As in webdataset all after the first dot is the extension, and its last part says what is in the file. A sample with
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
            rule = f"{what} must be a class number, counted from 0, in digits."
            raise InputError(rule, got=repr(text.decode("ascii", "replace")), do="Number the classes.")
        sample.label, sample.label_extension = int(text), extension


def _first(path: Path, taken: str, member: tarfile.TarInfo, extension: str, what: str) -> bool:
    """Whether a file is used, where the sample may have one of its kind already."""
    plain, other = "." not in extension, "." not in taken
    if taken and plain == other:
        do = _WAY_OUT if plain else _FIRST_DOT
        raise _wrong(path, member.name, f"one {what} in each sample", f"a second one ({taken} and {extension})", do)
    return not taken or plain


def _text(raw: BinaryIO, member: tarfile.TarInfo) -> bytes:
    place = raw.tell()
    raw.seek(member.offset_data)
    text: bytes = raw.read(member.size).strip()
    raw.seek(place)
    return text


def _check_end(path: Path, raw: BinaryIO, end: int) -> None:
    """The reader of the standard library stops in silence where a header is damaged or cut off."""
    raw.seek(end)
    block = raw.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise InputError(f"{path} must be a whole tar file.", got=f"a damaged header at byte {end:,}", do=_WAY_OUT)


def _index(path: Path, samples: dict[str, _Sample]) -> TarIndex:
    if not samples:
        raise InputError(f"{path} must have samples.", got="none", do=_WAY_OUT)
    for key, sample in samples.items():
        if sample.image is None:
            raise _wrong(path, key, f"an image ({', '.join(IMAGES)}) in each sample", "none")
        if sample.label is None:
            raise _wrong(path, key, f"a class in each sample, as a file KEY.{LABEL}", "none")
        if sample.two_in_one():
            raise _wrong(path, key, "one sample of each name", "a second image and class", _FIRST_DOT)
    places = [sample.image for sample in samples.values() if sample.image is not None]
    labels = [sample.label for sample in samples.values() if sample.label is not None]
    offsets, sizes = np.array(places, dtype=np.int64).T.copy()
    return TarIndex(Names.of(list(samples)), offsets, sizes, np.array(labels, dtype=np.int64))


def _wrong(path: Path, name: str, rule: str, got: str, do: str = _WAY_OUT) -> InputError:
    return InputError(f"{path} must have {rule}.", got=f"{got}, at {name!r}", do=do)


def _save(kept: Path, index: TarIndex) -> None:
    """Under a name of its own first: readers see it whole or not at all."""
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
        kept.parent.mkdir(parents=True, exist_ok=True)
        for orphan in kept.parent.glob(f".{kept.name}.*{UNFINISHED}"):  # of a process that was killed
            orphan.unlink(missing_ok=True)
        replace(kept, content.getbuffer())


def _load(kept: Path, file_size: int) -> TarIndex | None:
    """The kept index, if it is there, whole, and fits a file of this size."""
    try:
        with np.load(io.BytesIO(read(kept.parent, kept)), allow_pickle=False) as arrays:
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
