"""The user's own pictures, one folder for each class, left on disk: for sets that do not fit into memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from jacmatch.datasets.arrays import from_splits
from jacmatch.datasets.data import Data, Split
from jacmatch.datasets.files import reading
from jacmatch.datasets.folders import TEST_SHARE, listed, parse
from jacmatch.datasets.splits import split_validation
from jacmatch.datasets.streamed import MAX_BYTES, Names, check_size, streamed
from jacmatch.errors import InputError


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder. `Source` says what the methods are.

    Attributes:
        folder: Where they are.
        names: Their paths from there.
        sizes: Their sizes in bytes when they were listed.
    """

    folder: Path
    names: Names
    sizes: Int64[np.ndarray, "file"]

    def name(self, number: int) -> str:
        """Its path from the folder, with slashes on every system."""
        return self.names[number]

    def size(self, number: int) -> int:
        """Its size in bytes."""
        return int(self.sizes[number])

    def read(self, number: int) -> bytes:
        """Its bytes.

        Raises:
            InputError: It cannot be read, or has another size than when it was listed.
        """
        path = self.folder / self.names[number]
        with reading(path, "a readable file", "Check that it is still there."), path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) != self.size(number):
            rule = f"{path} must stay as it was when the folder was listed, with {self.size(number):,} bytes."
            raise InputError(rule, got=f"{len(content):,}", do="Leave the data alone while a job runs.")
        return content


def load(argument: str, seed: int) -> Data:
    """Your own pictures, left on disk: `stream:DIR` or `stream:DIR@SIZE`, otherwise as `folder:DIR`.

    Each image is read and decoded when a batch needs it, ahead of the step by `--workers` threads. Numbers are those of
    `folder`, but for mean and deviation, which are of 2,048 training images evenly spaced. An image that cannot be
    decoded is an `InputError` when it is met.

    Args:
        argument: DIR or DIR@SIZE.
        seed: Determines the split where there is no test folder.
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
    rows = torch.arange(len(pairs))
    kept, held = rows[: len(train)], rows[len(train) :]
    if not len(held):
        kept, held = split_validation(labels, TEST_SHARE, seed)
    x = streamed(files, kept.numpy(), size, name)
    whole = Split(x.of(rows.numpy()), labels)
    return from_splits(name, whole.subset(kept), whole.subset(held))


def _size(path: Path) -> int:
    with reading(path, "a readable file", "Check its permissions."):
        size = path.stat().st_size
    check_size(str(path), size)
    return size
