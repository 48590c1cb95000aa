"""Image files decoded with Pillow, which is optional, and images that stay on disk until they are accessed.

A `Streamed` replaces the tensor of the inputs of a `Split`. A `Source` (a folder of files, or tar shards) returns the
bytes of image number i; everything else is here.
"""

import hashlib
import io
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jacmatch.datasets.files import reading
from jacmatch.errors import InputError, UnsupportedError

# Gray and color modes of 8 bits a channel, with or without a palette or transparency, which is dropped.
_GREY = ("1", "L", "LA")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows forty more, some of which start other programs
_OPENING = threading.Lock()  # Pillow's limit is global, and files are decoded in several threads


def decode(
    file: Path | bytes, what: str = "", *, caller: str, max_pixels: int, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "row column channel"]:
    """Return the pixels of an image file: one channel if the file is gray, otherwise red, green and blue.

    The orientation from the file's EXIF data is applied. Transparency is dropped. Of a JPEG file with several pictures
    (MPO), the first is used. `what` names a file in memory in messages.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        install = "Install it with: pip install pillow."
        raise UnsupportedError(f"{caller} reads images with Pillow, which is not installed. {install}") from error
    what = what or str(file)
    with reading(what, "an image", "Repair or remove the file."):
        with _opened(Image, io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            _check_header(what, image.mode, image.width * image.height, frames, max_pixels)
            upright = ImageOps.exif_transpose(image).convert("L" if image.mode in _GREY else "RGB")
        if size is not None:
            upright = upright.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        pixels = np.array(upright, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def _opened(image_module: Any, file: Path | io.BytesIO) -> Any:
    """Return the image with its header read; our size limit replaces Pillow's."""
    with _OPENING:
        limit = image_module.MAX_IMAGE_PIXELS
        image_module.MAX_IMAGE_PIXELS = None
        try:
            return image_module.open(file, formats=_FORMATS)
        finally:
            image_module.MAX_IMAGE_PIXELS = limit  # other users of Pillow keep theirs


def _check_header(what: str, mode: str, pixels: int, frames: int, max_pixels: int) -> None:
    """Refuse an image by its header, before it is decoded."""
    if pixels > max_pixels:
        raise InputError(f"{what} must have at most {max_pixels:,} pixels.", got=f"{pixels:,}", do="Scale it down.")
    if mode not in _GREY + _COLOR:
        do = "Convert it, for example from 16 bits: Image.fromarray((np.asarray(image) // 257).astype(np.uint8))."
        raise InputError(f"{what} must have 8 bits a channel.", got=f"mode {mode}", do=do)
    if frames != 1:
        raise InputError(f"{what} must have one frame.", got=f"{frames}", do="Save one frame as a file.")


MAX_BYTES = 2**26
"""Largest encoded image, 64 MiB."""
MAX_PIXELS = 2**26
"""Largest image that is decoded, 64 million pixels."""
_LOOKED_AT = 64  # images that decide whether there is one channel
_HASHED = 1024  # images whose bytes are in the fingerprint
_WHOLE = 2**27  # bytes of a set of which all are hashed


@runtime_checkable
class Source(Protocol):
    """Protocol of encoded images that are accessed by number. Several threads may read at once."""

    def name(self, number: int) -> str:
        """Return the name of an image, for messages and the fingerprint."""
        ...

    def size(self, number: int) -> int:
        """Return its size in bytes."""
        ...

    def read(self, number: int) -> bytes:
        """Return its content."""
        ...


@dataclass(frozen=True, eq=False)
class Streamed:
    """Images (N, C, H, W) of bytes that are read and decoded on each access.

    Attributes:
        source: The encoded images.
        rows: Which of them, and in which order.
        image: Shape of one image; another shape is an error when it is read.
        resized: Whether images are resized to that height and width.
        caller: The name of the data set, for messages.
    """

    source: Source
    rows: Int64[np.ndarray, "sample"]
    image: tuple[int, int, int]
    resized: bool
    caller: str

    dtype = torch.uint8
    device = torch.device("cpu")
    ndim = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self.rows), *self.image)

    @property
    def nbytes(self) -> int:
        """Size of all images in bytes after decoding."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Int64[Tensor, "batch"]) -> UInt8[Tensor, "batch channel height width"]:
        pixels = np.empty((len(rows), *self.image), dtype=np.uint8)
        for position, row in enumerate(rows.tolist()):
            pixels[position] = self._decoded(int(self.rows[row]))
        return torch.from_numpy(pixels)

    def subset(self, rows: Int64[Tensor, "batch"]) -> "Streamed":
        """Return these rows in this order; nothing is read."""
        return replace(self, rows=self.rows[rows.cpu().numpy()])

    def of(self, rows: Int64[np.ndarray, "other"]) -> "Streamed":
        """Return other images of the same source, by number."""
        return replace(self, rows=rows)

    def spread(self, count: int) -> Int64[Tensor, "batch"]:
        """Return at most `count` row numbers, evenly spaced from the first to the last row."""
        return torch.from_numpy(spread(len(self), count))

    def digest(self) -> str:
        """Return the SHA-256 of shape, names and sizes of all images in order, and of their content.

        Above 128 MiB, only the content of 1,024 images is read, because reading all images would take too long. If any
        other image is replaced by one of the same name and size, this is not detected.
        """
        digest = hashlib.sha256(f"streamed {self.shape} {self.resized}\n".encode())
        whole = 0
        for row in self.rows.tolist():
            whole += self.source.size(row)
            digest.update(f"{self.source.name(row)!r} {self.source.size(row)}\n".encode())
        for position in spread(len(self), len(self) if whole <= _WHOLE else _HASHED).tolist():
            digest.update(self.source.read(int(self.rows[position])))
        return digest.hexdigest()

    def _decoded(self, number: int) -> UInt8[np.ndarray, "channel height width"]:
        channels, height, width = self.image
        pixels = _pixels(self.source, number, self.caller, (height, width) if self.resized else None)
        name = self.source.name(number)
        if pixels.shape[:2] != (height, width):
            got = f"{pixels.shape[0]} × {pixels.shape[1]} in {name}"
            do = f"Resize them, for example to 64 × 64: {self.caller}@64."
            raise InputError(f"All images of {self.caller} must be {height} × {width} like the first.", got=got, do=do)
        if pixels.shape[2] > channels:
            rule = f"All images of {self.caller} must be gray like the first ones."
            raise InputError(rule, got=f"a color image, {name}", do="Convert them to one mode.")
        upright: UInt8[np.ndarray, "channel height width"] = pixels.transpose(2, 0, 1)
        return upright  # a gray image fills all three channels of a color set


def spread(total: int, count: int) -> Int64[np.ndarray, "chosen"]:
    """Return min(total, count) different numbers, evenly spaced from 0 to total − 1.

    Example:
        >>> spread(10, 4).tolist(), spread(3, 8).tolist()
        ([0, 3, 6, 9], [0, 1, 2])
    """
    if count >= total:
        return np.arange(total)
    return np.arange(count) * (total - 1) // max(1, count - 1)


def streamed(source: Source, rows: Int64[np.ndarray, "sample"], size: int | None, caller: str) -> Streamed:
    """Return the images `rows` of a source, with their common size and number of channels.

    The size is `size` × `size`, or that of the first image. There is one channel if all of up to 64 evenly spaced
    images are gray, otherwise three.
    """
    target = None if size is None else (size, size)
    looked_at = [_pixels(source, int(rows[position]), caller, target) for position in spread(len(rows), _LOOKED_AT)]
    height, width = looked_at[0].shape[:2]
    channels = max(pixels.shape[2] for pixels in looked_at)
    return Streamed(source, rows, (channels, height, width), size is not None, caller)


def _pixels(
    source: Source, number: int, caller: str, size: tuple[int, int] | None
) -> UInt8[np.ndarray, "row column channel"]:
    content = source.read(number)
    return decode(content, source.name(number), caller=f"`--data {caller}`", max_pixels=MAX_PIXELS, size=size)


def check_size(name: str, size: int) -> None:
    """Refuse an encoded image that is empty or larger than 64 MiB."""
    if not 0 < size <= MAX_BYTES:
        rule = f"{name} must have at least 1 byte and at most {MAX_BYTES:,}."
        raise InputError(rule, got=f"{size:,}", do="Repair, shrink or remove it.")


class Names:
    """Many names in little memory: one byte string, and the offsets where the names end.

    Example:
        >>> names = Names.of(["a.png", "dog/b.png"])
        >>> names[1], len(names)
        ('dog/b.png', 2)
    """

    def __init__(self, blob: bytes, ends: Int64[np.ndarray, "name"]) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: list[str]) -> "Names":
        """Pack names; bytes that are not text are preserved."""
        parts = [name.encode("utf-8", "surrogateescape") for name in names]
        return cls(b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return self.blob[start : int(self.ends[number])].decode("utf-8", "surrogateescape")
