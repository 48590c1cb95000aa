"""The Gaussian process against its definition."""

import numpy as np
import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.models import build
from jacmatch.surrogates import gaussian_process
from jacmatch.surrogates.gaussian_process import (
    Logs,
    conditions_on,
    fit_gaussian_process,
    held_out_loss,
    select_process,
    with_free_samples,
)
from jacmatch.surrogates.modules import to_process_module
from jacmatch.surrogates.samples import standardize


def samples(count=12, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 2))
    y = np.stack([np.sin(2 * x[:, 0]) * x[:, 1], x[:, 0] ** 2], 1)
    j = np.zeros((count, 2, 2))
    j[:, 0, 0], j[:, 0, 1], j[:, 1, 0] = 2 * np.cos(2 * x[:, 0]) * x[:, 1], np.sin(2 * x[:, 0]), 2 * x[:, 0]
    return x, y, j


def kernel(a, b, lengths, constants):
    return float(((np.exp(-0.5 * ((a - b) / lengths) ** 2) + constants) / (1 + constants)).prod())


def covariance(a, i, b, j, lengths, constants, h=1e-4):
    """Of two values or scaled partials, by differences of the kernel."""

    def shifted(point, axis, sign):
        step = np.zeros(len(point))
        if axis:
            step[axis - 1] = sign * h * lengths[axis - 1]
        return point + step

    if i and j:
        terms = [
            s * t * kernel(shifted(a, i, s), shifted(b, j, t), lengths, constants) for s in (1, -1) for t in (1, -1)
        ]
        return sum(terms) / (4 * h * h)
    if i or j:
        terms = [s * kernel(shifted(a, i, s), shifted(b, j, s), lengths, constants) for s in (1, -1)]
        return sum(terms) / (2 * h)
    return kernel(a, b, lengths, constants)


@pytest.mark.parametrize("constants", [(0.0, 0.0), (0.3, 0.0), (0.5, 40.0)])
def test_covariances_are_derivatives_of_the_kernel(constants):
    rng = np.random.default_rng(0)
    a, b, lengths = rng.normal(size=(2, 2)), rng.normal(size=(3, 2)), np.array([0.7, 1.6])
    constants = np.array(constants)
    full = gaussian_process._factors(a, b, lengths, constants).covariance(partials=(True, True)).reshape(3, 2, 3, 3)
    for i, n, j, m in np.ndindex(full.shape):
        assert full[i, n, j, m] == pytest.approx(covariance(a[n], i, b[m], j, lengths, constants), abs=1e-6)


@pytest.mark.parametrize("known", ["all", "some", "values"])
def test_the_likelihood_by_its_definition_and_its_gradient_by_differences(known):
    x, y, j = samples(6)
    if known == "some":
        j[2, :, 0] = j[4, :, 1] = np.nan
    data, _ = standardize(x, y, None if known == "values" else j)
    observed = gaussian_process._observed(data, np.arange(2))
    parameters = np.log([0.8, 1.3, 0.2, 1.5, 1e-2, 3e-2])
    value, gradient = gaussian_process._likelihood(parameters, observed)
    factors = gaussian_process._factors(data.x, data.x, *np.exp(parameters[:4]).reshape(2, 2))
    full = factors.covariance(partials=(True, True))
    part = full[np.ix_(observed.index, observed.index)]
    part += np.diag(np.where(observed.axis > 0, 3e-2, 1e-2))
    scale = np.array([1.0, 0.8, 1.3])[observed.axis]
    h = (observed.axis == 0).astype(float)
    expected = 0.0
    for k in range(2):
        z = observed.z[:, k] * scale
        mean = h @ np.linalg.solve(part, z) / (h @ np.linalg.solve(part, h))
        variance = (z - mean * h) @ np.linalg.solve(part, z - mean * h) / len(z)
        expected += 0.5 * (len(z) * np.log(variance) + np.linalg.slogdet(part)[1]) - np.log(scale).sum()
    assert value == pytest.approx(expected, rel=1e-9)
    for i in range(6):
        step = np.zeros(6)
        step[i] = 1e-5
        ahead, behind = (gaussian_process._likelihood(parameters + sign * step, observed)[0] for sign in (1, -1))
        assert gradient[i] == pytest.approx((ahead - behind) / 2e-5, abs=1e-5)


def test_it_goes_through_what_is_known():
    x, y, j = samples()
    j[3, 1] = np.nan  # outputs with different patterns
    data, scaler = standardize(x, y, j)
    process = fit_gaussian_process(data)
    assert len(process.groups) == 2
    mean, partials, std = process(data.x, jacobian=True, std=True)
    np.testing.assert_allclose(scaler.outputs(mean), y, atol=1e-4)
    known = ~np.isnan(j)
    np.testing.assert_allclose(scaler.jacobian(partials)[known], j[known], atol=2e-3)
    assert np.all(std < 1e-2)


@pytest.mark.parametrize("constants", [(0.0, 0.0), (0.3, 0.0), (0.5, 40.0)])
def test_its_jacobian_is_that_of_its_mean(constants):
    x, y, j = samples()
    data, _ = standardize(x, y, j)
    parameters = np.array([np.log(0.8), np.log(1.5), *(np.log(c) if c else -np.inf for c in constants), -9, -9])
    process = fit_gaussian_process(data, parameters=(parameters,))
    points = np.random.default_rng(3).normal(size=(5, 2))
    _, partials, _ = process(points)
    for i in range(2):
        step = np.zeros(2)
        step[i] = 1e-4
        ahead, behind = (process(points + sign * step, jacobian=False)[0] for sign in (1, -1))
        np.testing.assert_allclose(partials[:, :, i], (ahead - behind) / 2e-4, atol=1e-4)


def test_what_is_held_out_and_what_is_free():
    x, y, j = samples(30)
    data, _ = standardize(x, y, j)
    assert conditions_on(data) == 90
    assert held_out_loss(data, 0) < 1e-4
    assert held_out_loss(data.rows(np.arange(8)), 0) is None
    more = with_free_samples(data, fit_gaussian_process(data), seed=0, count=20)
    assert len(more) == 50
    assert more.y_weights.sum() == pytest.approx(1.0)
    assert more.t_weights.sum() == pytest.approx(data.t_weights.sum())
    assert (more.x[30:] >= data.x.min(0)).all()
    assert (more.x[30:] <= data.x.max(0)).all()


def test_large_data_are_not_tried(monkeypatch):
    monkeypatch.setattr(gaussian_process, "LARGEST", 50)
    x, y, j = samples(30)
    assert held_out_loss(standardize(x, y, j)[0], 0) is None


def test_the_mean_as_a_module():
    """Two outputs of different units, one of which has partials of some samples only."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 4, (12, 2))
    y = np.stack([np.sin(x[:, 0]) * x[:, 1], 1000 * x.sum(1) ** 2], 1)
    j = np.stack(
        [np.stack([np.cos(x[:, 0]) * x[:, 1], np.sin(x[:, 0])], 1), 2000 * np.repeat(x.sum(1)[:, None], 2, 1)], 1
    )
    j[3:, 1, 0] = np.nan
    data, scaler = standardize(x, y, j)
    process = fit_gaussian_process(data)
    module = to_process_module(process, scaler, (2,))
    points = rng.uniform(1, 4, (5, 2))
    values, partials, _ = process(scaler.inputs(points))
    given = torch.from_numpy(points)
    np.testing.assert_allclose(module(given), scaler.outputs(values), rtol=1e-7)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda each: module(each[None])[0]))(given)
    np.testing.assert_allclose(jacobian, scaler.jacobian(partials), rtol=1e-6, atol=1e-6)
    again = build(f"gaussian-process:12-{len(process.groups)}", 2, (2,))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(given), module(given))
    with pytest.raises(InputError, match="`gaussian-process:LAYOUT` must be POINTS or POINTS-GROUPS"):
        build("gaussian-process:0", 2, (2,))


def power(x):
    """A product of powers, positive and over five orders of magnitude, and a sum beside it."""
    y = np.stack([-(x[:, 0] ** 4) / x[:, 1] ** 3, x.sum(1) - 4], 1)
    j = np.stack([np.stack([4 * y[:, 0] / x[:, 0], -3 * y[:, 0] / x[:, 1]], 1), np.ones((len(x), 2))], 1)
    return y, j


def test_logarithms_of_outputs_of_one_sign_are_learned_where_they_are_better():
    rng = np.random.default_rng(0)
    x, points = rng.uniform(0.2, 4, (30, 2)), rng.uniform(0.2, 4, (200, 2))
    y, j = power(x)
    j[4, 0, 1] = np.nan
    data, scaler = standardize(x, y, j)
    process, loss = select_process(data, 0, scaler.zero)
    assert process.logs.sign.tolist() == [-1, 0]
    plain, more = select_process(data, 0)
    assert plain.logs is None
    assert loss == pytest.approx(held_out_loss(data, 0, process))
    assert loss < 0.1 * more
    values, partials, std = process(scaler.inputs(points), std=True)
    true, derivatives = power(points)
    without = scaler.outputs(plain(scaler.inputs(points))[0])
    off, before = (np.abs(each - true).mean(0) for each in (scaler.outputs(values), without))
    assert off[0] < 0.1 * before[0]
    assert off[0] < 0.02 * true[:, 0].std()
    np.testing.assert_allclose(scaler.jacobian(partials)[:, 1], derivatives[:, 1], atol=1e-3)
    assert (std > 0).all()
    module, given = to_process_module(process, scaler, (2,)), torch.from_numpy(points)
    np.testing.assert_allclose(module(given), scaler.outputs(values), rtol=1e-7, atol=1e-8)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda each: module(each[None])[0]))(given)
    np.testing.assert_allclose(jacobian, scaler.jacobian(partials), rtol=1e-6, atol=1e-6)


def test_logarithms_are_for_outputs_of_one_sign_and_of_a_wide_range():
    y = np.array([[1.0, -1.0, 1.0, 5.0], [20.0, -20.0, -20.0, 6.0]])
    assert Logs.of(y, np.zeros(4)).sign.tolist() == [1, -1, 0, 0]
    assert Logs.of(y[:, 2:], np.zeros(2)) is None
    assert Logs.of(y[:, :1], np.ones(1)) is None  # the smallest value is 0
