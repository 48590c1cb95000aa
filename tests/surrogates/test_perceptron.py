"""The explicit derivatives of the network, against differences in float64 and against autograd."""

import numpy as np
import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.surrogates.perceptron import ACTIVATIONS, Perceptron

FUNCTIONS = {
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "softplus": torch.nn.functional.softplus,
    "sine": torch.sin,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_an_activation(activation):
    z, h = np.linspace(-4, 4, 41), 1e-5
    value, first, second = ACTIVATIONS[activation](z)
    plus, minus = ACTIVATIONS[activation](z + h), ACTIVATIONS[activation](z - h)
    np.testing.assert_allclose(first, (plus[0] - minus[0]) / (2 * h), atol=1e-9)
    np.testing.assert_allclose(second, (plus[1] - minus[1]) / (2 * h), atol=1e-9)
    np.testing.assert_allclose(value, FUNCTIONS[activation](torch.from_numpy(z)).numpy(), atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "outputs"), [((), 2), ((5,), 5), ((5, 4), 2), ((5, 4), 4), ((3, 4, 3), 1)])
def test_values_and_jacobian_are_those_of_a_torch_network(activation, hidden, outputs):
    """With fewer outputs than inputs the Jacobian is taken row by row, with more tangent by tangent."""
    net = Perceptron((3, *hidden, outputs), activation)
    theta = net.initial(seed=1)
    x = np.random.default_rng(0).normal(size=(6, 3))

    def by_torch(row):
        for number, (weight, bias) in enumerate(net.layers(theta)):
            row = torch.from_numpy(weight) @ row + torch.from_numpy(bias)
            if number < len(hidden):
                row = FUNCTIONS[activation](row)
        return row

    y, j = net(theta, x)
    for n, row in enumerate(torch.from_numpy(x)):
        np.testing.assert_allclose(y[n], by_torch(row).numpy(), atol=1e-12)
        expected = torch.autograd.functional.jacobian(by_torch, row)
        np.testing.assert_allclose(j[n], expected.numpy(), atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_differs_from_float64_by_its_rounding(activation):
    net = Perceptron((3, 32, 32, 1), activation)
    theta, x = net.initial(seed=0), np.random.default_rng(0).normal(size=(700, 3))  # more rows than a block
    (y, j), (y32, j32) = net(theta, x), net(theta, x.astype(np.float32))
    assert 0 < np.abs(j32 - j).max() < 2e-6 * np.abs(j).max()
    assert 0 < np.abs(y32 - y).max() < 2e-6 * np.abs(y).max()
    np.testing.assert_array_equal(net(theta, x, jacobian=False)[0], y)


@pytest.mark.parametrize("jacobian", [True, False])
def test_the_parameter_gradient_is_that_of_differences(jacobian):
    rng = np.random.default_rng(2)
    net = Perceptron((2, 4, 3, 2), "silu")
    theta, x = net.initial(seed=3), rng.normal(size=(5, 2))
    dy, dt = rng.normal(size=(5, 2)), rng.normal(size=(2, 5, 2)) if jacobian else None

    def inner(parameters):
        y, t, _ = net.forward(parameters, x, jacobian=jacobian)
        return (dy * y).sum() + (0 if dt is None else (dt * t).sum())

    _, _, steps = net.forward(theta, x, jacobian=jacobian)
    gradient = net.parameter_gradient(theta, steps, dy, dt)
    for i in range(net.count):
        e = np.zeros(net.count)
        e[i] = 1e-6
        assert gradient[i] == pytest.approx((inner(theta + e) - inner(theta - e)) / 2e-6, abs=1e-7)


def test_layouts_that_cannot_be():
    with pytest.raises(InputError, match="`activation` of `JacobianRegressor`"):
        Perceptron((2, 3, 1), "relu")
    with pytest.raises(InputError, match="`hidden` of `JacobianRegressor` must be widths of at least 1"):
        Perceptron((2, 0, 1), "tanh")


def test_biases_are_no_weights():
    net = Perceptron((2, 3, 1), "tanh")
    assert net.count == 13
    assert net.is_weight.sum() == 9
