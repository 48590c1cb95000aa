"""A function with its own Jacobian as teacher, besides the contract."""

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.teachers import (
    AnalyticTeacher,
    Question,
)

from .cases import BATCH, OUTPUTS, SHAPE, directions, inputs, jacobian_of_batch, of_batch


@pytest.mark.parametrize(
    ("jacobian", "got"),
    [
        (lambda x: torch.zeros(BATCH, *SHAPE, OUTPUTS), r"shape \(3, 2, 3, 4\)"),
        (lambda x: torch.zeros(BATCH, OUTPUTS, 6), r"shape \(3, 4, 6\)"),
        (lambda x: torch.zeros(1, OUTPUTS, *SHAPE), r"shape \(1, 4, 2, 3\)"),
        (lambda x: [0.0], "list"),
    ],
)
@pytest.mark.parametrize("shapes", [{"tangents": (1, BATCH, *SHAPE)}, {"cotangents": (1, BATCH, OUTPUTS)}])
def test_a_jacobian_of_another_shape_is_refused(jacobian, got, shapes):
    teacher = AnalyticTeacher(of_batch(1), jacobian)
    question = Question(**{name: directions(*shape) for name, shape in shapes.items()})
    match = (
        r"`jacobian` of `AnalyticTeacher` must return the shape \(3, 4, 2, 3\)\. "
        rf"Got {got}\. The order is batch, outputs, input\."
    )
    with pytest.raises(InputError, match=match):
        teacher.answer(inputs(), question)
    teacher.answer(inputs())  # outputs need no Jacobian


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"`function` of `AnalyticTeacher` must return outputs \(3, K\).*shape \(3,\)"):
        AnalyticTeacher(lambda x: x.flatten(1).sum(1), jacobian_of_batch(1)).answer(inputs())


def test_what_is_not_callable_is_refused(as_users_run):
    with pytest.raises(InputError, match=r"`function` of `AnalyticTeacher` must be callable\. Got int"):
        AnalyticTeacher(1, jacobian_of_batch(1))
    with pytest.raises(InputError, match=r"`jacobian` of `AnalyticTeacher` must be callable\. Got NoneType"):
        AnalyticTeacher(of_batch(1), None)


def test_a_linear_controller_has_a_constant_jacobian():
    """u = −K x: the answer is −K v at any x."""
    gain = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]], dtype=torch.float64)
    teacher = AnalyticTeacher(lambda x: -x @ gain.T, lambda x: -gain.expand(len(x), 2, 3))
    x, v = directions(4, 3), directions(1, 4, 3)
    torch.testing.assert_close(teacher.answer(x, Question(tangents=v)).products, -v @ gain.T)
