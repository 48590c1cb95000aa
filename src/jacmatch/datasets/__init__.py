"""Data sets: every loader makes the same checks and returns the same two records, `Data` and `Split`.

Example:
    >>> from jacmatch import datasets
    >>> data = datasets.load("synthetic:D=3,K=2,N=16")
    >>> len(data.train), data.shape, data.outputs, data.classes
    (16, (3,), 2, None)
"""

from jacmatch.datasets.arrays import from_arrays
from jacmatch.datasets.catalog import LOADERS, load
from jacmatch.datasets.data import Data, Split, as_floats, of_classes, per_class, split_validation
from jacmatch.datasets.streamed import Streamed

__all__ = [
    "LOADERS",
    "Data",
    "Split",
    "Streamed",
    "as_floats",
    "from_arrays",
    "load",
    "of_classes",
    "per_class",
    "split_validation",
]
