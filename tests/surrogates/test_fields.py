"""Fields as outputs, and projections uᵀ ∂y/∂x in place of their Jacobian."""

import itertools
import tracemalloc

import numpy as np
import pytest

from jacmatch.errors import InputError
from jacmatch.surrogates import JacobianRegressor
from jacmatch.surrogates.perceptron import Perceptron
from jacmatch.surrogates.samples import shared_scale, standardize
from jacmatch.surrogates.solver import minimize_loss

FAST = {"model": "network", "hidden": (8,), "activation": "tanh", "max_evaluations": 60}


def bump(count, size=4, seed=0):
    """A Gaussian bump (N, size, size) of variable height and position, with its Jacobian."""
    x = np.random.default_rng(seed).uniform(-0.5, 0.5, (count, 3))
    a, b = np.meshgrid(*2 * (np.linspace(-1, 1, size),), indexing="ij")
    off_a, off_b = a - x[:, 1, None, None], b - x[:, 2, None, None]
    shape = np.exp(-2 * (off_a**2 + off_b**2))
    y = (1 + x[:, 0, None, None]) * shape
    return x, y, np.stack([shape, 4 * off_a * y, 4 * off_b * y], 3)


def test_unit_cotangents_are_the_jacobian():
    """The same samples in the same units: ten evaluations from the same start give the same network."""
    x, y, j = bump(12, size=2)
    u = np.broadcast_to(np.eye(4).reshape(4, 2, 2), (12, 4, 2, 2))
    j[3, 1, 0, 2] = np.nan
    few = {**FAST, "max_evaluations": 10, "weight_decay": 1e-6}
    full = JacobianRegressor(**few).fit(x, y, jacobian=j)
    projected = JacobianRegressor(**few).fit(x, y, jacobian=j.reshape(12, 4, 3), cotangents=u)
    np.testing.assert_allclose(projected.predict(x), full.predict(x), rtol=1e-9)
    assert full.predict(x).shape == y.shape
    assert full.predict_jacobian(x).shape == j.shape


@pytest.mark.parametrize("weight", ["auto", 0.7])
def test_unit_cotangents_with_any_units_of_the_outputs(weight):
    x, y, j = bump(6, size=2)
    y, j = y.reshape(6, 4) * [1.0, 10.0, 0.1, 3.0], j.reshape(6, 4, 3) * np.array([1.0, 10.0, 0.1, 3.0])[:, None]
    net = Perceptron((3, 5, 4), "tanh")
    theta = net.initial(0)
    u = np.broadcast_to(np.eye(4), (6, 4, 4))
    full, _ = standardize(x, y, j, jacobian_weight=weight)
    projected, _ = standardize(x, y, j, jacobian_weight=weight, cotangents=u)
    assert projected.loss(net, theta) == pytest.approx(full.loss(net, theta), rel=1e-12)


def test_the_mean_over_all_signs_is_the_loss_of_the_jacobian():
    x, y, j = bump(5, size=2)
    y, j = y.reshape(5, 4), j.reshape(5, 4, 3)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
    arguments = {"jacobian_weight": 0.7, "y_scale": shared_scale(y, (2, 2)), "sample_weight": np.arange(1.0, 6)}
    net = Perceptron((3, 4, 4), "silu")
    theta = net.initial(1)
    full, _ = standardize(x, y, j, **arguments)
    losses = []
    for sign in signs:
        u = np.broadcast_to(sign, (5, 1, 4))
        losses.append(standardize(x, y, u @ j, cotangents=u, **arguments)[0].loss(net, theta))
    assert np.std(losses) > 1e-3 * np.mean(losses)
    assert np.mean(losses) == pytest.approx(full.loss(net, theta), rel=1e-12)
    u = np.broadcast_to(signs, (5, 16, 4))
    assert standardize(x, y, u @ j, cotangents=u, **arguments)[0].loss(net, theta) == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("hidden", [(), (4,), (5, 4)])
def test_loss_and_gradient_by_their_definition(hidden):
    """The loss by loops over samples and projections, in raw units; the gradient by differences."""
    x, y, j = bump(5, size=2)
    y, j = y.reshape(5, 4), j.reshape(5, 4, 3)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(5, 3, 4))
    g = u @ j
    g[2, 1, 0] = g[4] = np.nan
    u[1, 2] = 0
    weight = np.arange(1.0, 6)
    data, scaler = standardize(x, y, g, sample_weight=weight, jacobian_weight=0.7, cotangents=u)
    net = Perceptron((3, *hidden, 4), "tanh")
    theta = net.initial(2)
    values, partials = net(theta, scaler.inputs(x))
    values, partials = scaler.outputs(values), scaler.jacobian(partials)
    expected = 0.5 * (weight[:, None] * ((values - y) / scaler.y_scale) ** 2).sum() / (4 * weight.sum())
    error = size = 0.0
    for n, p, i in itertools.product(range(5), range(3), range(3)):
        square = (u[n, p] ** 2).sum()
        if not np.isnan(g[n, p, i]) and square:
            unit = np.sqrt(((u[n, p] * scaler.y_scale) ** 2).sum() / square)
            error += weight[n] * ((u[n, p] @ partials[n, :, i] - g[n, p, i]) * scaler.x_scale[i] / unit) ** 2
            size += weight[n] * square
    expected += 0.5 * 0.7 * 3 * error / size
    loss, gradient = data.loss_and_gradient(net, theta)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert data.loss(net, theta) == pytest.approx(expected, rel=1e-12)
    for direction in rng.normal(size=(3, net.count)):
        ahead, behind = (data.loss(net, theta + sign * 1e-6 * direction) for sign in (1, -1))
        assert gradient @ direction == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


def test_projections_say_more_than_values():
    x, y, j = bump(12)
    u = np.random.default_rng(0).choice([-1.0, 1.0], (12, 8, 4, 4))
    g = np.einsum("npab,nabd->npd", u, j)
    xt, yt, jt = bump(200, seed=1)
    settings = {**FAST, "weight_decay": 1e-6, "max_evaluations": 40}
    alone = JacobianRegressor(**settings).fit(x, y)
    model = JacobianRegressor(**{**settings, "model": "auto"}).fit(x, y, g, cotangents=u)
    assert model.process_ is None
    assert model.solver_ == ("lbfgs", "a Gaussian process, weights or cotangents")
    errors = [np.square(each.predict(xt) - yt).mean() for each in (model, alone)]
    of_partials = [np.square(each.predict_jacobian(xt) - jt).mean() for each in (model, alone)]
    assert errors[0] < 0.5 * errors[1]
    assert of_partials[0] < 0.5 * of_partials[1]
    assert model.score(xt, yt) == pytest.approx(1 - errors[0] / yt.var(0).mean())


def test_the_jacobian_of_a_large_field_is_never_formed():
    """50 samples of 64 × 64 outputs: their Jacobians for 12 inputs would take 20 MB, each pass much less."""
    rng = np.random.default_rng(0)
    n, d, k = 50, 12, 64 * 64
    x, y, u = rng.normal(size=(n, d)), rng.normal(size=(n, k)), rng.choice([-1.0, 1.0], (n, 1, k))
    data, _ = standardize(x, y, rng.normal(size=(n, 1, d)), cotangents=u)
    net = Perceptron((d, 4, k), "tanh")
    theta = net.initial(0)
    tracemalloc.start()
    data.loss_and_gradient(net, theta)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n * k * 5  # some arrays of the values
    assert peak < 0.5 * 8 * n * k * d


def test_the_parts_of_a_field_have_their_scales():
    y = np.random.default_rng(0).normal(size=(50, 2, 3, 4)) * np.array([1.0, 100.0])[:, None, None]
    y[:, :, 0, 0] = 7.0
    expected = [np.sqrt(y[:, k].var(0).mean()) for k in range(2)]
    np.testing.assert_allclose(shared_scale(y.reshape(50, 24), (2, 3, 4)), np.repeat(expected, 12), rtol=1e-12)
    np.testing.assert_array_equal(shared_scale(np.full((5, 4), 7.0), (2, 2)), np.ones(4))


def test_a_linear_field_is_fitted_exactly_from_projections():
    rng = np.random.default_rng(0)
    x, a, u = rng.normal(size=(8, 3)), rng.normal(size=(9, 3)), rng.normal(size=(8, 2, 9))
    data, _ = standardize(x, x @ a.T + 4, u @ a, cotangents=u)
    net = Perceptron((3, 9), "tanh")
    assert minimize_loss(data, net, net.initial(0), 0.0, 200)[1] < 1e-15


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"cotangents": np.ones((12, 2, 4, 4))}, "`cotangents` of `fit` need the projections.*jacobian=None"),
        ({}, {"cotangents": np.ones((12, 2, 16))}, r"must have the shape \(12, P, 4, 4\).*Got shape \(12, 2, 16\)"),
        ({}, {"cotangents": np.ones((11, 2, 4, 4))}, r"must have the shape \(12, P, 4, 4\)"),
        ({}, {"cotangents": np.ones((12, 0, 4, 4))}, r"must have the shape \(12, P, 4, 4\)"),
        ({}, {"cotangents": np.full((12, 2, 4, 4), np.nan)}, "`cotangents` must be finite.*NaN in `jacobian`"),
        ({}, {"cotangents": "text"}, "`cotangents` must be an array of floats"),
        (
            {},
            {"cotangents": np.ones((12, 2, 4, 4)), "jacobian": np.ones((12, 3, 3))},
            r"must have the shape \(12, 2, 3\): samples, cotangents, inputs.*Got shape \(12, 3, 3\)",
        ),
        ({}, {"jacobian": np.ones((12, 4, 4, 2))}, r"must have the shape \(12, 4, 4, 3\): samples, outputs, inputs"),
    ],
)
def test_what_it_refuses(settings, arguments, message):
    x, y, _ = bump(12)
    with pytest.raises(InputError, match=message):
        JacobianRegressor(**{**FAST, **settings}).fit(x, y, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "gp"}, "cannot be used by a Gaussian process"),
        ({"solver": "adam"}, "need L-BFGS on the CPU"),
        ({"device": "cuda"}, "need L-BFGS on the CPU"),
        ({"output_weights": 2.0}, "cannot have weights of outputs or partials"),
    ],
)
def test_what_cotangents_cannot_be_combined_with(settings, message):
    x, y, _ = bump(12)
    with pytest.raises(InputError, match=message):
        JacobianRegressor(**{**FAST, **settings}).fit(x, y, np.ones((12, 1, 3)), cotangents=np.ones((12, 1, 4, 4)))
