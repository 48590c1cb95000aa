"""Which process writes which shard, where several write one cache: locks that end with the process that holds them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jacmatch.runs.lock import Lock, try_lock
from jacmatch.teachers.cached.layout import disk

_NAME = ".claim"
_BETWEEN = 0.02  # seconds between two attempts to be alone


class Claims:
    """Locks on numbers in a folder: a file each, for as long as it is held.

    Args:
        folder: Of the cache; it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk(folder, "written to"):
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def on(self, number: int) -> Iterator[bool]:
        """Whether this process has the number for the block; False where another has it.

        Args:
            number: At least 0.
        """
        lock = self._try(f"{_NAME}-{number:05d}")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process is in such a block; this one waits for its turn."""
        while (lock := self._try(_NAME)) is None:
            time.sleep(_BETWEEN)
        try:
            yield
        finally:
            lock.release()

    def _try(self, name: str) -> Lock | None:
        with disk(self.folder, "written to"):
            return try_lock(self.folder / name)
