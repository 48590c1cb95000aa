"""What is left when the term of a statement is taken away: measured, and its leading order by theory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.jacobian import jacobian
from jacmatch_research.reproduce.noise_statements import Setting, Statement, laplacian_of
from jacmatch_research.reproduce.shallow_pairs import Location

ROUNDING = 5e-9
"""Relative error of the quadrature, at most."""
_CHUNK = 24  # points at once
_NOTHING = 1e-9  # relative size of a coefficient that counts as zero


@dataclass(frozen=True)
class Leading:
    """The leading order of an expansion error by theory, `coefficient` · σ^`order`; None if the statement is exact."""

    order: int | None
    coefficient: float


def expansion_error(statement: Statement, location: Location, sigma: float, *, fine: bool = False) -> float:
    """Mean over the points of what noise adds, less σ² times the term."""
    total = 0.0
    for rows in torch.split(torch.arange(len(location.x)), _CHUNK):
        at = _setting(statement, location, location.x[rows])
        added = statement.increase(at, location.nodes(at.x, sigma, fine=fine), sigma)
        total += float(location.weights[rows] @ (added - sigma**2 * statement.term(at)).detach())
    return total


def size_of_term(statement: Statement, location: Location) -> float:
    """Mean over the points of the term's magnitude, the coefficient of σ²."""
    return float(location.weights @ statement.term(_setting(statement, location, location.x)).abs())


def leading(statement: Statement, location: Location) -> Leading:
    """The order and the coefficient of the expansion error's first term that is not zero.

    With g the loss, E g(x+ξ) = g + σ²/2 Δg + σ⁴/8 ΔΔg + …; a kink adds σ²/2 times the jump of g's derivative across it
    times the density of points, and to a point that lies on it σ/√(2π) times the jump.
    """
    at = _setting(statement, location, location.x)
    scale = size_of_term(statement, location)
    jumps, logit_jumps = _jumps(statement, location)
    if location.kinks is not None and location.side is not None and float(jumps.abs().max()) > _NOTHING * scale:
        return Leading(1, float(jumps.sum()) / math.sqrt(2 * math.pi))
    if location.side is None:
        second = float(location.weights @ _second_order(statement, at))
        if location.kinks is not None:
            second += float(location.kinks.density @ jumps) / 2
        if abs(second) > _NOTHING * scale:
            return Leading(2, second)
    if location.kinks is not None:
        assert statement.at_kinks is not None, statement.name
        average, on_it = statement.at_kinks
        factor, order = (average, 3) if location.side is None else (on_it, 2)
        coefficient = factor * float(location.kinks.density @ logit_jumps)
        return Leading(order, coefficient) if factor else Leading(None, 0.0)
    fourth = float(location.weights @ _fourth_order(statement, at))
    return Leading(4, fourth) if abs(fourth) > _NOTHING * scale else Leading(None, 0.0)


def _setting(statement: Statement, location: Location, x: Float[Tensor, "point 2"]) -> Setting:
    at = Setting.at(location, x)
    return at.agreeing() if statement.agreeing else at


def _second_order(statement: Statement, at: Setting) -> Float[Tensor, "point"]:
    """½ Δg less the term."""
    if statement.loss is None:
        return torch.zeros(len(at.x), dtype=at.x.dtype)
    return at.laplacians(_loss_at(statement, at))[:, 0] / 2 - statement.term(at)


def _fourth_order(statement: Statement, at: Setting) -> Float[Tensor, "point"]:
    """⅛ ΔΔg, or the same of a form that is no mean of one loss."""
    if statement.fourth is not None:
        return statement.fourth(at)
    return at.laplacians(laplacian_of(_loss_at(statement, at)))[:, 0] / 8


def _loss_at(statement: Statement, at: Setting) -> Callable[[Tensor], Tensor]:
    assert statement.loss is not None
    loss = statement.loss
    return lambda x: loss(at, x[:, None])


def _jumps(statement: Statement, location: Location) -> tuple[Float[Tensor, "kink"], Float[Tensor, "kink"]]:
    """Jumps of derivatives at each kink: of the loss, and of the difference of logits, squared in the metric."""
    if location.kinks is None:
        nothing = torch.zeros(0, dtype=location.x.dtype)
        return nothing, nothing
    at = _setting(statement, location, location.kinks.points)
    normals = location.kinks.normals

    def jump(function: Callable[[Tensor], Tensor]) -> Tensor:
        over, before = (jacobian(function, at.x + sign * 1e-7 * normals)[1] for sign in (1, -1))
        return ((over - before) * normals[:, None]).sum(2).detach()

    jumps = jump(lambda x: at.student(x) - at.teacher(x))
    own = (
        torch.zeros(len(normals), dtype=location.x.dtype)
        if statement.loss is None
        else jump(_loss_at(statement, at))[:, 0]
    )
    # a derivative that is continuous differs by 10⁻⁷ as well
    return torch.where(own.abs() > 1e-5, own, 0.0), statement.metric(at, jumps)


def order_of(sigmas: Sequence[float], errors: Sequence[float], term: float) -> float | None:
    """The order of convergence, d log |error| / d log σ at the three smallest σ; None if the statement is exact.

    `sigmas` descend. An expansion error of less than `ROUNDING` of the term, the coefficient of σ², is the
    quadrature's.
    """
    points = [(s, r) for s, r in zip(sigmas, errors, strict=True) if abs(r) > ROUNDING * term * s**2][-3:]
    if len(points) < 2:
        return None
    x, y = [math.log(s) for s, _ in points], [math.log(abs(r)) for _, r in points]
    return float(np.polyfit(x, y, 1)[0])


def limit(sigmas: Sequence[float], errors: Sequence[float], order: int, following: int) -> float:
    """The coefficient of σ^`order`, from the two smallest σ, when the next order is `following`."""
    (coarse, far), (fine, near) = ((s, r / s**order) for s, r in list(zip(sigmas, errors, strict=True))[-2:])
    ratio = (coarse / fine) ** (following - order)
    return (ratio * near - far) / (ratio - 1)
