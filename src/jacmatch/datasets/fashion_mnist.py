"""Fashion-MNIST from the idx files of its Debian package, or from a copy of them."""

import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jacmatch.datasets.arrays import from_arrays
from jacmatch.datasets.data import Data
from jacmatch.datasets.files import check_digest, existing_folder, is_file, reading, user_path
from jacmatch.errors import InputError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_REMEDY = (
    "Get the files with: apt-get install dataset-fashion-mnist; or, without root: "
    "apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fm, and write fashion-mnist:fm."
)


@dataclass(frozen=True)
class IdxFile:
    """An idx file: its name without .gz, and the shape and SHA-256 of its uncompressed content."""

    name: str
    shape: tuple[int, ...]
    sha256: str


OFFICIAL = {
    "x_train": IdxFile(
        "train-images-idx3-ubyte", (60000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "y_train": IdxFile(
        "train-labels-idx1-ubyte", (60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "x_test": IdxFile(
        "t10k-images-idx3-ubyte", (10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "y_test": IdxFile(
        "t10k-labels-idx1-ubyte", (10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}


def load(argument: str, seed: int) -> Data:
    """Load Fashion-MNIST, 60,000 + 10,000 gray images of 28 × 28 pixels in ten classes: `fashion-mnist[:DIR]`.

    The files are searched in DIR. Without DIR, they are searched in the folder of the environment variable
    JACMATCH_DATA, and then where the Debian package installs them. The subfolders `fashion-mnist` and
    `usr/share/datasets/fashion-mnist` are searched, too. A file that is missing, damaged or not the official one is an
    `InputError`.

    Args:
        argument: DIR, or empty.
        seed: Not used; the split is the official one.

    References:
        Xiao, Rasul & Vollgraf, "Fashion-MNIST", arXiv:1708.07747 (MIT license).
    """
    return read(candidate_folders(argument, os.environ.get("JACMATCH_DATA", "")))


def candidate_folders(argument: str, named: str) -> list[Path]:
    """Return the folders that `load` searches, in order."""
    tops = [existing_folder(argument, "fashion-mnist")] if argument else [user_path(named)] if named else []
    below = [top / name for top in tops for name in (".", "fashion-mnist", "usr/share/datasets/fashion-mnist")]
    return below if argument else [*below, DEBIAN_FOLDER]


def read(folders: list[Path], files: dict[str, IdxFile] = OFFICIAL) -> Data:
    """Return the data set from the first of these folders that has any of its files."""
    for folder in folders:
        paths = {key: _find(folder, file.name) for key, file in files.items()}
        missing = [files[key].name + ".gz" for key, path in paths.items() if path is None]
        if len(missing) == len(files):
            continue
        if missing:
            rule = f"{folder} must have all four files of Fashion-MNIST."
            raise InputError(rule, got=f"a folder without {', '.join(missing)}", do=_REMEDY)
        arrays = {key: read_idx(path, files[key]) for key, path in paths.items() if path is not None}
        return from_arrays("fashion-mnist", {k: a[:, None] if a.ndim == 3 else a for k, a in arrays.items()})
    looked = ", ".join(str(folder) for folder in folders)
    raise InputError("`--data fashion-mnist` needs its four idx files.", got=f"none of them in {looked}", do=_REMEDY)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if is_file(path)), None)


def read_idx(path: Path, file: IdxFile) -> UInt8[np.ndarray, "sample *pixel"]:
    """Return the bytes of an idx file, compressed or not, but not more than its shape needs."""
    header = bytes([0, 0, 8, len(file.shape)]) + b"".join(size.to_bytes(4, "big") for size in file.shape)
    length = len(header) + math.prod(file.shape)
    unpack = gzip.open if path.suffix == ".gz" else open
    with reading(path, "a Fashion-MNIST idx file", _REMEDY), unpack(path, "rb") as stream:
        content: bytes = stream.read(length + 1)
    if content[: len(header)] != header:
        rule = f"{path} must be an idx file of bytes of shape {file.shape}."
        got = f"a file that begins with {content[: len(header)].hex(' ', 4) or 'nothing'}"
        raise InputError(rule, got=got, do=_REMEDY)
    if len(content) != length:
        got = "more" if len(content) > length else f"{len(content):,}"
        raise InputError(f"{path} must hold {length:,} bytes once unpacked.", got=got, do=_REMEDY)
    check_digest(content, file.sha256, path, _REMEDY)
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(file.shape)
