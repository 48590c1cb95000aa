"""Prices and deltas against scipy's distributions, simulation and differences; paths against their means."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch.autograd import gradcheck

from jacmatch.errors import InputError
from jacmatch_research.systems.pricing import OPTIONS, Basket, WorstOf


def states(option, count=3):
    return option.states(count, seed=11)


@pytest.mark.parametrize("name", OPTIONS)
def test_paths_have_the_exact_price_and_delta_as_their_means(name):
    option = OPTIONS[name]
    for x in states(option):
        payoffs, gradients = option.paths(x.expand(100_000, -1), seed=5)
        price, deltas = (each[0] for each in option.exact(x[None]))
        for sample, mean in ((payoffs, price), (gradients[:, 0], deltas[0])):
            error = sample.std(0) / math.sqrt(len(sample))
            assert ((sample.mean(0) - mean).abs() <= 4.5 * error + 1e-5).all()  # where it is rare, no path has it


@pytest.mark.parametrize("name", OPTIONS)
def test_deltas_are_the_derivatives_of_prices(name):
    option, h = OPTIONS[name], 1e-5
    x = states(option)
    deltas = option.exact(x)[1][:, 0]
    for asset, step in enumerate(h * torch.eye(x.shape[1], dtype=x.dtype)):
        difference = (option.exact(x + step)[0] - option.exact(x - step)[0])[:, 0] / (2 * h)
        torch.testing.assert_close(deltas[:, asset], difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_of_a_path_are_those_of_its_payoff(name):
    option = OPTIONS[name]
    x = states(option, 40)
    gradients, h = option.paths(x, seed=3)[1][:, 0], 1e-7
    assert (gradients != 0).any()
    assert (gradients == 0).all(1).any()
    for asset, step in enumerate(h * torch.eye(x.shape[1], dtype=x.dtype)):
        difference = (option.paths(x + step, seed=3)[0] - option.paths(x - step, seed=3)[0])[:, 0] / (2 * h)
        torch.testing.assert_close(gradients[:, asset], difference, rtol=1e-5, atol=1e-6)


def test_a_basket_is_priced_as_scipy_integrates_it():
    basket = Basket.drawn(3, seed=4)
    x = states(basket)
    for state, price in zip(x, basket.exact(x)[0][:, 0], strict=True):
        parts = (basket.weights * basket.volatilities).numpy()
        scale = math.sqrt(parts @ basket.correlation.numpy() @ parts)
        forward = float(state @ basket.weights)
        expected = norm.expect(lambda b: max(b - basket.strike, 0.0), loc=forward, scale=scale, lb=basket.strike)
        assert float(price) == pytest.approx(expected, rel=1e-6, abs=1e-10)


def test_one_asset_is_priced_by_black_and_scholes():
    option = WorstOf(torch.tensor([0.3], dtype=torch.float64))
    x = torch.tensor([[0.7], [1.0], [1.4]], dtype=torch.float64)
    price, deltas = option.exact(x)
    d = ((x / option.strike).log() + 0.045) / 0.3
    expected = option.strike * torch.special.ndtr(0.3 - d) - x * torch.special.ndtr(-d)
    torch.testing.assert_close(price, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(deltas[:, 0], -torch.special.ndtr(-d), rtol=1e-6, atol=1e-8)


def test_two_assets_are_priced_by_stulz():
    """Put on the minimum = K − E min + call on the minimum; both by bivariate normal distributions."""
    option = WorstOf(torch.tensor([0.2, 0.35], dtype=torch.float64), correlation=0.4, strike=1.05)
    for x in states(option):
        (s, t), (a, b) = x.tolist(), option.volatilities.tolist()
        both, k = math.sqrt(a * a + b * b - 2 * 0.4 * a * b), option.strike

        def bivariate(u, v, rho):
            return float(multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([u, v]))

        d = (math.log(t / s) - both**2 / 2) / both
        minimum = s * norm.cdf(d) + t * norm.cdf((math.log(s / t) - both**2 / 2) / both)
        first, second = (math.log(s / k) + a * a / 2) / a, (math.log(t / k) + b * b / 2) / b
        call = (
            s * bivariate(first, d, (0.4 * b - a) / both)
            + t * bivariate(second, (math.log(s / t) - both**2 / 2) / both, (0.4 * a - b) / both)
            - k * bivariate(first - a, second - b, 0.4)
        )
        assert float(option.exact(x[None])[0]) == pytest.approx(k - minimum + call, rel=1e-5)


def test_deltas_of_the_worst_of_pass_gradcheck():
    option = WorstOf(torch.tensor([0.2, 0.3], dtype=torch.float64))
    x = states(option).requires_grad_()
    assert gradcheck(lambda y: option.exact(y)[0], (x,), atol=1e-6)


def test_states_are_the_law_that_they_say():
    basket, count = OPTIONS["basket call, Bachelier"], 40_000
    x = basket.states(count, seed=1)
    torch.testing.assert_close(x.mean(0), torch.ones(7, dtype=x.dtype), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0) / (1.5 * basket.volatilities), torch.ones(7, dtype=x.dtype), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.corrcoef(x.T), basket.correlation, atol=0.02, rtol=0)
    assert torch.equal(basket.states(count, seed=1), x)
    worst = OPTIONS["worst-of put, Black-Scholes"].states(count, seed=1)
    deviation = worst.log().std(0) / (1.5 * OPTIONS["worst-of put, Black-Scholes"].volatilities)
    torch.testing.assert_close(deviation, torch.ones(4, dtype=x.dtype), atol=0.02, rtol=0)
    assert float(torch.corrcoef(worst.log().T)[0, 3]) == pytest.approx(0.5, abs=0.02)


def test_bad_numbers_are_refused():
    with pytest.raises(InputError, match=r"`assets` of `Basket\.drawn` must be at least 1\. Got 0\."):
        Basket.drawn(0, seed=0)
    with pytest.raises(InputError, match=r"`correlation` of `WorstOf` must be in \[0, 1\)\. Got 1\.0\."):
        WorstOf(torch.ones(2, dtype=torch.float64), correlation=1.0)
