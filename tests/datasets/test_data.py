"""The records: conversion, choice of rows, statistics, fingerprint."""

import math
from dataclasses import replace

import numpy as np
import torch

from jacmatch.datasets import Split, from_arrays
from jacmatch.datasets.data import statistics


def slow_statistics(x):
    """Mean and deviation of each channel or feature, one number at a time, from the definition."""
    pairs = []
    for channel in range(x.shape[1]):
        numbers = [float(v) for sample in x for v in sample[channel].reshape(-1).tolist()]
        mean = math.fsum(numbers) / len(numbers)
        pairs.append((mean, math.sqrt(math.fsum((v - mean) ** 2 for v in numbers) / len(numbers))))
    return pairs


def assert_statistics(split, reference):
    mean, std = statistics(split)
    np.testing.assert_allclose(mean, [m for m, _ in reference], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(std, [s for _, s in reference], rtol=1e-12)


def test_bytes_become_floats_in_the_unit_interval(images):
    split = from_arrays("mine", images).train
    rows = torch.tensor([3, 0, 3])
    expected = images["x_train"][[3, 0, 3]].astype(np.float64) / 255
    assert split.inputs(rows).dtype == torch.float32
    np.testing.assert_allclose(split.inputs(rows).numpy(), expected, rtol=1e-7)
    np.testing.assert_array_equal(split.inputs()[rows].numpy(), split.inputs(rows).numpy())


def test_inputs_are_never_the_stored_floats(vectors):
    split = from_arrays("mine", vectors).train
    original = split.x.clone()
    split.inputs().zero_()
    split.inputs(torch.arange(9)).zero_()
    assert torch.equal(split.x, original)


def test_subset_takes_rows_in_order_with_everything_that_belongs_to_them(vectors):
    split = from_arrays("mine", vectors).train
    part = split.subset(torch.tensor([7, 2]))
    assert len(part) == 2
    for got, whole in ((part.x, split.x), (part.y, split.y), (part.jacobians, split.jacobians)):
        assert torch.equal(got, whole[[7, 2]])


def test_to_moves_every_tensor(vectors):
    moved = from_arrays("mine", vectors).train.to("meta")
    assert {moved.x.device.type, moved.y.device.type, moved.jacobians.device.type} == {"meta"}


def test_statistics_of_bytes_floats_and_vectors_follow_the_definition():
    random = np.random.RandomState(3)
    pixels = torch.from_numpy(random.randint(0, 256, (7, 3, 4, 2)).astype(np.uint8))
    labels = torch.arange(7)
    assert_statistics(Split(pixels, labels), slow_statistics(pixels.double() / 255))
    floats = torch.from_numpy(random.randn(7, 3, 4, 2).astype(np.float32) * 5 + 2)
    assert_statistics(Split(floats, labels), slow_statistics(floats))
    flat = torch.from_numpy(random.randint(0, 256, (7, 5)).astype(np.uint8))
    assert_statistics(Split(flat, labels), slow_statistics(flat.float() / 255))


def test_statistics_do_not_depend_on_the_size_of_the_blocks():
    x = torch.from_numpy(np.random.RandomState(4).randn(9001, 2).astype(np.float32))
    np.testing.assert_allclose(
        statistics(Split(x, torch.zeros(9001, dtype=torch.int64)))[0], x.double().mean(0), rtol=1e-9
    )


def test_a_constant_input_has_deviation_one():
    for value, rows in ((0.1, 5), (0.1, 20001), (1e6 / 3, 20001), (-7e-9, 20001)):
        assert statistics(Split(torch.full((rows, 2, 3, 3), value), torch.arange(rows)))[1] == (1.0, 1.0)
    assert statistics(Split(torch.full((5, 1, 3, 3), 7, dtype=torch.uint8), torch.arange(5)))[1] == (1.0,)


def test_fingerprint_is_a_function_of_the_arrays(images, vectors):
    first, again = from_arrays("one", images), from_arrays("two", {key: a.copy() for key, a in images.items()})
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 64
    assert first.fingerprint != from_arrays("one", vectors).fingerprint


def test_fingerprint_sees_order_type_shape_labels_and_jacobians(images, vectors):
    data, regression = from_arrays("mine", images), from_arrays("mine", vectors)
    variants = [
        replace(data, train=data.train.subset(torch.arange(11, -1, -1))),
        replace(data, train=data.train.subset(torch.arange(11))),
        replace(data, train=data.test, test=data.train),
        from_arrays("mine", images | {"y_train": np.roll(images["y_train"], 1)}),
        from_arrays("mine", {key: a.reshape(len(a), 1, 5, 6) if a.ndim > 1 else a for key, a in images.items()}),
        from_arrays("mine", {key: a / 255 if a.ndim > 1 else a for key, a in images.items()}),
        regression,
        from_arrays("mine", {key: a for key, a in vectors.items() if key != "j_train"}),
        from_arrays("mine", vectors | {"j_train": vectors["j_train"] * 2}),
    ]
    assert len({data.fingerprint, *(variant.fingerprint for variant in variants)}) == 1 + len(variants)
