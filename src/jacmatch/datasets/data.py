"""Data sets in memory: splits, classes, and parts of them."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped, UInt8, UInt64
from torch import Tensor

from jacmatch.datasets.streamed import Streamed
from jacmatch.errors import InputError, few

_COUNTED = 2048  # images from which the statistics of a streamed split are computed


@dataclass(frozen=True, eq=False)
class Split:
    """One part (training or test) of a data set.

    Attributes:
        x: Raw inputs: bytes (images, 0–255) or floats, or images on disk that are decoded on access. Models normalize
            their own inputs.
        y: Class indices from 0, of samples or of their positions (−100: no label), or regression targets.
        jacobians: ∂y_k/∂x_i of the true function with respect to what `inputs` returns; NaN where an entry is unknown,
            None if all are.

    Example:
        >>> split = Split(torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8), torch.tensor([0, 1]))
        >>> split.inputs(torch.tensor([1])).tolist()
        [[0.20000000298023224, 0.4000000059604645]]
    """

    x: UInt8[Tensor, "sample *input"] | Float32[Tensor, "sample *input"] | Streamed
    y: Int64[Tensor, "sample *position"] | Float32[Tensor, "sample row"]
    jacobians: Float32[Tensor, "sample row *input"] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self, rows: Int64[Tensor, "batch"] | None = None) -> Float32[Tensor, "batch *input"]:
        """Return the inputs of some rows (None: all) as new floats: bytes become x/255 in [0, 1]."""
        return as_floats(self.stored(rows))

    def stored(
        self, rows: Int64[Tensor, "batch"] | None = None
    ) -> UInt8[Tensor, "batch *input"] | Float32[Tensor, "batch *input"]:
        """Return a copy of the inputs of some rows (None: all) in their stored type."""
        if isinstance(self.x, Streamed):
            return self.x[torch.arange(len(self)) if rows is None else rows]
        return self.x.clone() if rows is None else self.x[rows.to(self.x.device)]

    def subset(self, rows: Int64[Tensor, "batch"]) -> "Split":
        """Return the split with these rows only, in this order."""
        rows = rows.to(self.x.device)
        x = self.x.subset(rows) if isinstance(self.x, Streamed) else self.x[rows]
        return Split(x, self.y[rows], None if self.jacobians is None else self.jacobians[rows])

    def to(self, device: torch.device | str) -> "Split":
        """Return the split with its tensors on another device; streamed images stay on disk."""
        if isinstance(self.x, Streamed):
            return self
        jacobians = None if self.jacobians is None else self.jacobians.to(device)
        return Split(self.x.to(device), self.y.to(device), jacobians)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of type, shape and bytes of inputs (`x`), targets (`y`) and known Jacobians (`j`).

        For streamed images see `Streamed.digest`.
        """
        arrays = {"x": self.x, "y": self.y, "j": self.jacobians}
        return {name: _digest(each) for name, each in arrays.items() if each is not None}


def _digest(given: Tensor | Streamed) -> str:
    """Return the SHA-256 of type, shape and bytes, the same on machines of either byte order."""
    if isinstance(given, Streamed):
        return given.digest()
    array = given.detach().cpu().contiguous().numpy()
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    digest.update(array.data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Data:
    """A data set with a training and a test split, returned by `datasets.load` or `datasets.from_arrays`.

    Attributes:
        name: Its name on the command line.
        train: The training split.
        test: The test split.
        classes: Number of classes; None for regression.
        outputs: Number of outputs of a model: the number of classes, or of regression targets.
        shape: Shape of one input.
        mean: Mean of the training inputs as `Split.inputs` returns them, per channel (images) or per feature.
        std: Standard deviation of the training inputs, per channel or per feature; 1 if it is zero.
    """

    name: str
    train: Split
    test: Split
    classes: int | None
    outputs: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Shape of the labels of a sample that has one for each position, (H, W); empty for one label per sample."""
        return () if self.classes is None else tuple(self.train.y.shape[1:])

    @property
    def digests(self) -> dict[str, str]:
        """`Split.digests` of both parts, by the names of the arrays in an npz file: `x_train`, `y_test`, …."""
        return {
            f"{name}_{part}": digest
            for part, split in (("train", self.train), ("test", self.test))
            for name, digest in split.digests.items()
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all arrays; the order of rows counts."""
        return hashlib.sha256(repr(sorted(self.digests.items())).encode()).hexdigest()


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the inputs, per channel of images and per feature otherwise.

    μ_c = Σ_n x_nc / N and s_c = √(Σ_n (x_nc − μ_c)² / N) with n over samples and pixels, in float64; s_c = 0 becomes 1.
    For a streamed split the sums are over at most 2,048 evenly spaced samples.
    """
    if isinstance(split.x, Streamed):
        pairs = _of_bytes(split.x[rows] for rows in torch.split(split.x.spread(_COUNTED), 64))
    elif split.x.dtype == torch.uint8 and split.x.ndim > 2:
        pairs = _of_bytes([split.x])
    else:
        pairs = _of_numbers(split.x)
    return tuple(mean for mean, _ in pairs), tuple(std if std > 0 else 1.0 for _, std in pairs)


def as_floats(x: UInt8[Tensor, "batch *input"] | Float32[Tensor, "batch *input"]) -> Float32[Tensor, "batch *input"]:
    """Convert stored inputs to the inputs of a network: bytes become x/255, floats are unchanged."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x


def _of_bytes(blocks: Iterable[UInt8[Tensor, "batch *input"]]) -> list[tuple[float, float]]:
    """Return exact statistics from the 256 counts of each channel, ten times faster than summing floats."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = sum(
        torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in x.unbind(1)]) for x in blocks
    )
    assert isinstance(counts, Tensor)
    pairs = []
    for count in counts:
        share = count.double() / int(count.sum())
        mean = (share * levels).sum()
        pairs.append((mean.item(), math.sqrt((share * (levels - mean).square()).sum().item())))
    return pairs


def _of_numbers(x: UInt8[Tensor, "sample *input"] | Float32[Tensor, "sample *input"]) -> list[tuple[float, float]]:
    """Return statistics in two passes over blocks of rows, so that float64 copies stay small.

    The sum of equal float32 numbers is exact in float64, so the deviation of a constant column is exactly zero.
    """
    width = x.shape[1]
    count = x.numel() // width
    mean = torch.zeros(width, dtype=torch.float64)
    for block in torch.split(x, 4096):
        mean += _columns(as_floats(block)).sum(1)
    mean /= count
    variance = torch.zeros(width, dtype=torch.float64)
    for block in torch.split(x, 4096):
        variance += (_columns(as_floats(block)) - mean[:, None]).square().sum(1)
    return list(zip(mean.tolist(), (variance / count).sqrt().tolist(), strict=True))


def _columns(x: Float32[Tensor, "batch *input"]) -> Tensor:
    """One row for each channel or feature, in float64."""
    return x.transpose(0, 1).flatten(1).double()


_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int, count: int) -> UInt64[np.ndarray, "sample"]:
    """Return the first numbers of the SplitMix64 generator from `state`, any integer, taken modulo 2⁶⁴.

    References:
        Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64)
    z: UInt64[np.ndarray, "sample"] = np.array([state % _WORD], dtype=np.uint64) + steps * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return z


def keys(seed: int, count: int, stream: int = 0) -> UInt64[np.ndarray, "sample"]:
    """Return 64 random bits for each of `count` rows, a function of (seed, stream, row number) only."""
    return splitmix64(int(splitmix64(seed, stream + 1)[stream]), count)


def per_class(labels: Shaped[Tensor, "sample *row"], count: int, seed: int) -> Int64[Tensor, "chosen"]:
    """Return the row numbers, ascending, of `count` samples of each class 0 … K−1.

    With the same seed a smaller choice is part of a larger one.

    Args:
        labels: The class of each row; the largest is K−1.
        count: Samples per class, at least 1.
        seed: Any integer.

    Raises:
        InputError: `count` is below 1, a class has fewer samples, or `labels` are not class indices.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 1])
        >>> labels[per_class(labels, 2, seed=0)].bincount().tolist()
        [2, 2]
    """
    if isinstance(count, bool) or count < 1:
        raise InputError("`count` of `per_class` (samples per class) must be at least 1.", got=count)
    if labels.is_floating_point() or labels.dim() > 1:
        rule = "`labels` of `per_class` must be class indices, one for each sample."
        got = "the targets of a regression" if labels.is_floating_point() else "per-position labels"
        raise InputError(rule, got=got, do="Leave the number per class out.")
    classes = labels.cpu().numpy()
    sizes = np.bincount(classes)
    short = [f"class {number}: {size}" for number, size in enumerate(sizes) if size < count]
    if short:
        rule = "`count` of `per_class` (`--per-class`) must be at most the number of samples in each class."
        raise InputError(rule, got=f"{count}, and {few(short, 5)}", do=f"Use at most {sizes.min()}.")
    order = np.argsort(keys(seed, len(classes)), kind="stable")
    chosen = [order[classes[order] == number][:count] for number in range(len(sizes))]
    return torch.from_numpy(np.sort(np.concatenate(chosen)).astype(np.int64))


def split_validation(
    labels: Shaped[Tensor, "sample *row"], amount: int | float, seed: int
) -> tuple[Int64[Tensor, "train"], Int64[Tensor, "validation"]]:
    """Split rows into training and validation; return the row numbers of each, ascending.

    Class indices (integers) are stratified: class c with n_c of N rows gives amount·n_c/N of them, rounded so that the
    total is exact, and keeps at least one training row. Targets of a regression (floats) and per-position labels are
    split at random.

    Args:
        labels: The class or the targets of each row.
        amount: How many rows to hold out, or (a float between 0 and 1) which fraction of them.
        seed: Any integer.

    Raises:
        InputError: `amount` is too large or too small for this number of rows.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 1, 0])
        >>> train, validation = split_validation(labels, 2, seed=0)
        >>> labels[train].bincount().tolist(), labels[validation].bincount().tolist()
        ([2, 2], [1, 1])
    """
    total = len(labels)
    count = _validation_count(amount, total)
    rank = keys(seed, total, stream=1)
    order = np.argsort(rank, kind="stable")
    if labels.is_floating_point() or labels.dim() > 1:
        chosen = order[:count]
    else:
        classes = labels.cpu().numpy()
        numbers, sizes = np.unique(classes, return_counts=True)
        if count > total - len(numbers):
            rule = "`amount` of `split_validation` (`--validation`) must leave a training row for each class."
            do = "Hold out fewer: --validation 0."
            raise InputError(rule, got=f"{count} of {total} rows in {len(numbers)} classes", do=do)
        shares = _shares(sizes, count)
        parts = [order[classes[order] == number][:share] for number, share in zip(numbers, shares, strict=True)]
        chosen = np.concatenate(parts)
    validation_rows = np.zeros(total, dtype=bool)
    validation_rows[chosen] = True
    return torch.from_numpy(np.flatnonzero(~validation_rows)), torch.from_numpy(np.flatnonzero(validation_rows))


def _validation_count(amount: int | float, total: int) -> int:
    if isinstance(amount, float) and 0 < amount < 1:
        count = max(1, round(amount * total))
    elif isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1:
        count = amount
    else:
        rule = "`amount` of `split_validation` must be a number of rows (an integer from 1) or a share between 0 and 1."
        raise InputError(rule, got=amount)
    if count >= total:
        rule = f"`amount` of `split_validation` must be smaller than the number of rows, {total}."
        raise InputError(rule, got=count, do="Hold out fewer.")
    return count


def _shares(sizes: Int64[np.ndarray, "classes"], count: int) -> list[int]:
    """Largest-remainder method: the whole part of each share, then one more where the fraction cut off is largest."""
    rows = [int(size) for size in sizes]
    total = sum(rows)
    shares = [count * size // total for size in rows]
    while sum(shares) < count:
        cut_off = [(count * size - share * total, -c) for c, (size, share) in enumerate(zip(rows, shares, strict=True))]
        _, c = max(cut_off[c] for c in range(len(rows)) if shares[c] < rows[c] - 1)
        shares[-c] += 1
    return shares


def of_classes(data: Data, classes: Sequence[int]) -> Data:
    """Return the samples of some classes, renumbered 0, 1, …, with their own mean and standard deviation.

    Args:
        data: A data set with classes.
        classes: At least two different class indices of it.

    Raises:
        InputError: The data set has no classes, or not all of these.

    Example:
        >>> from jacmatch.datasets import load
        >>> last = of_classes(load("digits"), range(5, 10))
        >>> last.name, last.classes, sorted(set(last.train.y.tolist()))
        ('digits[5,6,7,8,9]', 5, [0, 1, 2, 3, 4])
    """
    chosen = list(classes)
    if data.classes is None:
        raise InputError("`data` of `of_classes` must have classes.", got="a regression")
    if len(set(chosen)) != len(chosen) or len(chosen) < 2 or not all(0 <= each < data.classes for each in chosen):
        rule = f"`classes` of `of_classes` must be at least two distinct numbers of 0 … {data.classes - 1}."
        raise InputError(rule, got=chosen)
    number = torch.full((data.classes,), -1)
    number[chosen] = torch.arange(len(chosen))

    def part(split: Split) -> Split:
        some = split.subset((number.to(split.y.device)[split.y] >= 0).nonzero()[:, 0])
        return Split(some.x, number.to(some.y.device)[some.y])

    train, test = part(data.train), part(data.test)
    if not len(test):
        raise InputError("`classes` of `of_classes` must occur in the test part.", got=chosen)
    name = f"{data.name}[{','.join(map(str, chosen))}]"
    return Data(name, train, test, len(chosen), len(chosen), data.shape, *statistics(train))
