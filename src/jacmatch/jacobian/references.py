"""What an engine is compared with: differences of values, in float64 where that can be had.

Only float64 allows steps that are so small that no ReLU of a large network switches within them: at a switch the slope
jumps, and a difference across the jump is no derivative.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from jacmatch.jacobian.function import Function, Products, replayed
from jacmatch.jacobian.modules import Module, preserved_buffers, twice_differentiable
from jacmatch.jacobian.readouts import Context, Logits

Trial: TypeAlias = Callable[[Function, Tensor], Products]
"""One engine with its directions."""

TOLERANCE = 0.02
"""Relative error above which an engine counts as wrong. Rounding in float32 mostly stays below 10⁻³."""

_ROUGH = 0.2
"""Uncertainty of a difference from which it is no reference."""

SEED = 0


@dataclass(frozen=True)
class Reference:
    """Jv by differences, the module it was taken from, and how far it can be trusted."""

    module: Module
    x: Tensor
    fine: bool
    """Whether the module computes in float64 all through."""
    tangents: Tensor
    values: Tensor
    products: Tensor
    rows: Tensor
    uncertainty: float
    moves: bool
    """Whether the outputs depend on the input, beyond rounding."""
    coupled: bool
    """Whether samples depend on each other, so that only sums over the batch can be compared."""

    @staticmethod
    def of(module: Module, x: Tensor, generator: torch.Generator, *, coupled: bool) -> "Reference":
        """The reference for this module at x, in float64 where it can be had."""
        scale = float(x.double().square().mean().sqrt()) or 1.0
        tangents = torch.randn((1, *x.shape), generator=generator).to(x.device, torch.float64) * scale
        exact, z = _in_float64(module, x)
        fine = _is_fine(exact, z, tangents)
        if not fine and z.dtype != x.dtype:
            exact, z = module, x
        tangents = tangents.to(z.dtype)
        with torch.no_grad(), twice_differentiable(exact, statistics=True):
            torch.manual_seed(SEED)
            values_at = replayed(plain(exact), z)
            values = values_at(z).detach()
            products, error = along(lambda t: values_at(z + t * tangents[0]), fine, z.dtype)
        rows = torch.randn((1, *values.shape), generator=generator).to(z)
        least = 1e-8 if fine else 10 * torch.finfo(z.dtype).eps
        moves = float(products.detach().abs().max()) > least * float(values.abs().max())
        return Reference(exact, z, fine, tangents, values, products[None], rows, error, moves, coupled)

    def of_the_values_of(self, trial: Trial) -> "Reference":
        """The reference for an engine that draws other random numbers: differences of its own values."""
        with torch.no_grad(), preserved_buffers(self.module):
            function, v = plain(self.module), self.tangents[0]
            products, error = along(lambda t: trial(function, self.x + t * v).values, self.fine, self.x.dtype)
        return replace(self, products=products[None], uncertainty=error)

    @property
    def tolerance(self) -> float:
        """The error above which an engine counts as wrong; infinite where the differences are too rough to tell."""
        return tolerance_for(self.uncertainty, self.fine)

    def cotangents(self, z: Tensor) -> Tensor:
        """U of uᵀJv, in the type of z.

        They ask for a gradient, so that a backward marked `once_differentiable` leaves its mark in the graph even where
        nothing else that it was given does.
        """
        return self.rows.to(z.dtype, copy=True).requires_grad_()

    def error(self, name: str, products: Tensor) -> float:
        """How far the products are from the reference, relative to its size.

        What engine and reference share is Jv, and for the reverse engine uᵀJv: of each sample, or of the batch where
        samples are coupled. The parts of uᵀJv may cancel, so its error is measured against their size.
        """
        products = products.detach().to(self.tangents.dtype)
        if name != "reverse":
            return relative_difference(products, self.products)
        parts = (self.products * self.rows).flatten(2)
        difference = (products * self.tangents).flatten(2).sum(2) - parts.sum(2)
        if self.coupled:
            return float(difference.sum().abs()) / size_of_sum(parts)
        return float(difference.norm()) / max(float(parts.sum(2).norm()), float(parts.norm()), 1e-30)


def plain(module: Module) -> Function:
    """The outputs of the module as a function."""
    return Function(module, Logits(), Context(), (), "batch")


def _in_float64(module: Module, x: Tensor) -> tuple[Module, Tensor]:
    """A copy of the module in float64 and x alike; themselves where that cannot be had."""
    if x.dtype == torch.float64:
        return module, x
    try:
        exact = copy.deepcopy(module).double() if isinstance(module, nn.Module) else module
        with torch.no_grad():
            values = replayed(plain(exact), x)(x.double())
        if values.dtype == torch.float64:
            return exact, x.double()
    except (RuntimeError, TypeError, NotImplementedError):
        pass  # the module has float32 built in, or cannot be copied
    return module, x


def _is_fine(module: Module, x: Tensor, tangents: Tensor) -> bool:
    """Whether values follow moves that are lost in float32, as a cast in the middle of a module would make it."""
    if x.dtype != torch.float64:
        return False
    with torch.no_grad():
        values_at = replayed(plain(module), x)
        here = values_at(x)
        moved = values_at(x + 1e-6 * tangents[0]) != here
        for h, rounding in ((1e-11, 0.1), (1e-9, 0.02)):
            once, twice = (values_at(x + t * tangents[0]) - here for t in (h, 2 * h))
            even = (twice != 0) & ((twice - 2 * once).abs() <= rounding * twice.abs())
            if int((even & moved).sum()) * 2 >= int(moved.sum()):
                return True
    return False


def along(
    values_at: Callable[[float], Tensor], fine: bool, dtype: torch.dtype, expected: float | None = None
) -> tuple[Tensor, float]:
    """d/dt of the values at t = 0, and its relative error.

    Two steps are compared, first the smallest, where no kink lies between, then larger ones if rounding spoils those.
    The first that is as expected is enough.
    """
    best, error = torch.zeros(()), math.inf
    coarse = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** (1 / 3)
    for h in (1e-9, 1e-7, 1e-5) if fine else (coarse, 4 * coarse):
        near = (values_at(h) - values_at(-h)) / (2 * h)
        if expected is not None and abs(float(near) - expected) < TOLERANCE / 10 * abs(expected):
            return near, TOLERANCE / 10
        far = (values_at(2 * h) - values_at(-2 * h)) / (4 * h)
        change = relative_difference(near, far) if near.any() else 1.0
        if change < error:
            best, error = (4 * near - far) / 3, change
        if error < TOLERANCE / 10:
            break
    return best, error


def tolerance_for(error: float, fine: bool) -> float:
    """The relative error above which something counts as wrong, for a reference with this error; infinite for none."""
    return max(TOLERANCE if fine else 5 * TOLERANCE, 3 * error) if error < _ROUGH else math.inf


def relative_difference(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ ÷ ‖truth‖."""
    return float((got - truth).norm() / truth.norm().clamp(min=1e-30))


def size_of_sum(parts: Tensor) -> float:
    """The size of a sum: its own, or what it would be without cancellation."""
    return max(float(parts.sum().abs()), float(parts.norm()), 1e-30)
