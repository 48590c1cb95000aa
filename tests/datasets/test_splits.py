"""Rows chosen by a seed."""

import numpy as np
import pytest
import torch

from jacmatch.datasets import per_class, split_validation
from jacmatch.datasets.data import keys, splitmix64
from jacmatch.errors import InputError


def labels_of(sizes, seed=0):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.RandomState(seed).shuffle(labels)
    return torch.from_numpy(labels)


def test_generator_gives_the_published_numbers():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5).tolist() == published


def test_keys_depend_on_seed_and_stream_and_not_on_their_number():
    np.testing.assert_array_equal(keys(3, 10), keys(3, 100)[:10])
    rows = [keys(seed, 50, stream).tolist() for seed in (0, 1, -1, 2**70 + 5) for stream in (0, 1, 2)]
    assert len({number for row in rows for number in row}) == 12 * 50


def test_per_class_takes_exactly_that_many_of_each():
    labels = labels_of([5, 9, 30])
    rows = per_class(labels, 5, seed=1)
    assert torch.equal(rows, rows.sort().values)
    assert torch.bincount(labels[rows]).tolist() == [5, 5, 5]
    assert len(set(rows.tolist())) == 15


def test_a_smaller_choice_is_part_of_a_larger_one():
    labels = labels_of([50, 60, 70])
    small, large = (set(per_class(labels, count, seed=2).tolist()) for count in (10, 40))
    assert small < large


def test_the_choice_is_a_function_of_the_seed_and_no_row_is_preferred():
    labels = labels_of([40, 40])
    choices = [per_class(labels, 10, seed) for seed in range(400)]
    assert torch.equal(choices[7], per_class(labels, 10, 7))
    assert len({tuple(rows.tolist()) for rows in choices}) == 400
    # Each row is drawn 100 times on average, binomial with deviation 8.7: six of them around it.
    counts = torch.bincount(torch.cat(choices), minlength=80)
    assert int(counts.min()) > 48
    assert int(counts.max()) < 152


@pytest.mark.parametrize("count", [0, -3, True])
def test_per_class_refuses_a_count_below_one(count):
    with pytest.raises(InputError, match=r"`count` of `per_class` \(samples per class\) must be at least 1\. Got"):
        per_class(labels_of([3, 3]), count, seed=0)


def test_per_class_names_the_classes_that_are_too_small():
    with pytest.raises(InputError, match=r"samples in each class\. Got 4, and class 1: 3\. Use at most 3"):
        per_class(labels_of([5, 3, 4]), 4, seed=0)
    with pytest.raises(InputError, match=r"class 0: 2, class 1: 0, .* and 3 more\. Use at most 0"):
        per_class(labels_of([2, 0, 1, 1, 1, 1, 1, 1]), 4, seed=0)


def test_per_class_refuses_the_targets_of_a_regression():
    with pytest.raises(InputError, match=r"`labels` of `per_class` must be class indices, one for .* Got the targets"):
        per_class(torch.zeros(4, 2), 1, seed=0)
    with pytest.raises(InputError, match=r"Got per-position labels\. Leave the number per class out"):
        per_class(torch.zeros(4, 2, 2, dtype=torch.int64), 1, seed=0)


@pytest.mark.parametrize("seed", range(40))
def test_held_out_rows_are_disjoint_complete_exact_and_stratified(seed):
    random = np.random.RandomState(seed)
    sizes = random.randint(1, 60, random.randint(2, 9))
    labels = labels_of(sizes, seed)
    amount = int(random.randint(1, len(labels) - len(sizes) + 1))
    train, validation = split_validation(labels, amount, seed)
    assert sorted(train.tolist() + validation.tolist()) == list(range(len(labels)))
    assert torch.equal(validation, validation.sort().values)
    assert torch.equal(train, train.sort().values)
    assert len(validation) == amount
    shares = torch.bincount(labels[validation], minlength=len(sizes)).numpy()
    assert (shares < sizes).all()
    quotas = amount * sizes / len(labels)
    if (np.ceil(quotas) < sizes).all():  # otherwise a class gave less, to keep a row
        assert (np.abs(shares - quotas) < 1).all()


def test_a_share_is_a_number_of_rows():
    labels = labels_of([30, 10])
    for a, b in zip(split_validation(labels, 0.25, 5), split_validation(labels, 10, 5), strict=True):
        assert torch.equal(a, b)
    assert len(split_validation(labels, 0.001, 5)[1]) == 1


def test_the_method_of_the_largest_remainder_by_hand():
    # 7 of (10, 10, 13): shares 2.12, 2.12, 2.76.
    labels = labels_of([10, 10, 13])
    assert torch.bincount(labels[split_validation(labels, 7, 0)[1]]).tolist() == [2, 2, 3]


def test_a_class_with_one_row_keeps_it():
    labels = labels_of([1, 1, 6])
    train, _ = split_validation(labels, 5, 0)
    assert torch.bincount(labels[train]).tolist() == [1, 1, 1]


def test_held_out_rows_are_a_function_of_the_seed():
    labels = labels_of([50, 50])
    splits = {tuple(split_validation(labels, 10, seed)[1].tolist()) for seed in range(50)}
    assert len(splits) == 50
    assert tuple(split_validation(labels, 10, 3)[1].tolist()) in splits


def test_regression_targets_are_split_at_random():
    train, validation = split_validation(torch.zeros(20, 3), 6, 1)
    assert (len(train), len(validation)) == (14, 6)


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (0, r"must be a number of rows \(an integer from 1\) or a share between 0 and 1\. Got 0"),
        (-2, "Got -2"),
        (0.0, "Got 0.0"),
        (1.0, "Got 1.0"),
        (float("nan"), "Got nan"),
        (True, "Got True"),
        (8, r"must be smaller than the number of rows, 8\. Got 8\. Hold out fewer"),
        (7, r"must leave a training row for each class\. Got 7 of 8 rows in 2 classes.*--validation 0"),
    ],
)
def test_impossible_amounts_are_refused(amount, message):
    with pytest.raises(InputError, match=message):
        split_validation(labels_of([4, 4]), amount, seed=0)
