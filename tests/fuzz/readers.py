"""Every reader of files from outside, as a function of bytes: what it cannot read must be an error that speaks.

Some inputs begin with a byte that says how the rest is meant: as the file itself, or as the contents of one whose
checksums and lengths are then made right, so that the reader gets to see what is behind them.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jacmatch.errors import InputError, UnsupportedError

from . import archives, binaries, folders, points, single_files


class Reader(NamedTuple):
    """A reader, and whole files to begin with.

    Attributes:
        read: Reads the bytes, in an empty folder.
        seeds: Inputs of which the first is read without an error.
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[Path], list[bytes]]


READERS = {
    "arrays": Reader(archives.read_arrays, archives.arrays_seeds),
    "binaries": Reader(binaries.read_binaries, binaries.binary_seeds),
    "cache": Reader(folders.read_cache, folders.cache_seeds),
    "checkpoint": Reader(folders.read_checkpoint, folders.checkpoint_seeds),
    "image": Reader(single_files.read_image, single_files.image_seeds),
    "npz": Reader(archives.read_npz, archives.npz_seeds),
    "points": Reader(points.read, points.seeds),
    "run": Reader(folders.read_run, folders.run_seeds),
    "settings": Reader(single_files.read_settings, single_files.settings_seeds),
    "tar": Reader(archives.read_tar, archives.tar_seeds),
    "weights": Reader(single_files.read_weights, single_files.weight_seeds),
}


def survives(name: str, data: bytes, folder: Path) -> bool:
    """Whether the reader took the bytes; false if it refused them as it should. Anything else is raised."""
    try:
        READERS[name].read(data, folder)
    except (InputError, UnsupportedError) as error:
        if "\n" in str(error).strip():
            raise AssertionError("a message must be one line") from error
        return False
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True
