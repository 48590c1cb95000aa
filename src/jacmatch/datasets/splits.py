"""Choosing rows: pure functions of a seed, the same on every machine and with every version of torch and numpy."""

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt64
from torch import Tensor

from jacmatch.errors import InputError

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int, count: int) -> UInt64[np.ndarray, "sample"]:
    """The first numbers of the SplitMix64 generator started at `state`, any integer, taken modulo 2⁶⁴.

    References:
        Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Example:
        >>> splitmix64(1234567, 2).tolist()
        [6457827717110365317, 3203168211198807973]
    """
    steps = np.arange(1, count + 1, dtype=np.uint64)
    z: UInt64[np.ndarray, "sample"] = np.array([state % _WORD], dtype=np.uint64) + steps * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return z


def keys(seed: int, count: int, stream: int = 0) -> UInt64[np.ndarray, "sample"]:
    """64 random bits for each row, a function of (seed, stream, row number) only.

    Args:
        seed: Any integer.
        count: How many rows.
        stream: Separates uses of one seed, from 0.
    """
    return splitmix64(int(splitmix64(seed, stream + 1)[stream]), count)


def per_class(labels: Shaped[Tensor, "sample *row"], count: int, seed: int) -> Int64[Tensor, "chosen"]:
    """Row numbers, ascending, of `count` samples of each class 0 … K−1, where K − 1 is the largest label.

    With the same seed a smaller choice is a part of a larger one.

    Args:
        labels: The class of each row.
        count: How many of each class, at least 1.
        seed: Any integer.

    Raises:
        InputError: `count` is below 1, a class has fewer samples, or `labels` are not class numbers.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 1])
        >>> labels[per_class(labels, 2, seed=0)].bincount().tolist()
        [2, 2]
    """
    if isinstance(count, bool) or count < 1:
        raise InputError("`count` of `per_class` (samples per class) must be at least 1.", got=count)
    if labels.is_floating_point():
        rule = "`labels` of `per_class` must be class numbers."
        raise InputError(rule, got="the targets of a regression", do="Leave the number per class out.")
    classes = labels.cpu().numpy()
    sizes = np.bincount(classes)
    short = [f"class {number}: {size}" for number, size in enumerate(sizes) if size < count]
    if short:
        got = ", ".join(short[:5]) + (f" and {len(short) - 5} more classes" if len(short) > 5 else "")
        rule = f"`count` of `per_class` (samples per class) is {count}; every class must have as many."
        raise InputError(rule, got=got, do=f"Ask for at most {sizes.min()}.")
    order = np.argsort(keys(seed, len(classes)), kind="stable")
    chosen = [order[classes[order] == number][:count] for number in range(len(sizes))]
    return torch.from_numpy(np.sort(np.concatenate(chosen)).astype(np.int64))


def split_validation(
    labels: Shaped[Tensor, "sample *row"], amount: int | float, seed: int
) -> tuple[Int64[Tensor, "kept"], Int64[Tensor, "held"]]:
    """Row numbers (kept for training, held out for validation), each ascending, disjoint, together all rows.

    Class numbers (integers) are stratified: class c with n_c of N rows gives amount·n_c/N of them, rounded so that the
    total is exact, and always keeps a training row. Targets of a regression (floats) are split at random.

    Args:
        labels: The class or the targets of each row.
        amount: How many rows to hold out, or (a float between 0 and 1) which share of them.
        seed: Any integer.

    Raises:
        InputError: `amount` is not possible for so many rows.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 1, 0])
        >>> kept, held = split_validation(labels, 2, seed=0)
        >>> labels[kept].bincount().tolist(), labels[held].bincount().tolist()
        ([2, 2], [1, 1])
    """
    total = len(labels)
    count = _held_count(amount, total)
    rank = keys(seed, total, stream=1)
    order = np.argsort(rank, kind="stable")
    if labels.is_floating_point():
        chosen = order[:count]
    else:
        classes = labels.cpu().numpy()
        numbers, sizes = np.unique(classes, return_counts=True)
        if count > total - len(numbers):
            rule = "`amount` of `split_validation` must leave a training row for each class."
            raise InputError(rule, got=f"{count} of {total} rows in {len(numbers)} classes", do="Hold out fewer.")
        shares = _shares(sizes, count)
        parts = [order[classes[order] == number][:share] for number, share in zip(numbers, shares, strict=True)]
        chosen = np.concatenate(parts)
    held = np.zeros(total, dtype=bool)
    held[chosen] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def _held_count(amount: int | float, total: int) -> int:
    if isinstance(amount, float) and 0 < amount < 1:
        count = max(1, round(amount * total))
    elif isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1:
        count = amount
    else:
        rule = (
            "`amount` of `split_validation` must be a number of rows (integer, at least 1) or a share between 0 and 1."
        )
        raise InputError(rule, got=amount)
    if count >= total:
        rule = f"`amount` of `split_validation` must be smaller than the number of rows, {total}."
        raise InputError(rule, got=count, do="Hold out fewer.")
    return count


def _shares(sizes: Int64[np.ndarray, "classes"], count: int) -> list[int]:
    """Largest remainders: the whole part of each share, then one more where the fraction cut off is largest."""
    rows = [int(size) for size in sizes]
    total = sum(rows)
    shares = [count * size // total for size in rows]
    while sum(shares) < count:
        cut_off = [(count * size - share * total, -c) for c, (size, share) in enumerate(zip(rows, shares, strict=True))]
        _, c = max(cut_off[c] for c in range(len(rows)) if shares[c] < rows[c] - 1)
        shares[-c] += 1
    return shares
