"""The pictures of a surrogate: what they show is counted by its definition."""

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn

from jacmatch.jobs.surrogate.functions import open_function
from jacmatch.jobs.surrogate.points import query
from jacmatch.jobs.surrogate.report import Pictures

LOW, HIGH = torch.tensor([0.0, -1.0]).double(), torch.tensor([2.0, 3.0]).double()


def of(function, student):
    opened = open_function("mine", function, torch.stack([LOW, HIGH]), torch.ones(2))
    x = LOW + (HIGH - LOW) * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).double()
    test, before = query(opened, x, jacobians=False), opened.points
    return Pictures(student, test, torch.stack([LOW, HIGH]), opened), test, opened.points - before


def test_a_linear_student_of_a_product():
    student = nn.Linear(2, 2).double()
    with torch.no_grad():
        student.weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
    shown, test, calls = of(lambda x: torch.stack([x.prod(1), x[:, 0].exp()], 1), student)
    expected = r2_score(test.y.numpy(), student(test.x).detach().numpy(), multioutput="raw_values")
    np.testing.assert_allclose(shown.r2, expected)
    torch.testing.assert_close(shown.size, torch.tensor([[2.0, 8.0], [0.0, 12.0]]).double())
    torch.testing.assert_close(shown.signs, student.weight)
    assert [number for number, *_ in shown.slices] == [1, 0]
    assert calls == 2 * 2 * 5, "values and partials of five points of two slices are counted"
    _, x, y, (at, values, partials) = shown.slices[0]
    torch.testing.assert_close(y, (1.0 - 2 * x + student.bias[0]).detach())
    torch.testing.assert_close(values, at)  # x0 x1 in the middle of x0, which is 1
    torch.testing.assert_close(partials, torch.ones(5).double())
    assert [row[2] for row in shown.table().rows] == ["1", "1"]


def test_a_constant_output_and_a_function_that_is_not_defined_along_a_slice():
    def half(x):
        return torch.where((x[:, :1] == 1) & (x[:, 1:] > 1), torch.nan, torch.ones(len(x), 1).double())

    shown, *_ = of(half, nn.Linear(2, 1).double())
    assert shown.r2 == [None]
    assert any(known is None for *_, known in shown.slices)


def test_of_many_outputs_those_that_vary_most_are_shown():
    shown, *_ = of(lambda x: x[:, :1] * torch.arange(30), nn.Linear(2, 30).double())
    assert [row[0] for row in shown.table().rows] == [str(k) for k in range(29, 9, -1)]


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.ci
def test_a_picture_is_drawn():
    shown, *_ = of(lambda x: x.prod(1, keepdim=True), nn.Linear(2, 1).double())
    assert b"<svg" in shown.draw(small=True)
