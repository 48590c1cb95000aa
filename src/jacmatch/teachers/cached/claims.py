"""Which process writes which shard, where several write one cache: locks that end with the process that holds them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from jacmatch.teachers.cached.layout import disk

try:
    import fcntl
except ImportError:  # not on Windows: there two processes may do the same work, and the slower one drops its own
    fcntl = None  # type: ignore[assignment]

_FILE = ".claims"
_ALONE = 1 << 40  # a lock that is no shard's


class Claims:
    """Locks on numbers in a folder, one byte of a file each; a context that makes the folder and opens the file.

    Args:
        folder: Of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Claims":
        """Opens the file."""
        with disk(self.folder, "written to"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives all locks back."""
        os.close(self._file)

    @contextmanager
    def on(self, number: int) -> Iterator[bool]:
        """Whether this process has the number for the block; False where another has it.

        Args:
            number: At least 0.
        """
        if fcntl is None:
            yield True
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process is in such a block; this one waits for its turn."""
        if fcntl is not None:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _ALONE)
        try:
            yield
        finally:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _ALONE)
