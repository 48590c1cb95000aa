"""Identities between the losses, and exact expectations of the estimators that they are used with."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, interpolate

from jacmatch.losses import (
    attention_map,
    attention_transfer,
    direction_and_magnitude,
    hoffman,
    match_sizes,
    normalized_error,
    relative_error,
    squared_error,
    squared_norm,
)


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("eps", [1e-8, 0.5, 100.0])
def test_squared_error_is_direction_plus_magnitude(eps):
    student, teacher = rows(4, 3, 2, 5), rows(4, 3, 2, 5)
    student[0, 0], teacher[1], student[2, 1], teacher[2, 1] = 0, 0, 0, 0
    direction, magnitude = direction_and_magnitude(student, teacher, eps)
    assert direction.min() >= 0
    assert magnitude.min() >= 0
    torch.testing.assert_close(direction + magnitude, squared_error(student, teacher), rtol=1e-12, atol=1e-12)


def test_direction_and_magnitude_of_parallel_and_of_equally_long_rows():
    teacher = rows(4, 3, 6)
    direction, magnitude = direction_and_magnitude(2.5 * teacher, teacher)
    assert (direction / magnitude).max() < 1e-7
    turned = teacher.roll(1, dims=2)
    direction, magnitude = direction_and_magnitude(turned, teacher)
    assert (magnitude / direction).max() < 1e-20


def test_direction_keeps_its_digits_in_float32_near_the_teacher():
    teacher = torch.randn(50, 1, 300)
    student = teacher + 1e-4 * torch.randn(50, 1, 300)
    direction, _ = direction_and_magnitude(student, teacher)
    exact, _ = direction_and_magnitude(student.double(), teacher.double())
    torch.testing.assert_close(direction.double(), exact, rtol=2e-2, atol=0)


def test_normalized_error_is_twice_one_minus_cosine():
    student, teacher = rows(4, 3, 2, 5), rows(4, 3, 2, 5)
    cosines = cosine_similarity(student.flatten(2), teacher.flatten(2), dim=2)
    expected = (2 * (1 - cosines)).mean(1)
    torch.testing.assert_close(normalized_error(student, teacher, eps=1e-20), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(normalized_error(student, teacher), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(normalized_error(-teacher, teacher), torch.full((4,), 4.0).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 1e-4])
def test_gradient_of_the_normalized_error_is_bounded_by_eps(eps):
    teacher = rows(100, 1, 7)
    student = (rows(100, 1, 7) * torch.logspace(-12, 3, 100).double().reshape(100, 1, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(normalized_error(student, teacher, eps).sum(), student)
    assert gradient.norm(dim=2).max() <= 2 / math.sqrt(eps)


def test_relative_error_of_a_flat_student_is_one():
    teacher = rows(4, 3, 6)
    torch.testing.assert_close(
        relative_error(torch.zeros_like(teacher), teacher), torch.ones(4).double(), rtol=1e-5, atol=0
    )


def signs(outputs):
    return torch.tensor(list(itertools.product((1.0, -1.0), repeat=outputs)), dtype=torch.float64)


def circle(count):
    """Directions whose mean is exact for quadratic forms in the plane."""
    angles = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def orthogonal(outputs):
    return torch.linalg.qr(rows(outputs, outputs)).Q


@pytest.mark.parametrize(
    ("law", "outputs"),
    [
        (lambda: signs(5) / math.sqrt(5), 5),
        (lambda: torch.eye(5, dtype=torch.float64), 5),
        (lambda: orthogonal(5), 5),
        (lambda: circle(7), 2),
    ],
    ids=["all signs", "basis", "orthogonal", "circle"],
)
def test_hoffman_over_unit_directions_is_half_the_squared_norm(law, outputs):
    jacobian, directions = rows(3, outputs, 2, 4), law()
    assert directions.norm(dim=1) == pytest.approx(1)
    projections = torch.einsum("pk,bkij->bpij", directions, jacobian)
    expected = 0.5 * jacobian.square().sum((1, 2, 3))
    torch.testing.assert_close(hoffman(projections, outputs), expected, rtol=1e-12, atol=0)
    # The same directions with norm √K, as everywhere else in the library.
    isotropic = squared_norm(math.sqrt(outputs) * projections) / (2 * len(directions))
    torch.testing.assert_close(isotropic, expected, rtol=1e-12, atol=0)


def test_squared_error_of_products_is_unbiased_from_either_side():
    student, teacher = rows(3, 4, 5), rows(3, 4, 5)
    exact = squared_error(student, teacher)
    left, right = signs(4), signs(5)
    from_outputs = squared_error(torch.einsum("pk,bki->bpi", left, student), torch.einsum("pk,bki->bpi", left, teacher))
    from_inputs = squared_error(
        torch.einsum("pi,bki->bpk", right, student), torch.einsum("pi,bki->bpk", right, teacher)
    )
    torch.testing.assert_close(from_outputs / len(left), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(from_inputs / len(right), exact, rtol=1e-12, atol=0)


def test_match_sizes_pools_the_larger_and_keeps_the_order():
    student, teacher = rows(2, 8, 8), rows(2, 4, 4)
    blocks = student.reshape(2, 4, 2, 4, 2).mean((2, 4))
    first, second = match_sizes(student, teacher)
    torch.testing.assert_close(first, blocks, rtol=1e-12, atol=1e-12)
    assert second is teacher
    first, second = match_sizes(teacher, student)
    assert first is teacher
    torch.testing.assert_close(second, blocks, rtol=1e-12, atol=1e-12)
    first, second = match_sizes(rows(2, 8, 3), rows(2, 4, 6))
    assert first.shape == second.shape == (2, 4, 3)


def test_attention_transfer_between_unlike_networks():
    teacher = rows(2, 7, 4, 4)
    # A student with other channels and twice the resolution, which looks where the teacher looks.
    student = interpolate(teacher.square().sum(1, keepdim=True).sqrt(), scale_factor=2, mode="nearest")
    student = (student.repeat(1, 3, 1, 1) * 40).requires_grad_()
    student_map, teacher_map = attention_map(student), attention_map(teacher)
    matched = match_sizes(student_map, teacher_map)
    assert attention_transfer(*matched, eps=1e-20).abs().max() < 1e-12
    other = match_sizes(attention_map(student.flip(3)), teacher_map)
    (gradient,) = torch.autograd.grad(attention_transfer(*other).sum(), student)
    assert attention_transfer(*other).min() > 1e-3
    assert gradient.abs().max() > 0


def test_pooling_a_map_and_its_jacobian_commute():
    x, other = rows(1, 3, 4, 4).requires_grad_(), rows(1, 2, 2)
    attention = attention_map(x.sin())
    pooled, _ = match_sizes(attention, other)
    (of_pooled,) = torch.autograd.grad(pooled[0, 0, 1], x, retain_graph=True)
    window = [torch.autograd.grad(attention[0, i, j], x, retain_graph=True)[0] for i in (0, 1) for j in (2, 3)]
    torch.testing.assert_close(of_pooled, torch.stack(window).mean(0), rtol=1e-12, atol=1e-12)


def test_second_derivative_of_the_square_map_at_zero():
    features = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention_map(features).sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), features)
    assert second == pytest.approx(2 * torch.ones(1, 2, 2, 2))
