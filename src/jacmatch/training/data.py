"""Batches of a training: the order of the samples, reading ahead, and augmentation of images.

Everything is a pure function of (seed, row number, epoch). A sample does not depend on the other samples of its batch,
and a resumed run continues with the batches that the interrupted run would have had.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from jacmatch.datasets import Split, Streamed, as_floats
from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian import probes

_P = TypeVar("_P")
_R = TypeVar("_R")

RESIDENT_BYTES = 2**28
"""Streamed images that decoded fill no more than this are read into memory once."""
_WORKERS, _AHEAD, _BLOCK = 2, 2, 64


class Ahead(Generic[_P, _R]):
    """`ahead(number)` is `(plan(number), read(plan(number)))`, read by threads in advance.

    If `read` fails, the call for its number raises the error.

    Example:
        >>> with closing(Ahead(lambda number: number, lambda number: number**2, workers=2, ahead=3)) as squares:
        ...     [squares(number) for number in (4, 5, 9)]
        [(4, 16), (5, 25), (9, 81)]
    """

    def __init__(
        self, plan: Callable[[int], _P], read: Callable[[_P], _R], *, workers: int, ahead: int, stop: int | None = None
    ) -> None:
        self._plan, self._read, self._stop = plan, read, stop
        self._ahead = max(ahead, workers - 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="jacmatch-data") if workers else None
        self._queue: deque[tuple[int, _P, Future[_R]]] = deque()

    def __call__(self, number: int) -> tuple[_P, _R]:
        """Return element `number`; the threads go on with those after it."""
        if self._pool is None:
            plan = self._plan(number)
            return plan, self._read(plan)
        while self._queue and self._queue[0][0] != number:  # out of order: a resumed run, for instance
            self._queue.popleft()[2].cancel()
        last = number + self._ahead if self._stop is None else min(number + self._ahead, self._stop - 1)
        for one in range(self._queue[-1][0] + 1 if self._queue else number, last + 1):
            plan = self._plan(one)
            self._queue.append((one, plan, self._pool.submit(self._read, plan)))
        _, plan, future = self._queue.popleft()
        return plan, future.result()

    def close(self) -> None:
        """Stop the threads; pending reads are canceled."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._queue.clear()


def in_order(
    split: Split, batch_size: int, device: torch.device
) -> Iterator[tuple[Float[Tensor, "batch *input"], Shaped[Tensor, "batch *row"]]]:
    """Iterate over all samples in order: inputs and labels on the device, read ahead if they are on disk."""
    for rows, stored in _blocks(split, batch_size):
        yield as_floats(stored.to(device)), split.y[rows.to(split.y.device)].to(device)


def _blocks(split: Split, size: int) -> Iterator[tuple[Int64[Tensor, "batch"], Shaped[Tensor, "batch *input"]]]:
    """Iterate over row numbers and stored inputs of all samples in order."""
    blocks = torch.split(torch.arange(len(split)), size)
    workers = _WORKERS if isinstance(split.x, Streamed) else 0
    with closing(Ahead(blocks.__getitem__, split.stored, workers=workers, ahead=_AHEAD, stop=len(blocks))) as ahead:
        yield from map(ahead, range(len(blocks)))


def resident(split: Split, device: torch.device, most: int = RESIDENT_BYTES) -> Split:
    """Move the split to the device if its size allows; otherwise return it unchanged.

    Images on disk are read into memory once if they need at most `most` bytes. Data in memory are moved to a GPU if
    they need at most a quarter of its free memory.
    """
    if isinstance(split.x, Streamed):
        if split.x.nbytes > most:
            return split
        split = Split(torch.cat([stored for _, stored in _blocks(split, _BLOCK)]), split.y)
    assert isinstance(split.x, Tensor)
    needed = split.x.numel() * split.x.element_size()
    if device.type == "cuda" and split.x.device != device and 4 * needed > torch.cuda.mem_get_info(device)[0]:
        return split
    return split.to(device)


_SEED = 1_000_081
"""Offset of the seed, so that augmentation is independent of whatever else is drawn for the same sample."""


def augment(
    x: Float[Tensor, "batch *input"], ids: Int64[Tensor, "batch"], epoch: int, seed: int, which: Sequence[str]
) -> Float[Tensor, "batch *input"]:
    """Augment each image at random with the augmentations `which`, in the order of `AUGMENTATIONS`.

    - `crop`: shifted by whole pixels, uniform in −p … p along each axis, p = max(1, ⌊size/8 + ½⌋), which is the usual 4
      at 32 pixels; pixels from outside the image are 0 (black).
    - `flip`: mirrored left to right with probability ½.

    The random numbers of a sample do not depend on the selected augmentations.

    Args:
        x: Raw images (B, C, H, W).
        ids: Index of each sample in its data set.
        epoch: Epoch; each has new random numbers.
        seed: Seed of the run.
        which: Names of augmentations; if empty, x is returned unchanged, whatever its shape.

    Raises:
        InputError: A name is unknown, or x does not contain images.

    Example:
        >>> x = torch.rand(3, 1, 8, 8)
        >>> augment(x, torch.arange(3), epoch=0, seed=0, which=("crop", "flip")).shape
        torch.Size([3, 1, 8, 8])
    """
    for name in which:
        if name not in AUGMENTATIONS:
            raise unknown_name("`which` of `augment`", name, AUGMENTATIONS)
    if not which:
        return x
    if x.ndim != 4:
        got = f"inputs of shape {tuple(x.shape[1:])}"
        raise InputError("Augmentation (`augment`) needs images (channel, height, width).", got=got, do="Leave it out.")
    u = probes.uniform(seed + _SEED, ids, epoch, 3)
    for name, change in AUGMENTATIONS.items():
        if name in which:
            x = change(x, u)
    return x


def _crop(
    x: Float[Tensor, "batch channel height width"], u: Float[Tensor, "batch 3"]
) -> Float[Tensor, "batch channel height width"]:
    batch, channels, height, width = x.shape
    tall, wide = (max(1, (size + 4) // 8) for size in (height, width))
    padded = functional.pad(x, (wide, wide, tall, tall))
    top, left = (u[:, 0] * (2 * tall + 1)).long(), (u[:, 1] * (2 * wide + 1)).long()
    rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    sample = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return padded[sample, channel, rows, columns]


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "crop": _crop,
    "flip": lambda x, u: torch.where((u[:, 2] < 0.5)[:, None, None, None], x.flip(3), x),
}
"""Augmentations of `augment` by name; each maps images and uniform numbers (batch, 3) to images."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch as it is passed to an objective."""

    x: Float[Tensor, "batch *input"]  # inputs, augmented
    y: Shaped[Tensor, "batch *row"]  # classes or targets
    ids: Int64[Tensor, "batch"]  # row numbers in the training split
    view: int  # number of the view, which determines augmentation and partners
    # the inputs of other rows, augmented, if the objective needs them
    partners: Float[Tensor, "batch *input"] | None = None
    partner_labels: Shaped[Tensor, "batch *row"] | None = None  # their classes or targets

    def keywords(self) -> dict[str, Any]:
        """Arguments of an objective besides x and y, by name."""
        return {"ids": self.ids, "draw": self.view, "partners": self.partners, "partner_labels": self.partner_labels}


@dataclass(frozen=True, eq=False)
class _Plan:
    """The rows of a batch."""

    rows: Int64[Tensor, "batch"]
    view: int
    others: Int64[Tensor, "batch"] | None


class Batches:
    """The endless sequence of training batches; `batches(number)` is batch number 0, 1, ….

    Each epoch has a new random order of the samples, and omits the last samples if they do not fill a batch. A split
    smaller than `batch_size` is one batch.

    Args:
        split: The training split.
        batch_size: Samples in a batch.
        seed: Of the run.
        augment: Names of augmentations.
        partners: Whether each sample gets a partner, another sample of the split, which differs between views.
        views: Number of views: epoch e uses view e mod `views`. 0: each epoch has its own view.
        device: Device of the batches; None leaves them on the device of the split.
        workers: Number of threads that read data that are not on the device; 0: read on demand.
        prefetch: Number of batches that are read ahead.
        resident_bytes: Images on disk that fill no more than this are read into memory once; see `resident`.
        rank: Rank of this process; it gets the samples rank, rank + ranks, … of each batch.
        ranks: Number of processes.

    Raises:
        InputError: The split is empty, or a batch has no sample for one of the processes.

    Example:
        >>> split = Split(torch.rand(10, 3), torch.zeros(10, dtype=torch.int64))
        >>> batches = Batches(split, 4, seed=0)
        >>> torch.equal(batches(0).ids, batches(1).ids), len(batches(1).x)
        (False, 4)
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        augment: Sequence[str] = (),
        partners: bool = False,
        views: int = 0,
        device: torch.device | str | None = None,
        workers: int = 0,
        prefetch: int = 2,
        resident_bytes: int = RESIDENT_BYTES,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not len(split):
            raise InputError("`train` of `fit` must have samples.", got="an empty split")
        if min(batch_size, len(split)) < ranks:
            rule = f"A batch must have a sample for each of the {ranks} processes (`batch_size` is the total)."
            raise InputError(rule, got=f"{min(batch_size, len(split))} samples", do="Start fewer processes.")
        self.device = split.x.device if device is None else torch.device(device)
        self.split = resident(split, self.device, resident_bytes)
        self.seed, self.augment, self.partners, self.views = seed, augment, partners, views
        self.size = min(batch_size, len(split))
        self._rank, self._ranks = rank, ranks
        self._orders: dict[int, Int64[Tensor, "sample"]] = {}
        far = isinstance(self.split.x, Streamed) or self.split.x.device != self.device
        self._ahead = Ahead(self._plan, self._read, workers=workers if far else 0, ahead=prefetch)

    def __call__(self, number: int) -> Batch:
        """Batch `number`, counted from 0."""
        return self._finished(*self._ahead(number))

    def order(self, epoch: int) -> Int64[Tensor, "sample"]:
        """The row numbers in the order of an epoch, those that fill no batch last."""
        if epoch not in self._orders:
            key = torch.zeros(1, dtype=torch.int64, device=self.split.x.device)
            self._orders = dict([*self._orders.items()][-1:])  # two epochs: reading ahead is in the next epoch first
            self._orders[epoch] = probes.permutation(self.seed, key, epoch, len(self.split))[0]
        return self._orders[epoch]

    def of(self, rows: Int64[Tensor, "batch"], view: int) -> Batch:
        """Return the batch of these rows in a view."""
        plan = self._planned(rows, view)
        return self._finished(plan, self._read(plan))

    def close(self) -> None:
        """Stop the threads that read ahead."""
        self._ahead.close()

    def whole(self, number: int) -> Batch:
        """Batch `number` with the samples of all processes."""
        return self.of(*self._rows(number))

    def _rows(self, number: int) -> tuple[Int64[Tensor, "batch"], int]:
        """Rows and view of a batch."""
        epoch, position = divmod(number, len(self.split) // self.size)
        rows = self.order(epoch)[position * self.size : (position + 1) * self.size]
        return rows, epoch % self.views if self.views else epoch

    def _plan(self, number: int) -> _Plan:
        rows, view = self._rows(number)
        return self._planned(rows[self._rank :: self._ranks], view)

    def _planned(self, rows: Int64[Tensor, "batch"], view: int) -> _Plan:
        return _Plan(rows, view, probes.partners(self.seed, rows, view, len(self.split)) if self.partners else None)

    def _read(self, plan: _Plan) -> list[Shaped[Tensor, "..."]]:
        """Return the stored inputs of the rows and of their partners, in pinned memory for a GPU."""
        pinned = self.device.type == "cuda" and self.split.x.device.type == "cpu"
        parts = [self.split.stored(rows) for rows in (plan.rows, plan.others) if rows is not None]
        return [part.pin_memory() for part in parts] if pinned else parts

    def _finished(self, plan: _Plan, stored: list[Shaped[Tensor, "..."]]) -> Batch:
        x, y, ids = self._on_device(stored[0], plan.rows, plan.view)
        if plan.others is None:
            return Batch(x, y, ids, plan.view)
        partners, labels, _ = self._on_device(stored[1], plan.others, plan.view)
        return Batch(x, y, ids, plan.view, partners, labels)

    def _on_device(
        self, stored: Shaped[Tensor, "batch *input"], rows: Int64[Tensor, "batch"], view: int
    ) -> tuple[Float[Tensor, "batch *input"], Shaped[Tensor, "batch *row"], Int64[Tensor, "batch"]]:
        """Return inputs, augmented on the device, labels and row numbers."""
        x = as_floats(stored.to(self.device, non_blocking=True))
        y = self.split.y[rows].to(self.device, non_blocking=True)
        ids = rows.to(self.device, non_blocking=True)
        return augment(x, ids, view, self.seed, self.augment), y, ids
