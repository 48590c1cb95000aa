"""Data sets and batches, whatever the arrays: a `Data` that holds what was given, or an error that says why not."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jacmatch.datasets import Split
from jacmatch.datasets.arrays import from_arrays, load_npz
from jacmatch.errors import InputError
from jacmatch.training.data import Batches

from .tensors import seeds

anything = arrays.arrays(
    st.one_of(
        arrays.floating_dtypes(endianness="?"),
        arrays.integer_dtypes(endianness="?"),
        arrays.unsigned_integer_dtypes(endianness="?"),
        arrays.boolean_dtypes(),
        arrays.complex_number_dtypes(),
        arrays.byte_string_dtypes(max_len=3),
        arrays.datetime64_dtypes(),
    ),
    arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)
"""Any array."""


@st.composite
def whole(draw):
    """The arrays of a data set that is right, of any type that is taken."""
    train, test, classes = draw(st.integers(4, 9)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    shape = draw(st.sampled_from([(3,), (1, 2, 2), (3, 2, 4)]))
    kind = draw(st.sampled_from(["<f4", ">f4", "<f8", "<f2", "|u1"]))
    random = np.random.default_rng(draw(seeds))
    x, x_test = (np.round(random.random((n, *shape)) * (255 if kind == "|u1" else 1), 3) for n in (train, test))
    if draw(st.booleans()):
        y, y_test = random.permutation(np.arange(train) % classes), np.arange(test) % classes
        number = draw(st.sampled_from(["<i8", ">i4", "|u1", "|i1"]))
        y, y_test = y.astype(number), y_test.astype(number)
    else:
        y, y_test = (random.standard_normal((n, classes)).astype("f4") for n in (train, test))
    arrays = {"x_train": x.astype(kind), "y_train": y, "x_test": x_test.astype(kind), "y_test": y_test}
    return {name: draw(st.sampled_from([array, np.asfortranarray(array)])) for name, array in arrays.items()}


def taken_or_refused(given_arrays):
    """The data set, or None if it was refused in one line that names it."""
    try:
        return from_arrays("mine", given_arrays)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert "mine" in message
    return None


@given(st.fixed_dictionaries(dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), anything)))
@pytest.mark.ci
def test_any_arrays_are_taken_or_refused(given_arrays):
    data = taken_or_refused(given_arrays)
    assert data is None or len(data.train) == len(given_arrays["x_train"])


@given(whole(), st.sampled_from(["x_train", "y_train", "x_test", "y_test"]), anything)
def test_one_wrong_array_is_taken_or_refused(right, name, other):
    taken_or_refused({**right, name: other})


@given(whole(), st.randoms(use_true_random=False))
def test_stored_data_are_those_that_were_given(right, random):
    data = from_arrays("mine", right)
    scale = 255 if right["x_train"].dtype == np.uint8 else 1
    stored = data.train.inputs().double().numpy()
    np.testing.assert_allclose(stored, right["x_train"].astype(np.float64) / scale, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(data.train.y.numpy(), right["y_train"])
    order = list(range(len(data.train)))
    random.shuffle(order)
    again = from_arrays("mine", {**right, "x_train": right["x_train"][order], "y_train": right["y_train"][order]})
    assert torch.equal(again.train.x, data.train.x[order])
    assert (again.outputs, again.classes, again.shape) == (data.outputs, data.classes, data.shape)
    np.testing.assert_allclose(again.mean, data.mean, rtol=1e-5, atol=1e-6)


@given(whole(), st.booleans())
def test_an_archive_is_its_arrays(tmp_path_factory, right, packed):
    file = tmp_path_factory.getbasetemp() / "properties.npz"
    content = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(content, **right)
    file.write_bytes(content.getvalue())
    read, direct = load_npz(str(file), 0), from_arrays("mine", right)
    for one, other in ((read.train, direct.train), (read.test, direct.test)):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)
    assert (read.mean, read.std) == (direct.mean, direct.std)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 3), st.integers(0, 30), st.booleans(), seeds)
def test_a_batch_is_a_function_of_its_number(samples, size, views, number, partners, seed):
    split = Split(torch.arange(samples * 2.0).reshape(samples, 2), torch.arange(samples) % 2)
    partners &= samples > 1
    settings = {"seed": seed, "views": views, "partners": partners}
    batches, others = Batches(split, size, **settings), Batches(split, size, **settings)
    inside = samples // min(size, samples)
    epoch = number // inside
    seen = torch.cat([batches(epoch * inside + position).ids for position in range(inside)])
    assert len(seen.unique()) == len(seen) == inside * min(size, samples)
    batch = others(number)  # without those before
    assert torch.equal(batch.ids, seen[(number % inside) * batches.size :][: batches.size])
    assert torch.equal(batch.x, split.x[batch.ids])
    assert torch.equal(batch.y, split.y[batch.ids])
    for row in batch.ids.tolist():
        alone = batches.of(torch.tensor([row]), batch.view)
        position = batch.ids.tolist().index(row)
        assert torch.equal(alone.x[0], batch.x[position])
        if partners:
            assert torch.equal(alone.partners[0], batch.partners[position])
            assert not torch.equal(alone.partners[0], alone.x[0])
