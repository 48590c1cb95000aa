"""The user's own arrays in one numpy archive."""

import io
import zipfile
from pathlib import Path

import numpy as np

from jacmatch.datasets.arrays import REQUIRED, check_keys, from_arrays
from jacmatch.datasets.data import Data
from jacmatch.datasets.files import check_memory, existing_file, reading


def load(argument: str, seed: int) -> Data:
    """Your own arrays: `npz:FILE`, a numpy archive with the arrays that `from_arrays` names.

    A file that is missing, broken or larger than the memory, pickled objects in it, and what `from_arrays` refuses are
    each an `InputError`.

    Args:
        argument: The path of the file.
        seed: Not used; the file has its own split.
    """
    return from_arrays(f"npz:{argument}", arrays(argument))


def arrays(argument: str, needed: tuple[str, ...] = REQUIRED) -> dict[str, object]:
    """The arrays of a file as they are; only their names are checked.

    Args:
        argument: The path of the file.
        needed: Names that must be there.

    Raises:
        InputError: the file is missing, broken or larger than the memory, or has other names.
    """
    path = existing_file(argument, "npz")
    with reading(path, "a numpy .npz archive of plain arrays", "Write it with np.savez, numbers only."):
        check_sizes(path, str(path))
        with np.load(path, allow_pickle=False) as archive:
            check_keys(f"npz:{argument}", list(archive.files), needed)
            return {key: archive[key] for key in archive.files}


def check_sizes(archive: Path | io.BytesIO, name: str) -> None:
    """Nothing, if the arrays of the archive, called `name` in messages, fit into memory together."""
    with zipfile.ZipFile(archive) as members:
        size = sum(member.file_size for member in members.infolist())
    check_memory(size, f"The arrays of {name}", "Choose fewer rows, or store images as uint8.")
