"""Image files to bytes with Pillow, which is optional."""

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jacmatch.datasets.files import reading
from jacmatch.errors import InputError, UnsupportedError

# Gray and color modes of 8 bits a channel, with or without a palette or transparency, which is dropped.
_GREY = ("1", "L", "LA")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows forty more, some of which start other programs
_OPENING = threading.Lock()  # Pillow's limit is global, and files are decoded in several threads


def pillow(caller: str) -> Any:
    """Return the module `PIL.Image`; `caller` needs it, for the message."""
    try:
        from PIL import Image
    except ImportError as error:
        install = "Install it with: pip install pillow."
        raise UnsupportedError(f"{caller} reads images with Pillow, which is not installed. {install}") from error
    return Image


def decode(
    path: Path, *, caller: str, max_pixels: int, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "row column channel"]:
    """Return the pixels of an image file: one channel if the file is gray, otherwise red, green and blue.

    The orientation from the file's EXIF data is applied. Transparency is dropped. Of a JPEG with several pictures (MPO)
    the first is taken.
    """
    return _decoded(path, str(path), caller, max_pixels, size)


def decode_bytes(
    content: bytes, what: str, *, caller: str, max_pixels: int, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "row column channel"]:
    """Return the pixels of an image file in memory; as `decode`, with a name for messages instead of the path."""
    return _decoded(io.BytesIO(content), what, caller, max_pixels, size)


def _decoded(
    file: Path | io.BytesIO, what: str, caller: str, max_pixels: int, size: tuple[int, int] | None
) -> UInt8[np.ndarray, "row column channel"]:
    image_module = pillow(caller)
    from PIL import ImageOps

    with reading(what, "an image", "Repair or remove the file."):
        with _opened(image_module, file) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            _check_header(what, image.mode, image.width * image.height, frames, max_pixels)
            upright = ImageOps.exif_transpose(image).convert("L" if image.mode in _GREY else "RGB")
        if size is not None:
            upright = upright.resize((size[1], size[0]), image_module.Resampling.BILINEAR)
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
        do = "Convert it, for example of 16 bits: Image.fromarray((np.asarray(image) // 257).astype(np.uint8))."
        raise InputError(f"{what} must have 8 bits a channel.", got=f"mode {mode}", do=do)
    if frames != 1:
        raise InputError(f"{what} must have one frame.", got=f"{frames}", do="Save the frame you mean as a file.")
