"""The loss and what is selected."""

import numpy as np
import pytest

from jacmatch.surrogates.perceptron import Perceptron
from jacmatch.surrogates.samples import standardize
from jacmatch.surrogates.solver import DECAYS, layouts, minimize_loss, planned_evaluations, select_network


def samples(count=20, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 2))
    y = np.stack([np.sin(2 * x[:, 0]) * x[:, 1], x[:, 0] ** 2], 1)
    j = np.zeros((count, 2, 2))
    j[:, 0, 0], j[:, 0, 1], j[:, 1, 0] = 2 * np.cos(2 * x[:, 0]) * x[:, 1], np.sin(2 * x[:, 0]), 2 * x[:, 0]
    return x, y, j


def test_the_loss_by_its_definition():
    """Loops over samples, outputs and inputs, in raw units."""
    x, y, j = samples(6)
    j[1, 0, 1] = j[2] = np.nan
    weight, of_partial = np.arange(1.0, 7), np.array([[1.0, 2.0], [0.5, 1.0]])
    arguments = {"output_weights": [3.0, 1.0], "partial_weights": of_partial, "jacobian_weight": 0.7}
    data, scaler = standardize(x, y, j, sample_weight=weight, **arguments)
    net = Perceptron((2, 3, 2), "tanh")
    theta = net.initial(seed=0)
    values, tangents = net(theta, scaler.inputs(x))
    values, tangents = scaler.outputs(values), scaler.jacobian(tangents)
    total = total_weight = partial = partial_weight = 0.0
    for n in range(6):
        for k in range(2):
            w = weight[n] * (3.0, 1.0)[k]
            total += w * ((values[n, k] - y[n, k]) / scaler.y_scale[k]) ** 2
            total_weight += w
            for i in range(2):
                if not np.isnan(j[n, k, i]):
                    off = (tangents[n, k, i] - j[n, k, i]) * scaler.x_scale[i] / scaler.y_scale[k]
                    partial += w * of_partial[k, i] * off**2
                    partial_weight += w * of_partial[k, i]
    expected = 0.5 * total / total_weight + 0.5 * 0.7 * 2 * partial / partial_weight
    assert data.loss(net, theta) == pytest.approx(expected, rel=1e-10)
    loss, gradient = data.loss_and_gradient(net, theta)
    assert loss == pytest.approx(expected, rel=1e-10)
    direction = np.random.default_rng(0).normal(size=net.count)
    ahead, behind = (data.loss(net, theta + sign * 1e-6 * direction) for sign in (1, -1))
    assert gradient @ direction == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


def test_rows_keep_the_size_of_the_loss():
    x, y, j = samples()
    data, _ = standardize(x, y, j)
    net = Perceptron((2, 3, 2), "tanh")
    theta = net.initial(seed=0)
    halves = [data.rows(np.arange(start, 20, 2)) for start in (0, 1)]
    assert np.mean([half.loss(net, theta) for half in halves]) == pytest.approx(data.loss(net, theta), rel=1e-10)


def test_a_constant_function_loses_as_much_by_partials_as_by_values():
    x, y, j = samples()
    data, _ = standardize(x, y, j)
    net = Perceptron((2, 2), "tanh")
    assert data.loss(net, np.zeros(net.count)) == pytest.approx(1.0)


def test_a_linear_function_is_fitted_exactly():
    x = np.random.default_rng(0).normal(size=(12, 3))
    a = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]])
    data, _ = standardize(x, x @ a.T + 4, np.broadcast_to(a, (12, 2, 3)))
    net = Perceptron((3, 2), "tanh")
    _, loss, evaluations = minimize_loss(data, net, net.initial(0), 0.0, 100)
    assert loss < 1e-18
    assert evaluations <= 100


@pytest.mark.ci
def test_weight_decay_smooths_noise():
    """The error towards the function without noise is below that of the samples, and of a fit without weight decay."""
    rng = np.random.default_rng(0)
    x, fresh = rng.uniform(-1, 1, (40, 1)), np.linspace(-0.9, 0.9, 100)[:, None]
    data, scaler = standardize(x, np.sin(3 * x) + 0.3 * rng.normal(size=x.shape))
    error = {}
    for name, decays in (("selected", DECAYS), ("none", (0.0,))):
        net = Perceptron((1, 16, 16, 1), "silu")
        fit = select_network(data, [net], starts=1, evaluations=600, decays=decays).fit(data)
        y, _ = fit.net(fit.theta, scaler.inputs(fresh), jacobian=False)
        error[name] = float(np.sqrt(np.square(scaler.outputs(y) - np.sin(3 * fresh)).mean()))
    assert error["selected"] < 0.2
    assert error["selected"] < 0.7 * error["none"]


def test_too_few_samples_to_select_on():
    x, y, j = samples(5)
    seen = []
    data, on_progress = standardize(x, y, j)[0], lambda *numbers: seen.append(numbers)
    nets = layouts(2, (4,), 2, "tanh")
    fit = select_network(data, nets, starts=3, evaluations=50, on_progress=on_progress).fit(data)
    assert fit.held_out is None
    assert len(seen) == fit.evaluations
    assert all(done <= planned for done, planned, _ in seen)


def test_the_work_of_a_fit_is_bounded():
    x, y, j = samples(2000)
    data, _ = standardize(x, y, j)
    small, large = (planned_evaluations(data, Perceptron((2, width, width, 2), "tanh")) for width in (32, 512))
    assert large == 200 < small < 4000


def test_a_product_of_waves_selects_sines():
    """Half a sum of cosines, which a layer of sines represents: the error is far below that of SiLU."""
    x = np.random.default_rng(0).uniform(-1, 1, (60, 2))
    y = np.sin(3 * x[:, :1]) * np.sin(3 * x[:, 1:])
    j = 3 * np.stack([np.cos(3 * x[:, 0]) * np.sin(3 * x[:, 1]), np.sin(3 * x[:, 0]) * np.cos(3 * x[:, 1])], 1)
    selected = select_network(
        standardize(x, y, j[:, None])[0], layouts(2, (8, 8), 1, "auto"), starts=1, evaluations=400
    )
    assert (selected.net.activation, selected.net.widths) == ("sine", (2, 16, 1))
    assert selected.held_out < 0.1 * min(c["held_out"] for c in selected.candidates if c["activation"] == "silu")
    assert [net.activation for net in layouts(2, (8,), 1, "all")] == ["silu", "sine", "tanh", "softplus"]
