"""Any function as teacher, besides the contract."""

import numpy as np
import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.teachers import (
    BlackBoxTeacher,
    Question,
)

from .cases import BATCH, SHAPE, analytic, black_box, directions, inputs, of_batch


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_it_is_queried_in_batches(size):
    sizes = []

    def function(x):
        sizes.append(len(x))
        return of_batch(1)(x)

    teacher = BlackBoxTeacher(function, batch_size=size)
    teacher.answer(inputs(), Question(tangents=directions(2, BATCH, *SHAPE)))
    assert max(sizes) <= size
    assert sum(sizes) == BATCH * 5  # at x, and one pair for each of two directions


def test_the_error_of_a_step_is_of_second_order():
    x, v = inputs(), directions(1, BATCH, *SHAPE)
    truth = analytic(1).answer(x, Question(tangents=v)).products
    errors = [
        float((black_box(1).answer(x, Question(tangents=v, step=h)).products - truth).norm())
        for h in (0.02, 0.01, 0.005)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
def test_the_default_step_is_as_good_as_the_type_allows(dtype, tolerance):
    x, v = inputs(), directions(1, BATCH, *SHAPE)
    truth = analytic(1).answer(x, Question(tangents=v)).products
    teacher = BlackBoxTeacher(lambda z: of_batch(1)(z.double()).to(dtype))
    products = teacher.answer(x.to(dtype), Question(tangents=v.to(dtype))).products
    assert float((products - truth).norm() / truth.norm()) < tolerance


def test_it_may_write_into_its_argument():
    for arrays, square in (("torch", lambda x: x.mul_(x)), ("numpy", lambda x: np.multiply(x, x, out=x))):
        x = torch.tensor([[1.0, 2.0]])
        answer = BlackBoxTeacher(square, arrays=arrays).answer(x)
        assert answer.outputs.tolist() == [[1.0, 4.0]]
        assert x.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "awkward",
    [
        lambda x: np.broadcast_to(x.sum(1, keepdims=True), (len(x), 2)),  # read-only
        lambda x: x[:, ::-1],  # steps backwards
        lambda x: x.astype(np.float16),
        lambda x: np.rint(x).astype(np.uint8),
        lambda x: x > 0,
        lambda x: x.tolist(),
    ],
)
def test_any_array_of_numbers_will_do(awkward):
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    outputs = BlackBoxTeacher(awkward, arrays="numpy").answer(x).outputs
    assert outputs.dtype == torch.float32
    assert outputs.tolist() == np.asarray(awkward(x.numpy()), dtype=np.float64).tolist()


@pytest.mark.parametrize(
    ("function", "arrays", "got"),
    [
        (lambda x: x.sum((1, 2)), "torch", r"shape \(3,\)"),
        (lambda x: x[:2], "torch", r"shape \(2, 2, 3\)"),
        (lambda x: x.flatten(1)[:2], "torch", r"shape \(2, 6\)"),
        (lambda x: x.flatten(1).numpy(), "torch", "ndarray"),
        (lambda x: None, "numpy", "ndarray"),
        (lambda x: np.array([["cat"]] * 3), "numpy", "ndarray"),
        (lambda x: x.sum(), "numpy", r"shape \(\)"),
    ],
)
def test_answers_of_another_shape_are_refused(function, arrays, got):
    match = (
        rf"`function` of `BlackBoxTeacher` must return outputs \(3, K\) for 3 samples\. Got {got}\. Add an output axis"
    )
    with pytest.raises(InputError, match=match):
        BlackBoxTeacher(function, arrays=arrays).answer(inputs())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"function": 3}, r"`function` of `BlackBoxTeacher` must be callable\. Got int"),
        ({"function": abs, "batch_size": 0}, r"`batch_size` of `BlackBoxTeacher` must be at least 1\. Got 0"),
        (
            {"function": abs, "arrays": "jax"},
            r"`arrays` of `BlackBoxTeacher` must be 'torch' or 'numpy'\. Got 'jax'",
        ),
    ],
)
def test_settings_that_are_refused(as_users_run, settings, match):
    with pytest.raises(InputError, match=match):
        BlackBoxTeacher(**settings)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_the_step_fits_the_precision_of_the_results(dtype):
    """A function of float64 that computes in less: the step of float64 would give the rounding of its results."""
    x, v = torch.rand(5, 3, dtype=torch.float64), torch.ones(1, 5, 3, dtype=torch.float64)
    teacher = BlackBoxTeacher(lambda z: np.sin(z).astype(dtype), arrays="numpy")
    products = teacher.answer(x, Question(tangents=v)).products[0]
    assert float((products - x.cos()).abs().max()) < {"f4": 1e-3, "f2": 3e-2}[dtype]


def test_classes_have_no_differences():
    x, classes = torch.rand(5, 3), BlackBoxTeacher(lambda z: (z > 0.5).astype(int), arrays="numpy")
    assert classes.answer(x).outputs.shape == (5, 3)
    with pytest.raises(
        InputError, match=r"floating-point values for finite differences. Got torch.int64. Return scores"
    ):
        classes.answer(x, Question(tangents=torch.ones(1, 5, 3)))


def test_arrays_of_another_byte_order_and_ragged_rows():
    x = torch.rand(2, 3)
    teacher = BlackBoxTeacher(lambda z: np.sin(z).astype(">f4"), arrays="numpy")
    torch.testing.assert_close(teacher.answer(x).outputs, x.sin())
    with pytest.raises(InputError, match=r"must return outputs \(2, K\) for 2 samples. Got ndarray"):
        BlackBoxTeacher(lambda z: [[1.0], [1.0, 2.0]], arrays="numpy").answer(x)
