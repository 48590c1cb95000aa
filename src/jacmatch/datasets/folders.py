"""Folders of images, a folder for each class: read into memory, or image by image when a batch needs them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from jacmatch.datasets.arrays import from_arrays, from_splits
from jacmatch.datasets.data import Data, Split, split_validation
from jacmatch.datasets.files import check_memory, entries, existing_folder, is_dir, is_file, reading, user_path
from jacmatch.datasets.streamed import MAX_BYTES, Names, Source, check_size, decode, streamed
from jacmatch.errors import InputError, few, unknown_name

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEST_SHARE = 0.2
MAX_SIDE = 4096
_LAYOUT = "Lay it out as DIR/train/CLASS/*.png and DIR/test/CLASS/*.png (png, jpg, jpeg or webp)."
_NOT_DATA = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"}


def load(argument: str, seed: int) -> Data:
    """Load your own images: `folder:DIR` or `folder:DIR@SIZE`, with DIR/train/CLASS/*.png (jpg, webp), DIR/test/….

    Classes are numbered in the order of their names. All images must have the same size; with @SIZE each is resized to
    SIZE × SIZE (bilinear with antialiasing, the aspect ratio is not preserved). If all are gray there is one channel,
    otherwise three. Without DIR/test a fifth of each class in DIR/train, chosen by `seed`, is the test part.

    Raises:
        InputError: The layout is wrong, a file is not a usable image, or sizes differ.
    """
    folder, size = parse(argument, "folder")
    name = f"folder:{argument}"
    classes, train_files, test_files = listed(folder)
    images = _read([path for path, _ in train_files + test_files], size, name)
    labels = np.array([classes.index(label) for _, label in train_files + test_files], dtype=np.int64)
    rows = np.arange(len(labels))
    train, test = rows[: len(train_files)], rows[len(train_files) :]
    if not test_files:
        train, test = (part.numpy() for part in split_validation(torch.from_numpy(labels), TEST_SHARE, seed))
    parts = {"x_train": images[train], "y_train": labels[train], "x_test": images[test], "y_test": labels[test]}
    return from_arrays(name, parts)


def images(argument: str) -> UInt8[np.ndarray, "sample channel row column"] | None:
    """Return the images that lie in DIR itself; None if it has a folder `train`."""
    folder, size = parse(argument, "folder")
    files = [path for path in _visible(folder) if path.suffix.lower() in SUFFIXES]
    return _read(files, size, f"folder:{argument}") if files and not is_dir(folder / "train") else None


def parse(argument: str, source: str) -> tuple[Path, int | None]:
    """Return folder and size of DIR@SIZE, unless a folder has that very name; `source` names the data set."""
    path, at, size = argument.rpartition("@")
    if not at or is_dir(user_path(argument)):
        return existing_folder(argument, source), None
    if not (size.isascii() and size.isdigit() and 1 <= int(size[:9]) <= MAX_SIDE):
        rule = f"SIZE of `--data {source}:DIR@SIZE` must be an integer from 1 to {MAX_SIDE}."
        raise InputError(rule, got=repr(size), do=f"Write for example {source}:pictures@64.")
    return existing_folder(path, source), int(size)


def listed(folder: Path) -> tuple[list[str], list[tuple[Path, str]], list[tuple[Path, str]]]:
    """Return the classes, and the (file, class) pairs of the training and of the test part, which may be empty."""
    classes, train_files = _list(folder / "train")
    if not is_dir(folder / "test"):
        # Refuse a held-out part under another name.
        others = [
            path.name
            for path in _visible(folder)
            if is_dir(path) and path.name.lower() in ("val", "valid", "validation")
        ]
        if others:
            rule = f"The held-out part of {folder} must be called `test`."
            raise InputError(rule, got=others[0], do="Rename it, or move it away: a fifth of `train` is then held out.")
        return classes, train_files, []
    test_classes, test_files = _list(folder / "test")
    for name in test_classes:
        if name not in classes:
            raise unknown_name(f"Each folder in {folder / 'test'}", name, classes)
    return classes, train_files, test_files


def _list(folder: Path) -> tuple[list[str], list[tuple[Path, str]]]:
    """Return the classes and the (file, class) pairs of one part, both sorted by name."""
    if not is_dir(folder):
        got = few([path.name for path in _visible(folder.parent)], 5) or "an empty folder"
        raise InputError(f"{folder.parent} must have a folder `{folder.name}`.", got=got, do=_LAYOUT)
    pairs = []
    classes = _visible(folder)
    for entry in classes:
        if not is_dir(entry):
            raise InputError(f"{folder} must have one folder for each class.", got=f"the file {entry.name}", do=_LAYOUT)
        files = _visible(entry)
        if not files:
            raise InputError(f"{entry} must have images.", got="an empty folder", do=_LAYOUT)
        for path in files:
            if path.suffix.lower() not in SUFFIXES or not is_file(path):
                rule = f"{entry} must have only {', '.join(SUFFIXES)} files."
                raise InputError(rule, got=path.name, do="Convert or remove it.")
            pairs.append((path, entry.name))
    if not pairs:
        raise InputError(f"{folder} must have one folder for each class.", got="an empty folder", do=_LAYOUT)
    return [entry.name for entry in classes], pairs


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder, without files of operating systems and notebooks."""
    return [path for path in entries(folder) if not is_hidden(path.name)]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is not data: it begins with a dot, or an operating system created it.

    Example:
        >>> is_hidden("._0.png"), is_hidden("Thumbs.db"), is_hidden("0.png")
        (True, True, False)
    """
    return name.startswith(".") or name.lower() in _NOT_DATA


def _read(paths: list[Path], size: int | None, name: str) -> UInt8[np.ndarray, "sample channel row column"]:
    """Return all images in one array, channels first."""
    target = None if size is None else (size, size)
    images: list[UInt8[np.ndarray, "row column channel"]] = []
    for path in paths:
        image = decode(path, caller=f"`--data {name}`", max_pixels=2**26, size=target)
        if not images:
            needed = 3 * image.shape[0] * image.shape[1] * len(paths)
            check_memory(
                needed,
                f"The images of {name}",
                "Scale them down: folder:DIR@SIZE. Or leave them on disk: stream:DIR@SIZE.",
            )
        elif image.shape[:2] != images[0].shape[:2]:
            got = f"{_sides(images[0])} in {paths[0]} and {_sides(image)} in {path}"
            do = f"Resize them, for example to 64 × 64: {name}@64."
            raise InputError(f"All images of {name} must have the same size.", got=got, do=do)
        images.append(image)
    channels = max(image.shape[2] for image in images)
    result = np.empty((len(images), channels, *images[0].shape[:2]), dtype=np.uint8)
    for row, image in enumerate(images):
        result[row] = image.transpose(2, 0, 1)  # a gray image fills all three channels of a color set
    return result


def _sides(image: UInt8[np.ndarray, "row column channel"]) -> str:
    return f"{image.shape[0]} × {image.shape[1]}"


@dataclass(frozen=True, eq=False)
class Files:
    """Image files in a folder; a `Source`."""

    folder: Path  # the folder
    names: Names  # their paths from there
    sizes: Int64[np.ndarray, "file"]  # their sizes in bytes when they were listed

    def name(self, number: int) -> str:
        """Return the path from the folder, with slashes on every system."""
        return self.names[number]

    def size(self, number: int) -> int:
        """Return the size in bytes."""
        return int(self.sizes[number])

    def read(self, number: int) -> bytes:
        """Return the content."""
        path = self.folder / self.names[number]
        with reading(path, "a readable file", "Check that it is still there."), path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) != self.size(number):
            rule = f"{path} must not change after the folder was listed, with {self.size(number):,} bytes."
            raise InputError(rule, got=f"{len(content):,}", do="Do not change the data while a job runs.")
        return content


def load_streamed(argument: str, seed: int) -> Data:
    """Load your own images, left on disk: `stream:DIR` or `stream:DIR@SIZE`, otherwise as `folder:DIR`.

    Each image is read and decoded when a batch needs it, in advance by `--workers` threads. The numbers are those of
    `folder`, except mean and deviation, which are computed from 2,048 evenly spaced training images. An image that
    cannot be decoded is an `InputError` when it is read.
    """
    folder, size = parse(argument, "stream")
    name = f"stream:{argument}"
    classes, train, test = listed(folder)
    pairs = train + test
    labels = torch.tensor([classes.index(label) for _, label in pairs])
    files = Files(
        folder,
        Names.of([path.relative_to(folder).as_posix() for path, _ in pairs]),
        np.array([_size(path) for path, _ in pairs], dtype=np.int64),
    )
    return split_source(name, files, labels, len(train), size, seed)


def split_source(name: str, source: Source, labels: Tensor, train: int, size: int | None, seed: int) -> Data:
    """Return the data set of images on disk, of which the first `train` are the training part.

    If there are no others, a fifth of each class, chosen by `seed`, is the test part.
    """
    rows = torch.arange(len(labels))
    train_rows, test_rows = rows[:train], rows[train:]
    if not len(test_rows):
        train_rows, test_rows = split_validation(labels, TEST_SHARE, seed)
    x = streamed(source, train_rows.numpy(), size, name)
    whole = Split(x.of(rows.numpy()), labels)
    return from_splits(name, whole.subset(train_rows), whole.subset(test_rows))


def _size(path: Path) -> int:
    with reading(path, "a readable file", "Check its permissions."):
        size = path.stat().st_size
    check_size(str(path), size)
    return size
