"""Smooth functions of two inputs, their exact derivatives, and exact means under Gaussian noise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

Function = Callable[[Tensor], Tensor]
SIGMAS = (0.05, 0.025, 0.0125)


def network(seed: int, outputs: int = 3, width: int = 6) -> Function:
    """A random V tanh(Wx + b) + c on the plane, which takes (2,) or (nodes, 2)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, b, v, c = draw(width, 2), draw(width), draw(outputs, width) / 2, draw(outputs)
    return lambda x: torch.tanh(x @ w.T + b) @ v.T + c


def difference(f: Function, g: Function) -> Function:
    return lambda x: f(x) - g(x)


def softmax_of(f: Function) -> Function:
    return lambda x: f(x).softmax(-1)


def log_softmax_of(f: Function) -> Function:
    return lambda x: f(x).log_softmax(-1)


@dataclass(frozen=True)
class Derivatives:
    """Value (K,), rows of the Jacobian (K, 2), Laplacians (K,), ‖Hessian‖² (K,) and ∇f·∇Δf (K,) at one point."""

    value: Tensor
    rows: Tensor
    laplacian: Tensor
    hessian_squared: Tensor
    third: Tensor


def derivatives(f: Function, x: Tensor) -> Derivatives:
    def laplacian(y: Tensor, i: int) -> Tensor:
        return torch.trace(jacrev(grad(lambda z: f(z)[i]))(y))

    value = f(x)
    rows, second = jacrev(f)(x), jacrev(jacrev(f))(x)
    gradients = torch.stack([grad(laplacian)(x, i) for i in range(len(value))])
    return Derivatives(
        value,
        rows,
        torch.stack([torch.trace(h) for h in second]),
        second.square().sum((1, 2)),
        (rows * gradients).sum(1),
    )


def quadrature(count: int) -> tuple[Tensor, Tensor]:
    """Nodes (count², 2) and weights (count²,) of Gauss–Hermite quadrature for a standard normal in the plane."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    return torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).flatten()


NODES, WEIGHTS = quadrature(32)


def mean_over_noise(loss: Callable[[Tensor], Tensor], x: Tensor, sigma: float) -> float:
    """E loss(x + ξ) for ξ ~ N(0, σ²I), where loss takes (nodes, 2) to (nodes,)."""
    return float(WEIGHTS @ loss(x + sigma * NODES))


def orders(errors: list[float]) -> list[float]:
    """Orders of convergence: log₂ of the ratio of neighboring errors, each at half the sigma of the one before."""
    sizes = np.abs(np.array(errors))
    return list(np.log2(sizes[:-1] / sizes[1:]))


def rows_at(f: Function, points: Tensor) -> Tensor:
    """Rows of the Jacobian (points, K, 2)."""
    return vmap(jacrev(f))(points)
