"""Operators whose derivative PyTorch lacks or has wrong: right to the third order, however they are called."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from jacmatch import UnsupportedError, jvp, vjp
from jacmatch.jacobian import vjp_products
from jacmatch.jacobian.modules import twice_differentiable
from jacmatch.jacobian.rules.aten_kernels import KERNELS

aten = torch.ops.aten


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)


X, SQUARE = randn(2, 3, 4), randn(2, 3, 3, seed=1)
OTHER = randn(2, 3, 4, seed=9)
ZERO = torch.cat([X[:, :1], 0 * X[:, 1:2], X[:, 2:]], 1)
FAR = torch.tensor([[1000.0, 1.0, 950.0], [-800.0, 0.0, 0.1]], dtype=torch.float64)
GAMMA = randn(3, seed=2)
INTEGERS = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
SINGULAR = torch.stack([INTEGERS.mT @ INTEGERS, torch.eye(3, dtype=torch.float64)])  # one of them
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "native_layer_norm": (lambda x: torch.native_layer_norm(x, (4,), GAMMA[:1].expand(4), None, 1e-5)[0], X),
    "its statistics": (lambda x: torch.cat(torch.native_layer_norm(x, (4,), None, None, 1e-5)[1:], 1), X),
    "aten.layer_norm": (lambda x: aten.layer_norm(x, (4,)), X),
    "aten.layer_norm.default": (lambda x: aten.layer_norm.default(x, [3, 4]), X),
    "torch.batch_norm": (lambda x: torch.batch_norm(x, GAMMA, None, None, None, True, 0.1, 1e-5, False), X),
    "aten.native_batch_norm": (lambda x: aten.native_batch_norm(x, GAMMA, GAMMA, None, None, True, 0.1, 1e-5)[0], X),
    "_native_batch_norm_legit.no_stats": (
        lambda x: aten._native_batch_norm_legit.no_stats(x, GAMMA, None, True, 0.1, 1e-5)[0],
        X,
    ),
    "batch_norm in evaluation": (lambda x: aten.batch_norm(x, None, None, GAMMA, GAMMA**2, False, 0.1, 1e-5, False), X),
    "torch.instance_norm": (lambda x: torch.instance_norm(x, GAMMA, None, None, None, True, 0.1, 1e-5, False), X),
    "group_norm": (lambda x: functional.group_norm(x, 3), X),
    "cholesky_inverse": (lambda x: torch.cholesky_inverse(x + 3 * torch.eye(3)), SQUARE),
    "cholesky_inverse, upper": (lambda x: torch.cholesky_inverse(x + 3 * torch.eye(3), upper=True), SQUARE),
    "cholesky_solve": (lambda x: torch.cholesky_solve(X, x + 3 * torch.eye(3)), SQUARE),
    "cholesky_solve, upper": (lambda x: torch.cholesky_solve(x @ X, x + 3 * torch.eye(3), upper=True), SQUARE),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, 1), X),
    "logcumsumexp of numbers far apart": (lambda x: x.logcumsumexp(1), FAR),
    "logcumsumexp of complex numbers": (lambda x: torch.complex(x, x.sin()).logcumsumexp(1).abs(), X),
    "logaddexp of numbers far apart": (lambda x: torch.logaddexp(x, -3 * x), FAR),
    "sinc": (torch.sinc, X),
    "cumprod": (lambda x: torch.cumprod(x, 2), X),
    "cumprod with a factor of zero": (lambda x: torch.cumprod(x, 1), ZERO),
    "glu": (lambda x: functional.glu(x, 2), X),
    "hardsigmoid": (lambda x: functional.hardsigmoid(4 * x), X),
    "hardswish": (functional.hardswish, X),
    "mish": (functional.mish, X),
    "mish of large numbers": (functional.mish, FAR),
    "cdist": (lambda x: torch.cdist(x, OTHER), X),
    "cdist, p = 1": (lambda x: torch.cdist(x, OTHER, p=1.0), X),
    "cdist, p = 3": (lambda x: torch.cdist(x, OTHER, p=3.0), X),
    "cdist, p = inf": (lambda x: torch.cdist(x, OTHER, p=float("inf")), X),
    "cdist of many rows": (lambda x: torch.cdist(x.flatten(0, 1).repeat(5, 1), X[0] + 1), X),
    "pdist": (lambda x: torch.stack([functional.pdist(each) for each in x]), X),
    "det": (torch.linalg.det, SQUARE),
    "det of singular matrices": (torch.linalg.det, SINGULAR),
    "det of complex singular matrices": (lambda x: torch.linalg.det(torch.complex(x, 2 * x)).abs().square(), SINGULAR),
    "slogdet": (lambda x: torch.slogdet(x)[1], SQUARE),
    "logdet": (lambda x: torch.logdet(square(x)), SQUARE),
    "solve": (lambda x: torch.linalg.solve(x, X), SQUARE),
    "solve from the right": (lambda x: torch.linalg.solve(x, X.mT, left=False), SQUARE),
    "solve with a vector": (lambda x: torch.linalg.solve(x, X[:, :, 0]), SQUARE),
    "householder_product": (lambda x: torch.linalg.householder_product(x, X[:, 0, :3]), SQUARE),
    "x *= x": (lambda x: _multiplied(x, lambda h: h), X),
    "in-place swish": (lambda x: _multiplied(x, torch.sigmoid), X),
    "hardswish in place, as a statement": (lambda x: _stated(x, functional.hardswish), X),
    "mish in place, as a statement": (lambda x: _stated(x, functional.mish), FAR),
    "hardsigmoid in place, as a statement": (lambda x: _stated(x, functional.hardsigmoid), X),
}


def _multiplied(x: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    h = x * 2
    h *= factor(h)
    return h


def _stated(x: Tensor, activation: Callable[..., Tensor]) -> Tensor:
    h = x * 2
    activation(h, inplace=True)
    return h


def rows(y: Tensor) -> Tensor:
    """As outputs (batch, out) of the two samples that there are in each call."""
    return y.reshape(2, -1)


def replaced(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with twice_differentiable(function):
            return function(x)

    return call


@pytest.mark.parametrize("name", CALLS)
def test_values_are_those_of_torch(name):
    function, x = CALLS[name]
    torch.testing.assert_close(replaced(function)(x), function(x.clone()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives_in_both_modes(name):
    function, x = CALLS[name]
    x = x.clone().requires_grad_()
    assert gradcheck(replaced(function), x, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(replaced(function), x, fast_mode=True)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.ci
def test_third_derivatives(name):
    """That of a product by the reverse engine with respect to a parameter is one."""
    function, x = CALLS[name]
    v = randn(*x.shape, seed=3)

    def product(scale: Tensor) -> Tensor:
        return jvp(lambda z: rows(function(z * scale)), x, v, engine="reverse")[1]

    scale = (1 + 0.1 * randn(*x.shape, seed=4)).requires_grad_()
    assert gradcheck(product, scale, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"in-place swish"}))  # forward mode overwrites a tangent there
def test_forward_and_reverse_give_one_parameter_gradient(name):
    function, x = CALLS[name]
    v, gradients = randn(*x.shape, seed=3), []
    for engine in ("forward", "reverse"):
        scale = torch.ones_like(x).requires_grad_()
        _, products = jvp(lambda z, scale=scale: rows(function(z * scale)), x, v, engine=engine)
        gradients.append(torch.autograd.grad(products.square().sum(), scale)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_directions_are_mapped():
    v = randn(3, *SQUARE.shape, seed=3)
    for name in ("solve", "slogdet", "cholesky_inverse", "householder_product"):
        function = CALLS[name][0]
        several = jvp(lambda z, function=function: rows(function(z)), SQUARE, v)[1]
        for one, expected in zip(v, several, strict=True):
            single = jvp(lambda z, function=function: rows(function(z)), SQUARE, one)[1]
            torch.testing.assert_close(single, expected)


class Normalized(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), norm, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def graphs(network: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "scripted": torch.jit.script(network),
            "traced": torch.jit.trace(network, x, check_trace=False),
            "exported": torch.export.export(network, (x,)).module(),
        }


@pytest.mark.ci
@pytest.mark.parametrize("policy", ["batch", "frozen"])
@pytest.mark.parametrize("engine", ["forward", "reverse", "rows"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.LayerNorm(6)])
def test_other_executors_follow_the_rules_too(norm, engine, policy, as_users_run):
    """TorchScript and exported graphs give the products of the Python module, and their parameter gradients."""
    network, x, v = Normalized(norm).double().train(), randn(7, 3), randn(7, 3, seed=1)
    u = randn(7, 2, seed=2)

    def products(module: nn.Module) -> Tensor:
        if engine == "rows":
            return vjp_products(module, x, u[None], batch_norm=policy).products
        return jvp(module, x, v, engine=engine, batch_norm=policy)[1]

    expected = products(network)
    gradient = torch.autograd.grad(expected.square().sum(), network.first.weight)[0]
    for module in graphs(network, x).values():
        for _ in range(3):  # TorchScript's executor changes what it does from the second call on
            try:
                results = products(module)
            except UnsupportedError:  # forward mode needs copies of buffers, which TorchScript does not take
                assert engine == "forward"
                assert isinstance(module, torch.jit.ScriptModule)
                break
            torch.testing.assert_close(results, expected)
            weight = dict(module.named_parameters())["first.weight"]
            torch.testing.assert_close(torch.autograd.grad(results.square().sum(), weight)[0], gradient)


def test_nothing_stays_registered():
    x = X.clone().requires_grad_()
    vjp(lambda z: functional.hardswish(z).flatten(1), X, X.flatten(1))
    assert type(functional.hardswish(x).grad_fn).__name__ == "HardswishBackward0"
    with twice_differentiable(functional.hardswish):
        with twice_differentiable(functional.hardswish):
            pass
        assert type(functional.hardswish(x).grad_fn).__name__ != "HardswishBackward0"
    assert type(functional.hardswish(x).grad_fn).__name__ == "HardswishBackward0"


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_take_the_arguments_of_their_operators(name):
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(aten, packet), overload or "default")._schema
    assert schema.name == f"aten::{packet}"


@pytest.mark.parametrize("x", [0.0, 1e-20, 1e-8, 0.31, 0.32])
def test_sinc_has_a_second_derivative_near_zero(x):
    """PyTorch's is 0 at 1e-20, -5.2 at 1e-8 and NaN at 0."""
    u = np.linspace(0, 1, 20_001)  # sinc(x) is the integral of cos(pi x u) over u from 0 to 1
    exact = np.trapezoid(-((np.pi * u) ** 2) * np.cos(np.pi * x * u), u)
    b = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    given = torch.full((1, 1), x, dtype=torch.float64)
    for product in (jvp, vjp):
        derivative = product(lambda z: torch.sinc(z + b), given, torch.ones_like(given))[1]
        assert torch.autograd.grad(derivative.sum(), b)[0].item() == pytest.approx(exact, rel=1e-6)
