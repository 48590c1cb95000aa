"""The digits data set of scikit-learn, which needs no file and no download."""

import numpy as np
import torch

from jacmatch.datasets.arrays import from_arrays
from jacmatch.datasets.data import Data, split_validation
from jacmatch.errors import InputError, UnsupportedError

TEST_ROWS = 500


def load(argument: str, seed: int) -> Data:
    """Return `digits`, 1,797 gray images of 8 × 8 pixels in ten classes, values/16 in [0, 1].

    There is no official split; 500 rows, stratified by class and chosen by `seed`, are the test part.

    Raises:
        InputError: `argument` is not empty.
        UnsupportedError: scikit-learn is not installed.

    References:
        Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (CC BY 4.0).
    """
    if argument:
        raise InputError("`--data digits` takes no argument.", got=repr(argument), do="Write digits.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        install = "Install it with: pip install 'jacmatch[train]'."
        raise UnsupportedError(f"`--data digits` comes with scikit-learn, which is not installed. {install}") from error
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    y = labels.astype(np.int64)
    train, test = (rows.numpy() for rows in split_validation(torch.from_numpy(y), TEST_ROWS, seed))
    return from_arrays("digits", {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]})
