"""The checks that every loader goes through."""

import numpy as np
import pytest
import torch

from jacmatch.datasets import Data, from_arrays
from jacmatch.errors import InputError


def test_images_stay_bytes_and_count_their_classes(images):
    data = from_arrays("mine", images)
    assert isinstance(data, Data)
    assert data.train.x.dtype == data.test.x.dtype == torch.uint8
    assert data.train.y.dtype == torch.int64
    assert (data.name, data.classes, data.outputs, data.shape) == ("mine", 3, 3, (1, 6, 5))
    assert data.train.jacobians is None
    np.testing.assert_array_equal(data.train.x.numpy(), images["x_train"])


def test_regression_becomes_float32_with_its_jacobians(vectors):
    data = from_arrays("mine", vectors)
    assert (data.classes, data.outputs, data.shape) == (None, 2, (4,))
    assert data.train.x.dtype == data.train.y.dtype == data.train.jacobians.dtype == torch.float32
    assert data.test.jacobians is None
    np.testing.assert_array_equal(data.train.jacobians.numpy(), vectors["j_train"].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_every_float_type_is_read(vectors, dtype):
    values = np.round(vectors["x_train"], 1).astype(dtype)
    data = from_arrays("mine", vectors | {"x_train": values})
    np.testing.assert_array_equal(data.train.x.numpy(), values.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, ">i4"])
def test_every_integer_type_of_labels_is_read(images, dtype):
    assert from_arrays("mine", images | {"y_train": images["y_train"].astype(dtype)}).classes == 3


def test_torch_tensors_and_read_only_views_are_read(images):
    images["x_train"].flags.writeable = False
    tensors = images | {"y_train": torch.from_numpy(images["y_train"]), "x_test": torch.from_numpy(images["x_test"])}
    assert from_arrays("mine", tensors).fingerprint == from_arrays("mine", images).fingerprint
    strided = images | {"x_train": np.ascontiguousarray(images["x_train"][:, :, ::-1])[:, :, ::-1]}
    assert from_arrays("mine", strided).fingerprint == from_arrays("mine", images).fingerprint


def test_half_precision_tensors_are_read(vectors):
    x = torch.from_numpy(vectors["x_train"]).bfloat16()
    assert torch.equal(from_arrays("mine", vectors | {"x_train": x}).train.x, x.float())


def test_jacobians_of_the_test_part_are_read(vectors):
    assert from_arrays("mine", vectors | {"j_test": vectors["j_train"][:5]}).test.jacobians.shape == (5, 2, 4)


def test_float_images_outside_bytes_are_left_alone(images):
    shifted = {key: images[key] / 255 * 2 - 1 for key in ("x_train", "x_test")}
    assert float(from_arrays("mine", images | shifted).train.x.min()) < 0


def test_float_images_that_are_not_divided_by_255_are_a_warning(images):
    resized = {key: images[key] * (254.5 / images[key].max()) for key in ("x_train", "x_test")}
    with pytest.warns(UserWarning, match="float images") as given:
        assert float(from_arrays("mine", images | resized).train.x.max()) == 254.5
    for part, warning in zip(("train", "test"), given, strict=True):
        text = f"`x_{part}` of mine: float images must have pixels in [0, 1]. Got up to 254.5"
        assert str(warning.message).startswith(text)


def spoiled(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


IMAGE_CASES = {
    "integer inputs": (
        lambda a: {"x_train": a["x_train"].astype(np.int32)},
        r"`x_train` of mine must have the type uint8 or a float type\. Got int32\. Convert images 0–255",
    ),
    "boolean inputs": (lambda a: {"x_test": a["x_test"] > 9}, r"`x_test` of mine must have the type uint8.*Got bool"),
    "complex inputs": (lambda a: {"x_test": a["x_test"] * 1j}, "must have the type uint8 .*Got complex128"),
    "text inputs": (lambda a: {"x_test": a["x_test"].astype(str)}, r"must have the type uint8.*Got <U3"),
    "a list": (lambda a: {"x_train": a["x_train"].tolist()}, r"must be a numpy array or a torch tensor\. Got list"),
    "a masked array": (
        lambda a: {"x_train": np.ma.masked_equal(a["x_train"], 3)},
        "must be a numpy array or a torch tensor. Got MaskedArray",
    ),
    "no samples": (lambda a: {"x_train": a["x_train"][:0]}, r"`x_train` of mine must not be empty\. Got shape \(0, 1"),
    "no channel": (lambda a: {"x_train": a["x_train"][:, 0]}, r"Got shape \(12, 6, 5\)\. Give gray images a channel"),
    "one axis": (lambda a: {"x_train": a["x_train"].ravel()}, r"must be images \(N, C, H, W\) or vectors \(N, D\)"),
    "channels last": (
        lambda a: {"x_train": np.zeros((12, 6, 5, 3), np.uint8)},
        r"\(12, 6, 5, 3\), which looks like \(N, H, W, C\)\. Put the channels first: x\.transpose\(0, 3, 1, 2\)",
    ),
    "bytes as floats": (
        lambda a: {"x_train": a["x_train"].astype(np.float32)},
        r"float images must have pixels in \[0, 1\]\. Got integers up to 255\. Convert with \.astype\(np\.uint8\)",
    ),
    "NaN pixel": (
        lambda a: {"x_train": spoiled(a["x_train"] / 255, (4, 0, 1, 1), np.nan)},
        r"`x_train` of mine must be finite in float32\. Got NaN or infinity in 1 of 12 rows, first in row 4",
    ),
    "infinite pixel": (
        lambda a: {"x_test": spoiled(a["x_test"] / 255, (slice(2, 4), 0, 1, 1), np.inf)},
        "in 2 of 6 rows, first in row 2",
    ),
    "overflow": (lambda a: {"x_test": spoiled(a["x_test"] / 255, (0, 0, 0, 0), 1e39)}, "must be finite in float32"),
    "types differ": (
        lambda a: {"x_test": a["x_test"] / 255},
        r"`x_train` and `x_test` of mine must have the same type and shape per row\. Got uint8 \(1, 6, 5\) and float32",
    ),
    "shapes differ": (lambda a: {"x_test": a["x_test"][:, :, :5]}, r"Got uint8 \(1, 6, 5\) and uint8 \(1, 5, 5\)"),
    "lengths differ": (
        lambda a: {"y_train": a["y_train"][:-1]},
        r"`x_train` and `y_train` of mine must have equal lengths\. Got 12 inputs and 11 labels",
    ),
    "labels as floats": (
        lambda a: {"y_train": a["y_train"].astype(float)},
        r"`y_train` of mine must be integer class indices.*Got float64 of shape \(12,\)\. Convert class indices with",
    ),
    "one-hot labels": (lambda a: {"y_train": np.eye(3, dtype=int)[a["y_train"]]}, r"one-hot rows with y\.argmax"),
    "labels in a column": (lambda a: {"y_train": a["y_train"][:, None]}, r"Use y\[:, 0\]"),
    "boolean labels": (lambda a: {"y_train": a["y_train"] > 0}, r"Got bool.*Convert with \.astype\(np\.int64\)"),
    "labels as text": (lambda a: {"y_train": a["y_train"].astype(str)}, r"Got <U21 .*np\.unique\(y, return_inverse"),
    "numbers of three axes": (lambda a: {"y_test": a["x_test"][:, 0] / 255}, "must be integer class indices"),
    "per-position labels in one part": (lambda a: {"y_test": a["x_test"][:, 0]}, "shape per row"),
    "negative label": (
        lambda a: {"y_train": a["y_train"] - 1},
        r"`y_train` of mine: class indices must count from 0\. Got -1 … 1",
    ),
    "labels from one": (
        lambda a: {"y_train": a["y_train"] + 1},
        r"must be 0 … K−1 and each must occur\. Got 3 distinct numbers from 1 to 3\. Renumber with np\.unique",
    ),
    "huge label": (
        lambda a: {"y_train": spoiled(a["y_train"], 0, 10**12)},
        "Got 4 distinct numbers from 0 to 1000000000000",
    ),
    "one class": (lambda a: {"y_train": a["y_train"] * 0}, r"must have at least two classes\. Got 1"),
    "test label out of range": (
        lambda a: {"y_test": a["y_test"] + 1},
        r"`y_test` of mine: class indices must be in the range of the training set, 0 … 2\. Got 3",
    ),
    "targets in one part only": (
        lambda a: {"y_test": np.zeros((6, 3))},
        r"`y_train` and `y_test` of mine must have the same type and shape per row\. Got int64 \(\) and float32 \(3,\)",
    ),
}

VECTOR_CASES = {
    "NaN target": (lambda a: {"y_test": spoiled(a["y_test"], (0, 1), np.nan)}, "`y_test` of mine must be finite"),
    "number of targets differs": (lambda a: {"y_test": a["y_test"][:, :1]}, r"float32 \(2,\) and float32 \(1,\)"),
    "Jacobians transposed": (
        lambda a: {"j_train": a["j_train"].transpose(0, 2, 1)},
        r"`j_train` of mine must have the shape \(N, K, \*input\) = \(9, 2, 4\)\. Got \(9, 4, 2\)",
    ),
    "Jacobians of other rows": (lambda a: {"j_train": a["j_train"][1:]}, r"= \(9, 2, 4\)\. Got \(8, 2, 4\)"),
    "Jacobians flat": (lambda a: {"j_train": a["j_train"].ravel()}, r"= \(9, 2, 4\)\. Got \(72,\)"),
    "Jacobians of integers": (
        lambda a: {"j_train": a["j_train"].astype(int)},
        r"`j_train` of mine must have a float type\. Got int64",
    ),
    "infinite Jacobian": (
        lambda a: {"j_train": spoiled(a["j_train"], (8, 0, 0), np.inf)},
        "Got infinity in 1 of 9 rows, first in row 8",
    ),
    "Jacobian of which nothing is known": (
        lambda a: {"j_train": np.full_like(a["j_train"], np.nan)},
        r"`j_train` of mine must have a known entry\. Got NaN alone\. Leave the array out",
    ),
    "misspelt key": (
        lambda a: {"jtrain": a["j_train"]},
        r"Each array of mine must be a known name\. Got 'jtrain'\. Nearest: j_train",
    ),
}


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_bad_images_and_labels_are_refused(images, case):
    change, message = IMAGE_CASES[case]
    with pytest.raises(InputError, match=message):
        from_arrays("mine", images | change(images))


@pytest.mark.parametrize("case", VECTOR_CASES)
def test_bad_regressions_are_refused(vectors, case):
    change, message = VECTOR_CASES[case]
    with pytest.raises(InputError, match=message):
        from_arrays("mine", vectors | change(vectors))


def test_a_missing_array_is_named(images):
    del images["y_test"], images["x_test"]
    with pytest.raises(
        InputError, match=r"must have the arrays x_train.*Got x_train, y_train \(missing: x_test, y_test\)"
    ):
        from_arrays("mine", images)


# lululxvi/deepxde #780: a gauge measures one derivative
def test_entries_of_a_jacobian_may_be_unknown(vectors):
    j = spoiled(vectors["j_train"], (8, 0, 0), np.nan)
    jacobians = from_arrays("mine", vectors | {"j_train": j}).train.jacobians
    np.testing.assert_array_equal(jacobians.numpy(), j.astype(np.float32))


def test_one_hot_rows_of_floats_are_classes_with_a_warning(images):
    rows = {key: np.eye(3, dtype=np.float32)[images[key]] for key in ("y_train", "y_test")}
    expected = from_arrays("mine", images)
    with pytest.warns(UserWarning, match=r"`y_train` of mine has one-hot rows of floats: they are read as classes"):
        data = from_arrays("mine", images | rows)
    assert (data.classes, data.fingerprint) == (expected.classes, expected.fingerprint)
    with pytest.raises(InputError, match=r"`y_test` of mine must have one-hot rows, as `y_train` has"):
        from_arrays("mine", images | rows | {"y_test": rows["y_test"] + 0.5})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            lambda y: np.eye(3)[y] * 0.9 + 0.1 / 3,
            "has rows that sum to 1: they are read as regression targets; give y.argmax",
        ),
        (lambda y: y[:, None].astype(float), r"has integers: they are read as regression targets; give y\[:, 0\]"),
    ],
)
def test_targets_that_may_be_classes_are_numbers_with_a_warning(images, targets, message):
    with pytest.warns(UserWarning, match=message):
        data = from_arrays("mine", images | {key: targets(images[key]) for key in ("y_train", "y_test")})
    assert data.classes is None
