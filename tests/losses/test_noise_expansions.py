"""Which noise form equals the Jacobian term to which order: means by quadrature against exact derivatives."""

import pytest
import torch

from jacmatch.losses import (
    antithetic,
    centered_variance,
    noise_distillation,
    paper_label_squared,
    squared_error,
)

from .smooth import NODES, SIGMAS, WEIGHTS, derivatives, difference, mean_over_noise, network, orders, quadrature

SEEDS = (1, 2, 3)


@pytest.fixture(params=SEEDS)
def pair(request):
    """Student, teacher, and a point."""
    generator = torch.Generator().manual_seed(request.param)
    return network(request.param), network(request.param + 100), torch.randn(2, generator=generator).double()


def jacobian_term(student, teacher, x):
    s, t = derivatives(student, x), derivatives(teacher, x)
    return squared_error(s.rows[None], t.rows[None]).item()


def output_term(student, teacher, x):
    return squared_error(student(x)[None], teacher(x)[None]).item()


def plain(student, teacher, x, sigma):
    """E of the loss with one draw: each node of the quadrature is a sample of the batch."""
    return mean_over_noise(lambda y: noise_distillation(student(y)[None], teacher(y)[None]), x, sigma)


def pairs_of_signs(student, teacher, x, sigma):
    plus, minus = x + sigma * NODES, x - sigma * NODES
    values = antithetic(student(plus)[None], teacher(plus)[None], student(minus)[None], teacher(minus)[None])
    return float(WEIGHTS @ values)


def variance(student, teacher, x, sigma):
    """E of the loss with two draws, over all pairs of nodes: it is unbiased for any number of draws."""
    nodes, weights = quadrature(18)
    points = x + sigma * nodes
    n = len(points)
    first, second = (i.flatten() for i in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    s, t = student(points), teacher(points)
    values = centered_variance(torch.stack([s[first], s[second]]), torch.stack([t[first], t[second]]))
    return float((weights[first] * weights[second]) @ values)


def test_plain_noise_distillation_is_wrong_by_delta_laplacian_delta(pair):
    student, teacher, x = pair
    base, term = output_term(student, teacher, x), jacobian_term(student, teacher, x)
    delta = derivatives(difference(student, teacher), x)
    coefficient = (delta.value * delta.laplacian).sum().item()
    errors = [plain(student, teacher, x, sigma) - base - sigma**2 * term for sigma in SIGMAS]
    assert abs(coefficient) > 0.1, "this pair would not show it"
    assert orders(errors)[-1] == pytest.approx(2, abs=0.1)
    # Richardson: the next order is σ⁴, so two sigmas give the limit.
    limits = [r / sigma**2 for r, sigma in zip(errors, SIGMAS, strict=True)]
    assert (4 * limits[-1] - limits[-2]) / 3 == pytest.approx(coefficient, rel=1e-3)


@pytest.mark.parametrize("form", [pairs_of_signs, variance])
def test_corrected_forms_are_right_to_fourth_order(pair, form):
    student, teacher, x = pair
    term = jacobian_term(student, teacher, x)
    delta = derivatives(difference(student, teacher), x)
    coefficient = delta.third.sum().item()
    if form is variance:
        coefficient += delta.hessian_squared.sum().item() / 2
    errors = [form(student, teacher, x, sigma) - sigma**2 * term for sigma in SIGMAS]
    assert orders(errors)[-1] == pytest.approx(4, abs=0.1)
    limits = [r / sigma**4 for r, sigma in zip(errors, SIGMAS, strict=True)]
    assert (4 * limits[-1] - limits[-2]) / 3 == pytest.approx(coefficient, rel=1e-2)


@pytest.mark.parametrize("sigma", [0.1, 3.0])
def test_linear_networks_at_any_sigma(sigma):
    a, b, c, x = (
        torch.randn(3, 2).double(),
        torch.randn(3, 2).double(),
        torch.randn(3).double(),
        torch.randn(2).double(),
    )
    student, teacher = (lambda y: y @ a.T), (lambda y: y @ b.T + c)
    term = sigma**2 * squared_error(a[None], b[None]).item()
    assert plain(student, teacher, x, sigma) == pytest.approx(output_term(student, teacher, x) + term, rel=1e-9)
    assert pairs_of_signs(student, teacher, x, sigma) == pytest.approx(term, rel=1e-9)
    assert variance(student, teacher, x, sigma) == pytest.approx(term, rel=1e-9)


def test_even_part_of_a_kink_cancels_in_antithetic_pairs_only():
    sigma, origin = 0.1, torch.zeros(2).double()
    kink, zero = (lambda y: y[..., :1].abs()), (lambda y: 0 * y[..., :1])
    assert pairs_of_signs(kink, zero, origin, sigma) == 0
    assert variance(kink, zero, origin, sigma) > 0.3 * sigma**2
    # A hinge max(0, x) at its kink: half its derivative, squared.
    assert pairs_of_signs(lambda y: y[..., :1].relu(), zero, origin, sigma) == pytest.approx(sigma**2 / 4, rel=1e-9)


def test_label_penalty_of_the_paper_misses_the_residual_times_the_laplacian(pair):
    student, _, x = pair
    label = torch.tensor([1.0, 0.0, 0.0]).double()
    at = derivatives(student, x)
    coefficient = ((at.value - label) * at.laplacian).sum().item()
    errors = []
    for sigma in SIGMAS:
        mean = mean_over_noise(lambda y: squared_error(student(y), label.expand(len(y), 3)), x, sigma)
        penalty = paper_label_squared(at.rows[None], sigma).item()
        errors.append(mean - squared_error(at.value[None], label[None]).item() - penalty)
    assert orders(errors)[-1] == pytest.approx(2, abs=0.15)
    limits = [r / sigma**2 for r, sigma in zip(errors, SIGMAS, strict=True)]
    assert (4 * limits[-1] - limits[-2]) / 3 == pytest.approx(coefficient, rel=1e-2)
