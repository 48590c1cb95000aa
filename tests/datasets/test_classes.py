"""Some classes of a data set are a data set of their own."""

import pytest
import torch

from jacmatch import datasets
from jacmatch.datasets import of_classes
from jacmatch.errors import InputError


def test_they_are_renumbered_and_measured_anew():
    data = datasets.load("digits")
    some = of_classes(data, [7, 2, 9])
    for part, whole in ((some.train, data.train), (some.test, data.test)):
        for new, old in enumerate([7, 2, 9]):
            assert torch.equal(part.x[part.y == new], whole.x[whole.y == old])
        assert len(part) == sum(int((whole.y == old).sum()) for old in (7, 2, 9))
    assert (some.classes, some.outputs, some.shape) == (3, 3, data.shape)
    assert some.mean[0] == pytest.approx(float(some.train.inputs().mean()), abs=1e-5)


@pytest.mark.parametrize("classes", [[1], [1, 1], [3, 10], []])
def test_classes_that_are_none(classes):
    with pytest.raises(InputError, match=r"`classes` of `of_classes` must be at least two distinct numbers of 0 … 9"):
        of_classes(datasets.load("digits"), classes)


def test_a_regression_has_none():
    with pytest.raises(InputError, match=r"`data` of `of_classes` must have classes\. Got a regression"):
        of_classes(datasets.load("synthetic:D=2,K=2,N=8,T=4"), [0, 1])
