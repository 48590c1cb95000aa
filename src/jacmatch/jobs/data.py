"""The data of a job: loaded by name, cut, and split."""

from dataclasses import replace

import torch

from jacmatch import datasets
from jacmatch.datasets import Data, Split
from jacmatch.errors import InputError

SMOKE_TRAIN, SMOKE_TEST = 12, 2
"""Training and test samples of a smoke run, for each class."""


def load(spec: str, seed: int, smoke: bool) -> Data:
    """Load a data set; in a smoke run with few test samples.

    Raises:
        InputError: There is no such data set, or the seed is out of range.
    """
    if not 0 <= seed < 2**63:
        raise InputError("`--seed` must be at least 0 and below 2⁶³.", got=seed)
    data = datasets.load(spec, seed)
    return replace(data, test=some(data, data.test, SMOKE_TEST)) if smoke else data


def some(data: Data, split: Split, count: int) -> Split:
    """Return the first `count` samples of each class; in a regression the first 100 samples."""
    if data.classes is None:
        return split.subset(torch.arange(min(100, len(split))))
    rank = torch.zeros_like(split.y)
    for label in range(data.classes):
        of_class = split.y == label
        rank[of_class] = torch.arange(int(of_class.sum()), device=rank.device)
    return split.subset((rank < count).nonzero()[:, 0])


def parts(data: Data, validation: float, per_class: int, seed: int) -> tuple[Split, Split | None]:
    """Return training samples, `per_class` of each class, and the validation samples held out before.

    Raises:
        InputError: The numbers are negative, or there are not that many samples.
    """
    if per_class < 0:
        raise InputError("`--per-class` must be at least 0, where 0 takes all.", got=per_class)
    if not (0 <= validation < 1 or (validation > 0 and float(validation).is_integer())):
        raise InputError("`--validation` must be a share below 1 or a whole number.", got=validation)
    split, validation_part = data.train, None
    if validation:
        amount = validation if validation < 1 else int(validation)
        train_rows, validation_rows = datasets.split_validation(split.y, amount, seed)
        split, validation_part = split.subset(train_rows), split.subset(validation_rows)
    if per_class:
        split = split.subset(datasets.per_class(split.y, per_class, seed))
    return split, validation_part
