"""Tar shards in the layout of WebDataset, read in any order.

The package webdataset reads shards from front to back and mixes them in a buffer; where a run is in its data is then a
state of the reader. Here the order of an epoch is a function of (seed, epoch), as it is for every other data set, so a
run that was interrupted goes on with the very next sample. All that this needs is where the images are in the tar
files, which the standard library can tell; webdataset itself is not used.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from jacmatch.datasets.arrays import from_splits
from jacmatch.datasets.data import Data, Split
from jacmatch.datasets.files import entries, is_dir, reading
from jacmatch.datasets.folders import TEST_SHARE, parse
from jacmatch.datasets.splits import split_validation
from jacmatch.datasets.streamed import streamed
from jacmatch.datasets.tar_index import TarIndex, kept_index
from jacmatch.errors import InputError

_LAYOUT = "Lay it out as DIR/train/*.tar and DIR/test/*.tar, or DIR/train*.tar and DIR/test*.tar."
_PARTS = ("train", "test")
_OTHERS = ("val", "valid", "validation")


@dataclass(frozen=True, eq=False)
class Shards:
    """The images of some tar files. `Source` says what the methods are.

    Attributes:
        folder: Where the tar files are.
        paths: The tar files, in order.
        indices: What is in each.
        starts: Number of the first image of each.
    """

    folder: Path
    paths: list[Path]
    indices: list[TarIndex]
    starts: Int64[np.ndarray, "shard"]

    def name(self, number: int) -> str:
        """SHARD: KEY, the shard as a path from the folder."""
        shard, place = self._place(number)
        return f"{self.paths[shard].relative_to(self.folder).as_posix()}: {self.indices[shard].keys[place]}"

    def size(self, number: int) -> int:
        """Its size in bytes."""
        shard, place = self._place(number)
        return int(self.indices[shard].sizes[place])

    def read(self, number: int) -> bytes:
        """Its bytes.

        Raises:
            InputError: They cannot be read.
        """
        shard, place = self._place(number)
        path, size = self.paths[shard], self.size(number)
        with reading(path, "a readable file", "Check that it is still there."), path.open("rb") as file:
            file.seek(int(self.indices[shard].offsets[place]))
            content = file.read(size)
        if len(content) != size:
            rule = f"{path} must stay as it was when its index was made."
            raise InputError(rule, got="a shorter file", do="Leave the data alone while a job runs.")
        return content

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])


def load(argument: str, seed: int) -> Data:
    """Tar shards as WebDataset has them, left on disk: `wds:DIR` or `wds:DIR@SIZE`, with DIR/train/*.tar, DIR/test/….

    DIR/train*.tar and DIR/test*.tar will do as well. A sample is KEY.jpg, .jpeg, .png or .webp and KEY.cls, a class
    number counted from 0; other files of a sample are passed over. Samples are numbered in the order of the shards'
    names and of the files in them. Size, channels, mean, deviation and a missing test part are as in `stream:DIR`.
    Shards must not be compressed.

    Args:
        argument: DIR or DIR@SIZE.
        seed: Determines the split where there are no test shards.
    """
    folder, size = parse(argument, "wds")
    name = f"wds:{argument}"
    train, test = (_found(folder, part) for part in _PARTS)
    _check_found(folder, train, test)
    paths = train + test
    indices = [kept_index(path) for path in paths]
    counts = [len(index.labels) for index in indices]
    labels = torch.from_numpy(np.concatenate([index.labels for index in indices]))
    shards = Shards(folder, paths, indices, np.cumsum([0, *counts[:-1]], dtype=np.int64))
    rows = torch.arange(len(labels))
    kept, held = rows[: sum(counts[: len(train)])], rows[sum(counts[: len(train)]) :]
    if not len(held):
        kept, held = split_validation(labels, TEST_SHARE, seed)
    x = streamed(shards, kept.numpy(), size, name)
    whole = Split(x.of(rows.numpy()), labels)
    return from_splits(name, whole.subset(kept), whole.subset(held))


def _found(folder: Path, part: str) -> list[Path]:
    """The tar files of one part, in the order of their names."""
    below = entries(folder / part) if is_dir(folder / part) else []
    beside = [path for path in entries(folder) if path.name.startswith(part)]
    return [path for path in (*beside, *below) if path.name.endswith(".tar") and not is_dir(path)]


def _check_found(folder: Path, train: list[Path], test: list[Path]) -> None:
    names = [path.name for path in entries(folder)]
    if not train:
        got = ", ".join(names[:5]) or "an empty folder"
        raise InputError(f"{folder} must have training shards.", got=got, do=_LAYOUT)
    others = [name for name in names if name.startswith(_OTHERS)]
    if others and not test:
        rule = f"The held-out shards of {folder} must be called `test`."
        do = "Rename them, or move them away to have a fifth of the training shards held out."
        raise InputError(rule, got=others[0], do=do)
