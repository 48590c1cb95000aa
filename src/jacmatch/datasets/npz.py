"""The user's own arrays in a numpy archive."""

import io
import zipfile
from pathlib import Path

import numpy as np

from jacmatch.datasets.arrays import REQUIRED, check_keys, from_arrays
from jacmatch.datasets.data import Data
from jacmatch.datasets.files import check_memory, existing_file, reading


def load(argument: str, seed: int) -> Data:
    """Return your own arrays: `npz:FILE`, a numpy archive with the arrays that `from_arrays` names.

    Raises:
        InputError: The file is missing, broken, pickled or larger than the memory, or `from_arrays` refuses it.
    """
    return from_arrays(f"npz:{argument}", arrays(argument))


def arrays(argument: str, needed: tuple[str, ...] = REQUIRED) -> dict[str, object]:
    """Return the arrays of a file; only their names are checked."""
    path = existing_file(argument, "npz")
    with reading(path, "a numpy .npz archive of plain arrays", "Write it with np.savez, numbers only."):
        check_sizes(path, str(path))
        with np.load(path, allow_pickle=False) as archive:
            check_keys(f"npz:{argument}", list(archive.files), needed)
            return {key: archive[key] for key in archive.files}


def check_sizes(archive: Path | io.BytesIO, name: str) -> None:
    """Refuse an archive, called `name` in messages, whose arrays do not fit into memory."""
    with zipfile.ZipFile(archive) as members:
        size = sum(member.file_size for member in members.infolist())
    check_memory(size, f"The arrays of {name}", "Choose fewer rows, or store images as uint8.")
