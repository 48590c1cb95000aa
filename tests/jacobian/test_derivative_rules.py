"""The rules of our own, for layers and activations: first and second derivatives by differences.

That whole networks are right is shown elsewhere (`test_products`, `test_parameter_gradients`); here are the arguments
that these networks do not use, and the transforms around them.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from jacmatch.jacobian import jvp_products, vjp_products
from jacmatch.jacobian.rules.activation import gelu, relu
from jacmatch.jacobian.rules.batch_norm import Statistics, _moved, affine, batch_norm, dot_by_channel, moments
from jacmatch.jacobian.rules.convolution import convolution
from jacmatch.jacobian.rules.layer_norm import layer_norm
from jacmatch.jacobian.rules.linear import linear
from jacmatch.jacobian.rules.op_replacements import differentiated

CONVOLUTIONS = {
    "1d": (torch.conv1d, (2, 2, 5), (3, 2, 3), {"padding": 1}),
    "2d": (torch.conv2d, (2, 2, 4, 4), (3, 2, 3, 3), {"padding": 1}),
    "3d": (torch.conv3d, (1, 1, 3, 3, 3), (2, 1, 2, 2, 2), {}),
    "stride that leaves a rest": (torch.conv2d, (2, 1, 6, 5), (2, 1, 3, 2), {"stride": (2, 3)}),
    "dilation": (torch.conv2d, (1, 2, 5, 5), (2, 2, 2, 2), {"dilation": 2, "padding": (0, 1)}),
    "groups": (torch.conv2d, (2, 4, 3, 3), (6, 2, 2, 2), {"groups": 2}),
    "depthwise": (torch.conv2d, (2, 3, 4, 4), (3, 1, 3, 3), {"groups": 3, "padding": 1}),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_right(function, inputs: tuple[Tensor, ...]) -> None:
    """First derivatives in both modes and over a batch of directions, and second ones in reverse, by differences."""
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, bias):
    func, shape, kernel, settings = CONVOLUTIONS[name]
    inputs = (randn(*shape), randn(*kernel, seed=1), *([randn(kernel[0], seed=2)] if bias else []))
    assert torch.equal(convolution(func, *inputs, **settings), func(*inputs, **settings))
    assert_right(lambda *given: convolution(func, *given, **settings), inputs)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradient_of_a_convolution_by_its_input(name):
    """The rule that a row is made of, as a function of what comes from above and of the weight."""
    func, shape, kernel, settings = CONVOLUTIONS[name]
    x, weight = randn(*shape), randn(*kernel, seed=1)
    g = randn(*func(x, weight, **settings).shape, seed=2)

    def by_input(g: Tensor, weight: Tensor) -> Tensor:
        y = convolution(func, x, weight, **settings)
        return torch.autograd.grad(y, x, g, create_graph=True)[0]

    assert gradcheck(by_input, (g, weight), fast_mode=True)
    assert gradgradcheck(by_input, (g, weight), fast_mode=True)


OTHERS = {
    "padding by name": (torch.conv2d, (2, 2, 4, 4), (3, 2, 3, 3), {"padding": "same"}),
    "one sample": (torch.conv2d, (2, 4, 4), (3, 2, 3, 3), {"padding": 1}),
    "empty batch": (torch.conv2d, (0, 2, 4, 4), (3, 2, 3, 3), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_rules_do_not_cover_is_left_to_torch(name):
    func, shape, kernel, settings = OTHERS[name]
    x, weight = randn(*shape), randn(*kernel, seed=1)
    y = convolution(func, x, weight, **settings)
    assert torch.equal(y, func(x, weight, **settings))
    assert "_Convolution" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (2, 2, 2, 3)])
@pytest.mark.parametrize("frozen", [False, True])
def test_derivative_of_batch_norm_in_training(shape, frozen):
    """As a function of the direction, of x, which makes the statistics, and of γ."""

    def moved(t: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            var, mean = moments(x)
            rstd = (var + 1e-3).rsqrt()
        return _moved(t, x, weight, mean, rstd, 1e-3, frozen)

    inputs = (randn(*shape), randn(*shape, seed=1), randn(2, seed=2))
    assert gradcheck(moved, inputs, fast_mode=True)
    assert gradgradcheck(moved, inputs, fast_mode=True)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(training):
    mean, var = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 2.0]).double()
    inputs = (randn(3, 2, 4), randn(2, seed=1), randn(2, seed=2))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(False, None, x, mean.clone(), var.clone(), weight, bias, training, 0.1, 1e-3)

    expected = functional.batch_norm(inputs[0], mean.clone(), var.clone(), *inputs[1:], training, 0.1, 1e-3)
    torch.testing.assert_close(ours(*inputs), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(ours, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(ours, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 5), (3, 2, 4), (2, 3, 2, 2)])
def test_layer_norm(shape):
    """Over the last axis, and over the last two; the derivative as a function of the direction and of x."""
    for axes in (1, len(shape) - 1):
        sizes = shape[-axes:]
        inputs = (randn(*shape), randn(*sizes, seed=1), randn(*sizes, seed=2))

        def ours(x: Tensor, weight: Tensor, bias: Tensor, sizes: tuple[int, ...] = sizes) -> Tensor:
            return layer_norm(x, sizes, weight, bias, 1e-3)

        expected = functional.layer_norm(inputs[0], sizes, *inputs[1:], 1e-3)
        torch.testing.assert_close(ours(*inputs), expected, rtol=1e-12, atol=1e-12)
        assert_right(ours, inputs)


def test_layer_norm_over_all_dimensions_in_a_dual_pass():
    """No dimension is left to sum the gradient of weight and bias over, and `sum(())` would sum over all."""
    x, t, weight, bias = (randn(2, 3, seed=number).requires_grad_() for number in range(4))

    def ours(x: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda z: layer_norm(z, (2, 3), weight, bias, 1e-3), (x,), (t,))

    assert gradcheck(ours, (x, t, weight, bias))


def in_a_dual_pass(rule):
    """Value and tangent of the rule as a function of x, the tangent and the other arguments."""

    def both(x: Tensor, t: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(lambda z: rule(z, *others), (x,), (t,))

    return both


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_in_a_dual_pass(name):
    func, shape, kernel, settings = CONVOLUTIONS[name]
    inputs = (randn(*shape), randn(*shape, seed=1), randn(*kernel, seed=2), randn(kernel[0], seed=3))
    ours = in_a_dual_pass(lambda *given: convolution(func, *given, **settings))
    expected = func(inputs[0], *inputs[2:], **settings), func(*inputs[1:3], **settings)
    assert all(map(torch.equal, ours(*inputs), expected))
    assert "_Convolution" in type(ours(*inputs)[1].grad_fn).__name__
    assert gradcheck(ours, inputs, fast_mode=True)
    assert gradgradcheck(ours, inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (2, 2, 2, 3)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_of_a_batch_in_a_dual_pass(shape, frozen, affine):
    """The tangent is the difference of values, with all statistics or with those of x; then gradients of both."""
    inputs = (randn(*shape), randn(*shape, seed=1), *([randn(2, seed=2), randn(2, seed=3)] if affine else []))

    def rule(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return batch_norm(False, Statistics() if frozen else None, x, None, None, weight, bias, True, 0.1, 1e-3)

    ours = in_a_dual_pass(rule)
    x, t, *others = (each.detach() for each in inputs)
    var, mean = (each.view(1, -1, *[1] * (len(shape) - 2)) for each in moments(x))

    def values(z: Tensor) -> Tensor:
        if not frozen:
            return functional.batch_norm(z, None, None, *others, training=True, eps=1e-3)
        weight, bias = (each.view_as(mean) for each in others) if others else (1.0, 0.0)
        return (z - mean) / (var + 1e-3).sqrt() * weight + bias

    value, tangent = ours(*inputs)
    torch.testing.assert_close(value, values(x), rtol=1e-12, atol=1e-12)
    difference = (values(x + 1e-6 * t) - values(x - 1e-6 * t)) / 2e-6
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)
    assert gradcheck(ours, inputs, fast_mode=True)
    assert gradgradcheck(ours, inputs, fast_mode=True)


def test_running_statistics_in_a_dual_pass_are_those_of_training():
    x, t = randn(5, 2, 3), randn(5, 2, 3, seed=1)
    mine, right = ([torch.zeros(2).double(), torch.ones(2).double()] for _ in range(2))
    torch.func.jvp(lambda z: batch_norm(False, None, z, *mine, training=True), (x,), (t,))
    functional.batch_norm(x, *right, training=True)
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


def test_constant_batch_norm_and_relu_in_a_dual_pass():
    mean, var = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 2.0]).double()
    inputs = (randn(3, 2, 4), randn(3, 2, 4, seed=1), randn(2, seed=2), randn(2, seed=3))
    constant = in_a_dual_pass(lambda x, *rest: batch_norm(False, None, x, mean, var, *rest, eps=1e-3))
    value, tangent = constant(*inputs)
    right = torch.func.jvp(
        lambda x: functional.batch_norm(x, mean, var, *inputs[2:], eps=1e-3), inputs[:1], inputs[1:2]
    )
    torch.testing.assert_close((value, tangent), right, rtol=1e-12, atol=1e-12)
    for function, given in ((constant, inputs), (in_a_dual_pass(relu), inputs[:2])):
        assert gradcheck(function, given, fast_mode=True)
        assert gradgradcheck(function, given, fast_mode=True)
    pair, expected = (torch.func.jvp(each, inputs[:1], inputs[1:2]) for each in (relu, functional.relu))
    assert all(map(torch.equal, pair, expected))


def test_derivative_of_layer_norm():
    x, t = randn(3, 4), randn(3, 4, seed=1)

    def moved(t: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(layer_norm(x, (4,), eps=1e-3), x, t, create_graph=True)[0]

    assert gradcheck(moved, (t, x))
    assert gradgradcheck(moved, (t, x))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    inputs = (randn(3, 2, 4), randn(5, 4, seed=1), *([randn(5, seed=2)] if bias else []))
    torch.testing.assert_close(linear(*inputs), functional.linear(*inputs), rtol=1e-12, atol=1e-12)
    assert_right(linear, inputs)


def test_gelu():
    x = randn(3, 4)
    torch.testing.assert_close(gelu(x), functional.gelu(x), rtol=1e-12, atol=1e-12)
    assert_right(gelu, (x,))
    moved = torch.func.vmap(lambda t: torch.func.jvp(gelu, (x,), (t,))[1])(randn(2, 3, 4, seed=1))
    expected = torch.func.vmap(lambda t: torch.func.jvp(functional.gelu, (x,), (t,))[1])(randn(2, 3, 4, seed=1))
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    with differentiated(composed=False, frozen=None, forward=True):
        assert "_Gelu" in type(functional.gelu(x).grad_fn).__name__
        approximate = functional.gelu(x, approximate="tanh")
    assert torch.equal(approximate, functional.gelu(x, approximate="tanh"))


def test_affine_and_relu():
    assert_right(affine, (randn(2, 3, 4), randn(3, seed=1), randn(3, seed=2)))
    assert_right(relu, (randn(3, 4),))
    a, b = randn(2, 3, 4).detach(), randn(2, 3, 4, seed=1).detach()
    with torch.no_grad():
        torch.testing.assert_close(dot_by_channel(a, b), (a * b).sum((0, 2)), rtol=1e-12, atol=1e-12)
    with differentiated(composed=False, frozen=None, forward=False):
        assert "_Rectified" in type(functional.relu(a.clone().requires_grad_()).grad_fn).__name__
        assert functional.relu(a, True) is a
    assert (a >= 0).all()


class Hyper(nn.Module):
    """Its convolution's weight and its BatchNorm's γ are functions of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(16, 18)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean((0, 1)).flatten())
        y = functional.conv2d(x, weight.view(1, 2, 3, 3), padding=1)
        return functional.batch_norm(y, None, None, weight[:1], None, training=True).flatten(1)


@pytest.mark.parametrize("way", ["vjp", "forward", "reverse"])
def test_a_weight_made_from_the_input(way):
    torch.manual_seed(0)
    module, x = Hyper().double(), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    v = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    u = torch.randn(3, 16, dtype=torch.float64)
    if way == "vjp":
        product = (vjp_products(module, x, u[None]).products[0] * v).sum()
    else:
        product = (jvp_products(module, x, v[None], engine=way).products[0] * u).sum()
    step = 1e-6
    with torch.no_grad():
        expected = ((module(x + step * v) - module(x - step * v)) * u).sum() / (2 * step)
    torch.testing.assert_close(product.detach(), expected, rtol=1e-7, atol=1e-9)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ["vjp", "forward"])
def test_channels_last_and_autocast(way, training):
    module = network().train(training)
    x, v = torch.randn(4, 3, 8, 8), torch.randn(1, 4, *((4,) if way == "vjp" else (3, 8, 8)))

    def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
        result = vjp_products(module, x, v) if way == "vjp" else jvp_products(module, x, v, engine="forward")
        loss = result.products.float().square().sum()
        flat = [g.flatten() for g in torch.autograd.grad(loss, module.parameters(), allow_unused=True) if g is not None]
        return result.products.detach().float(), torch.cat(flat)

    expected = gradients(x)
    torch.testing.assert_close(gradients(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(x)
    for mine, right in zip(rounded, expected, strict=True):
        assert (mine - right).norm() <= 0.1 * right.norm()


def test_transforms_of_torch_around_a_product():
    """vmap over samples and an outer forward derivative by a parameter pass through the rules."""
    module = network().double().eval()
    x, v = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    expected = jvp_products(module, x, v[None], engine="forward").products[0]

    def one(x: Tensor, v: Tensor) -> Tensor:
        return jvp_products(module, x[None], v[None, None], engine="forward").products[0, 0]

    torch.testing.assert_close(torch.func.vmap(one)(x, v), expected, rtol=1e-9, atol=1e-9)
