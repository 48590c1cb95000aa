"""The digits of scikit-learn."""

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from jacmatch import datasets
from jacmatch.errors import InputError, UnsupportedError


def test_digits_are_all_there_once_split_and_stratified():
    data = datasets.load("digits", seed=3)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (1297, 500, 10, (1, 8, 8))
    pixels, labels = load_digits(return_X_y=True)
    got = torch.cat([data.train.x, data.test.x]).reshape(-1, 64).numpy() * 16
    together = np.column_stack([got, torch.cat([data.train.y, data.test.y]).numpy()])
    expected = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(expected, axis=0))
    quotas = np.bincount(labels) * 500 / 1797
    assert (np.abs(np.bincount(data.test.y.numpy()) - quotas) < 1).all()
    assert float(data.train.x.max()) == 1.0


def test_the_split_is_a_function_of_the_seed():
    first, again, other = (datasets.load("digits", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_digits_take_no_argument():
    with pytest.raises(InputError, match=r"`--data digits` takes no argument\. Got 'odd'\. Write digits"):
        datasets.load("digits:odd")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UnsupportedError, match=r"scikit-learn, which is not installed\. Install it with: pip install"):
        datasets.load("digits")
