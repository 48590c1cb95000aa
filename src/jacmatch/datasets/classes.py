"""Some classes of a data set as a data set of its own."""

from collections.abc import Sequence

import torch

from jacmatch.datasets.data import Data, Split, statistics
from jacmatch.errors import InputError


def of_classes(data: Data, classes: Sequence[int]) -> Data:
    """The samples of these classes, renumbered 0, 1, … in the order given, with mean and deviation of their own.

    Args:
        data: A data set with classes.
        classes: At least two different class numbers of it.

    Raises:
        InputError: It has no classes, or not these.

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
        rule = f"`classes` of `of_classes` must be at least two different ones of 0 … {data.classes - 1}."
        raise InputError(rule, got=chosen)
    number = torch.full((data.classes,), -1)
    number[chosen] = torch.arange(len(chosen))

    def part(split: Split) -> Split:
        kept = (number.to(split.y.device)[split.y] >= 0).nonzero()[:, 0]
        some = split.subset(kept)
        return Split(some.x, number.to(some.y.device)[some.y])

    train, test = part(data.train), part(data.test)
    if not len(test):
        raise InputError("`classes` of `of_classes` must occur in the test part.", got=chosen)
    name = f"{data.name}[{','.join(map(str, chosen))}]"
    return Data(name, train, test, len(chosen), len(chosen), data.shape, *statistics(train))
