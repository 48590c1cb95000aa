"""Image files to bytes with Pillow, which is optional."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jacmatch.datasets.files import reading
from jacmatch.errors import InputError, UnsupportedError

# Grey and colour modes of 8 bits a channel, with or without a palette or transparency, which is dropped.
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def pillow(caller: str) -> Any:
    """The module `PIL.Image`.

    Args:
        caller: What needs it, for the message.

    Raises:
        UnsupportedError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        way_out = "Install it with: pip install pillow."
        raise UnsupportedError(f"{caller} reads images with Pillow, which is not installed. {way_out}") from error
    return Image


def decode(
    path: Path, *, caller: str, max_pixels: int, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "row column channel"]:
    """The pixels of one image file: one channel if the file is grey, otherwise red, green and blue.

    The orientation that a camera noted in the file is applied. Transparency is dropped. A file that is not an image of
    8 bits a channel with one frame, or is too large, is an `InputError`.

    Args:
        path: The file.
        caller: What needs it, for messages.
        max_pixels: The largest width · height that is decoded; stands in for Pillow's own global limit.
        size: (height, width) to resize to, bilinear with antialiasing; None keeps the size.
    """
    image_module = pillow(caller)
    from PIL import ImageOps

    with reading(path, "an image", "Repair or remove the file."):
        limit = image_module.MAX_IMAGE_PIXELS
        image_module.MAX_IMAGE_PIXELS = None  # our own limit follows; other users of Pillow keep theirs
        try:
            with image_module.open(path) as image:
                _check_header(path, image.mode, image.width * image.height, getattr(image, "n_frames", 1), max_pixels)
                upright = ImageOps.exif_transpose(image).convert("L" if image.mode in _GREY else "RGB")
        finally:
            image_module.MAX_IMAGE_PIXELS = limit
        if size is not None:
            upright = upright.resize((size[1], size[0]), image_module.Resampling.BILINEAR)
        pixels = np.array(upright, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def _check_header(path: Path, mode: str, pixels: int, frames: int, max_pixels: int) -> None:
    """Before anything is decoded."""
    if pixels > max_pixels:
        raise InputError(f"{path} must have at most {max_pixels:,} pixels.", got=f"{pixels:,}", do="Scale it down.")
    if mode not in _GREY + _COLOUR:
        raise InputError(f"{path} must have 8 bits a channel.", got=f"mode {mode}", do="Convert the file.")
    if frames != 1:
        raise InputError(f"{path} must have one frame.", got=f"{frames}", do="Save the frame you mean as a file.")
