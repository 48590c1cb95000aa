"""Differences keep the errors that they document."""

import math

import pytest
import torch
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import jvp, jvp_products
from jacmatch.jacobian.finite_differences import central, derivative_along, step_sizes
from jacmatch.jacobian.verification import unverified

from . import reference
from .architectures import made

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
V = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def smooth(x: Tensor) -> Tensor:
    """Each sample by itself, three outputs."""
    return torch.stack([x.sin().sum(1), (x[:, 0] * x[:, 1]).exp(), x.square().sum(1)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_rule(dtype):
    x, v = X.to(dtype), V.to(dtype)
    steps = step_sizes(x, v)
    for probe in range(2):
        for sample in range(3):
            rms_x = math.sqrt(sum(value**2 for value in x[sample].tolist()) / 4)
            rms_v = math.sqrt(sum(value**2 for value in v[probe, sample].tolist()) / 4)
            expected = torch.finfo(dtype).eps ** (1 / 3) * rms_x / rms_v
            assert float(steps[probe, sample]) == pytest.approx(expected, rel=1e-5)


def test_the_step_of_a_zero_sample_and_of_a_zero_direction():
    x, v = X.clone(), V.clone()
    x[0], v[1, 1] = 0, 0
    steps = step_sizes(x, v)
    assert torch.isfinite(steps).all()
    assert float(steps[0, 0] * v[0, 0].square().mean().sqrt()) == pytest.approx(torch.finfo(x.dtype).eps ** (1 / 3))
    products = central(smooth, x, v)
    expected = reference.jvp(smooth, x, v)
    torch.testing.assert_close(products, expected, rtol=1e-8, atol=1e-8)
    assert not products[1, 1].any()


def test_the_formula():
    products = central(smooth, X, V, step=0.1)
    for number, v in enumerate(V):
        expected = (smooth(X + 0.1 * v) - smooth(X - 0.1 * v)) / 0.2
        torch.testing.assert_close(products[number], expected, rtol=1e-12, atol=1e-12)


def test_a_step_for_each_direction_and_sample():
    steps = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    products = central(smooth, X, V, step=steps)
    for probe in range(2):
        for sample in range(3):
            alone = central(
                smooth, X[sample : sample + 1], V[probe, sample][None, None], step=float(steps[probe, sample])
            )
            torch.testing.assert_close(products[probe, sample], alone[0, 0], rtol=1e-12, atol=1e-12)


def test_the_truncation_is_of_second_order():
    exact = reference.jvp(smooth, X, V)
    errors = [float((central(smooth, X, V, step=h) - exact).norm()) for h in (0.04, 0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_a_quadratic_function_has_no_truncation():
    function = nn.Bilinear(4, 4, 3).double()
    products = central(lambda x: function(x, x), X, V, step=0.7)
    exact = torch.stack([function(v, X) + function(X, v) - 2 * function.bias for v in V])
    torch.testing.assert_close(products, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_documented_floor(dtype, floor):
    """About 10⁻⁵ in float32, with a margin for the third derivative; ε^⅔ and the same margin in float64."""
    module, x = made("layernorm-gelu")
    v = torch.randn(4, *x.shape, dtype=torch.float64)
    exact = reference.jvp(module, x, v)
    products = jvp(module.to(dtype), x.to(dtype), v.to(dtype), engine="differences")[1]
    assert products.dtype == dtype
    assert (products.double() - exact).norm() <= floor * exact.norm()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_input_and_direction_does_not_matter(scale):
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def scaled(x: Tensor) -> Tensor:
        return module(x / scale)

    expected = central(module, X, V)
    torch.testing.assert_close(central(scaled, X * scale, V * scale), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(central(module, X, V * scale), expected * scale, rtol=1e-8, atol=1e-8)


def line(function, x=X, v=V[0]):
    """The values along v, in units of it."""
    return lambda t: function(x + t * v)


def test_the_reported_error_bounds_the_true_one():
    exact = reference.jvp(smooth, X, V)[0]
    best, error = derivative_along(line(smooth), True, torch.float64)
    assert float((best - exact).norm() / exact.norm()) <= min(error + 1e-6, 1e-4)


def test_the_reported_error_grows_with_the_truncation():
    def fast(x: Tensor) -> Tensor:
        return (x / 1e-10).sin()

    exact = torch.func.jvp(fast, (X,), (V[0],))[1]
    best, error = derivative_along(line(fast), True, torch.float64)
    assert (best - exact).norm() > 0.1 * exact.norm()
    assert error > 0.1


def test_the_step_shrinks_until_no_kink_is_near():
    x, v = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def kink(x: Tensor, at: float) -> Tensor:
        return (x - at).relu()

    best, error = derivative_along(line(lambda x: kink(x, 1 - 1e-6), x, v), True, torch.float64)
    assert abs(float(best) - 1) < 1e-6
    assert error < 1e-6
    assert derivative_along(line(lambda x: kink(x, 1 + 1.5e-9), x, v), True, torch.float64, steps=(1e-9,))[1] > 0.1


def test_a_constant_has_no_derivative_that_could_be_trusted():
    best, error = derivative_along(line(torch.zeros_like), True, torch.float64)
    assert not best.any()
    assert error == 1


@pytest.mark.parametrize("step", [0.0, -0.1, math.inf, math.nan])
def test_a_bad_step_is_refused(step):
    with pytest.raises(InputError, match=r"`step` of a difference must be a positive number\. Got"):
        central(smooth, X, V, step=step)


def test_a_given_step_chooses_the_engine():
    result = jvp_products(smooth, X, V, step=0.25)
    assert result.engine == "differences"
    torch.testing.assert_close(result.products, central(smooth, X, V, step=0.25), rtol=1e-12, atol=1e-12)
    again = jvp_products(smooth, X, V, step=0.25, engine="differences")
    assert torch.equal(again.products, result.products)


@pytest.mark.parametrize("training", [True, False])
def test_samples_that_are_coupled_move_together(training):
    """Batch statistics make one function of the batch: its derivative needs the same step for all samples."""
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)).double()
    x = X * torch.tensor([[1.0], [10.0], [0.1]], dtype=torch.float64)  # samples of different scale
    expected = reference.jvp(module, x, V)
    products = jvp(module.train(training), x, V, engine="differences")[1]
    assert (products - expected).norm() <= 1e-7 * expected.norm()


def test_it_takes_two_passes_for_each_direction_and_one_at_the_point():
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return smooth(x)

    with unverified():
        jvp(counted, X, V, engine="differences")
    assert len(calls) == 2 * len(V) + 1
