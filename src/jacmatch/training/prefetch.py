"""Reading ahead: while the device works on a batch, threads fetch and decode the next ones.

Threads and not processes: file access, decoding and resizing let go of Python's lock, nothing has to be copied between
processes or pickled, nothing is forked beside a GPU, and a script needs no `if __name__ == "__main__"`. What is read
depends on its number alone, so how many threads there are, and how far they are ahead, changes no result.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from jacmatch.datasets import Split, Streamed, as_floats

_Plan = TypeVar("_Plan")
_Read = TypeVar("_Read")

RESIDENT_BYTES = 2**28
"""Streamed images that decoded fill no more than this are read into memory once."""
_WORKERS, _AHEAD, _BLOCK = 2, 2, 64


class Ahead(Generic[_Plan, _Read]):
    """`ahead(number)` is `(plan(number), read(plan(number)))`, read by threads before it is asked for.

    An error of `read` is raised when its number is asked for, neither earlier nor instead of another.

    Args:
        plan: Says what to read; called by the thread that asks.
        read: Reads it; called in any thread, and must depend on its argument alone.
        workers: Threads; with 0 everything is read when it is asked for.
        ahead: How many numbers are read beyond the one that is asked for.
        stop: The first number that there is not; None: there is no end.

    Example:
        >>> with closing(Ahead(lambda number: number, lambda number: number**2, workers=2, ahead=3)) as squares:
        ...     [squares(number) for number in (4, 5, 9)]
        [(4, 16), (5, 25), (9, 81)]
    """

    def __init__(
        self,
        plan: Callable[[int], _Plan],
        read: Callable[[_Plan], _Read],
        *,
        workers: int,
        ahead: int,
        stop: int | None = None,
    ) -> None:
        self._plan, self._read, self._stop = plan, read, stop
        self._ahead = max(ahead, workers - 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="jacmatch-data") if workers else None
        self._queue: deque[tuple[int, _Plan, Future[_Read]]] = deque()

    def __call__(self, number: int) -> tuple[_Plan, _Read]:
        """Number `number`; reading goes on with those after it."""
        if self._pool is None:
            plan = self._plan(number)
            return plan, self._read(plan)
        while self._queue and self._queue[0][0] != number:  # somebody jumped: a resumed run, for instance
            self._queue.popleft()[2].cancel()
        last = number + self._ahead if self._stop is None else min(number + self._ahead, self._stop - 1)
        for one in range(self._queue[-1][0] + 1 if self._queue else number, last + 1):
            plan = self._plan(one)
            self._queue.append((one, plan, self._pool.submit(self._read, plan)))
        _, plan, future = self._queue.popleft()
        return plan, future.result()

    def close(self) -> None:
        """Ends the threads; what has not been begun is not read."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._queue.clear()


def in_order(
    split: Split, batch_size: int, place: torch.device
) -> Iterator[tuple[Float[Tensor, "batch *input"], Shaped[Tensor, "batch *row"]]]:
    """All samples once, in order: inputs and labels on the device, read ahead where they are on disk.

    Args:
        split: The data.
        batch_size: Samples at once.
        place: The device.
    """
    blocks = torch.split(torch.arange(len(split)), batch_size)
    workers = _WORKERS if isinstance(split.x, Streamed) else 0
    with closing(Ahead(blocks.__getitem__, split.stored, workers=workers, ahead=_AHEAD, stop=len(blocks))) as ahead:
        for number in range(len(blocks)):
            rows, stored = ahead(number)
            yield as_floats(stored.to(place)), split.y[rows.to(split.y.device)].to(place)


def resident(split: Split, device: torch.device, most: int = RESIDENT_BYTES) -> Split:
    """The split on the device, if that is affordable; otherwise as it is.

    Images on disk are read into memory once if they fill at most `most` bytes there. What is in memory goes to a GPU if
    it fills at most a quarter of what is free there.

    Args:
        split: A split anywhere.
        device: Where it shall be.
        most: Largest number of bytes of a streamed split that is kept in memory.
    """
    if isinstance(split.x, Streamed):
        if split.x.nbytes > most:
            return split
        split = _read_once(split)
    assert isinstance(split.x, Tensor)
    needed = split.x.numel() * split.x.element_size()
    if device.type == "cuda" and split.x.device != device and 4 * needed > torch.cuda.mem_get_info(device)[0]:
        return split
    return split.to(device)


def _read_once(split: Split) -> Split:
    blocks = torch.split(torch.arange(len(split)), _BLOCK)
    reader = Ahead(blocks.__getitem__, split.stored, workers=_WORKERS, ahead=_AHEAD, stop=len(blocks))
    with closing(reader) as ahead:
        return Split(torch.cat([ahead(number)[1] for number in range(len(blocks))]), split.y)
