"""Derivatives from values alone: antithetic differences, for black boxes and as references of the engines.

Jv ≈ (f(x + hv) − f(x − hv)) / 2h. The truncation error is h² f‴/6, the rounding error ε|f|/h.
`relative_step` balances them; `derivative_along` compares two steps to estimate the remaining error.

A `Reference` is computed in float64 where possible. Only float64 allows steps so small that no ReLU of a large network
switches within a step: there the derivative jumps, and a difference across the jump does not approximate it.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian.arguments import Arguments
from jacmatch.jacobian.callables import (
    copy_in,
    layers_of,
    preserved_attributes,
    preserved_state,
    seed_generators,
    tensors_of,
)
from jacmatch.jacobian.function import Function, Products, Widened, replayed
from jacmatch.jacobian.modules import Module, twice_differentiable
from jacmatch.jacobian.readouts import Context, Logits

TOLERANCE = 0.02
"""Relative error above which an engine is wrong without further evidence. Rounding in float32 stays below 10⁻³."""

STRICT = 1e-4
"""Relative error up to which an engine is right beyond doubt, compared with one difference in float64."""

SMALLEST_STEP = 1e-9
"""The smallest step in float64, relative to the size of what moves: it spans very few kinks."""

_UNCERTAIN = 0.2
"""Relative error above which a difference is not a reference."""


def relative_step(dtype: torch.dtype) -> float:
    """Return ε^⅓, the step relative to the size of the input that balances truncation and rounding in this type."""
    return float(torch.finfo(dtype).eps ** (1 / 3))


def step_sizes(
    x: Float[Tensor, "batch *input"], tangents: Float[Tensor, "probe batch *input"]
) -> Float[Tensor, "probe batch"]:
    """Return the step h for each direction and sample: h · rms(v) = ε^⅓ · rms(x), ε the machine precision of x's type.

    ε^⅓ balances truncation h² against rounding ε/h. It is 5·10⁻³ in float32 (relative error at least about 10⁻⁵)
    and 6·10⁻⁶ in float64. A sample of zeros is assumed to have scale 1.
    """
    scale = x.reshape(len(x), -1).square().mean(1).sqrt()
    length = tangents.reshape(*tangents.shape[:2], -1).square().mean(2).sqrt()
    one = torch.ones((), dtype=x.dtype, device=x.device)
    steps: Tensor = relative_step(x.dtype) * torch.where(scale > 0, scale, one) / torch.where(length > 0, length, one)
    return steps


def central(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *input"],
    tangents: Float[Tensor, "probe batch *input"],
    *,
    step: float | Float[Tensor, "probe batch"] | None = None,
) -> Float[Tensor, "probe batch *row"]:
    """Return Jv for each direction v, by one antithetic pair of values: (f(x + hv) − f(x − hv)) / 2h.

    With Gaussian v and a given h = σ this is the antithetic noise pair, whose mean square is ‖J‖²_F + O(σ²).

    References:
        Bishop 1995, "Training with noise is equivalent to Tikhonov regularization"; Srinivas & Fleuret 2018,
        arXiv:1803.00443, proposition 1, in its corrected (antithetic) form.
    """
    if isinstance(step, float | int):
        if step <= 0 or not math.isfinite(step):
            raise InputError("`step` of a difference must be a positive number.", got=step)
        h = torch.full(tangents.shape[:2], float(step), dtype=x.dtype, device=x.device)
    else:
        h = step_sizes(x, tangents) if step is None else step
    products = []
    for v, size in zip(tangents, h, strict=True):
        move = v * _like(size, v)
        difference = function(x + move) - function(x - move)
        products.append(difference / (2 * _like(size, difference)))
    return torch.stack(products)


def derivative_along(
    values_at: Callable[[float], Tensor],
    fine: bool,
    dtype: torch.dtype,
    expected: float | None = None,
    steps: tuple[float, ...] = (SMALLEST_STEP, 1e-7, 1e-5),
    here: Tensor | None = None,
    close: float = STRICT,
) -> tuple[Tensor, float]:
    """Return d/dt of the values at t = 0, and its relative error.

    Two steps are compared: first the smallest, which rarely span a kink, then larger ones if rounding errors dominate.

    A derivative that agrees with `expected` up to `close` is returned without further steps. `here` has the values at
    t = 0, with which one more evaluation can suffice.
    """

    def agrees(difference: Tensor) -> bool:
        return expected is not None and abs(float(difference) - expected) < close * abs(expected)

    if here is not None and fine:
        one_sided = (values_at(steps[0]) - here) / steps[0]
        if agrees(one_sided):
            return one_sided, close / 10
    best, error = torch.zeros(()), math.inf
    coarse = max(relative_step(dtype), relative_step(torch.float32))
    for h in steps if fine else (coarse, 4 * coarse):
        near = (values_at(h) - values_at(-h)) / (2 * h)
        if agrees(near):
            return near, close / 10
        far = (values_at(2 * h) - values_at(-2 * h)) / (4 * h)
        change = relative_difference(near, far) if near.any() else 1.0
        if change < error:
            best, error = (4 * near - far) / 3, change
        if error < (STRICT if fine else TOLERANCE) / 10:
            break
    return best, error


def tolerance_for(error: float, fine: bool) -> float:
    """Return the relative error above which a result is wrong, given that of the reference; may be infinite."""
    if error >= _UNCERTAIN:
        return math.inf
    if not fine:
        return max(5 * TOLERANCE, 3 * error)
    return max(STRICT, min(10 * error, TOLERANCE), 3 * error)


def relative_difference(got: Tensor, truth: Tensor) -> float:
    """Return ‖got − truth‖ ÷ ‖truth‖."""
    return float((got - truth).norm() / truth.norm().clamp(min=1e-30))


def size_of_sum(parts: Tensor) -> float:
    """Return the size of a sum: its absolute value, or the size without cancellation, whichever is larger."""
    return max(float(parts.sum().abs()), float(parts.norm()), 1e-30)


def _like(size: Float[Tensor, "batch"], x: Float[Tensor, "batch *any"]) -> Tensor:
    return size.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


EngineRun: TypeAlias = Callable[[Function, Tensor], Products]
"""One engine with its directions."""

SEED = 0

_LARGE = 50_000_000
"""Elements of parameters, buffers and captured tensors above which no copy in float64 is made."""


@dataclass(frozen=True)
class Reference:
    """Jv by differences, the function it belongs to, and its uncertainty."""

    function: Function
    """A copy, in float64 where possible."""
    x: Tensor
    fine: bool
    """Whether the function computes in float64 throughout."""
    tangents: Tensor
    values: Tensor
    products: Tensor
    rows: Tensor
    uncertainty: float
    moves: bool
    """Whether the values depend on the input, beyond rounding."""
    single: bool = False
    """Whether it is a single difference with the smallest step. It can show that an engine is right, but not that one
    is wrong."""

    @staticmethod
    def of(
        function: Function, x: Tensor, generator: torch.Generator, *, count: int = 1, single: bool = False
    ) -> "Reference":
        """Return the reference for this function at x, in float64 where possible, for `count` directions.

        All are multiples of one direction, so that a single difference gives the products of all.
        """
        generator = generator.clone_state()
        scale = float(x.double().square().mean().sqrt()) or 1.0
        direction = torch.randn(x.shape, generator=generator, device="cpu").to(x.device, torch.float64) * scale
        with torch.no_grad():
            exact, z, values_at, values = evaluated(function, x)
            whole = z.dtype == torch.float64 and _is_resolved(values_at, z, direction)
            fine = single or (whole and _is_fine(values_at, z, values, direction))
            if not fine and z.dtype == torch.float64:
                with suppress(Exception):  # a module may need the lower precision
                    wide = replace(exact, widened=True)
                    wide_at = replayed_values(wide, z)
                    there = wide_at(z)
                    if fine := _is_resolved(wide_at, z, direction) and _is_fine(wide_at, z, there, direction):
                        exact, values_at, values = wide, wide_at, there
            if not fine and z.dtype != x.dtype:
                exact, z, values_at, values = evaluated(function, x, exactly=False)
            direction = direction.to(z.dtype)
            if single:
                products, error = (values_at(z + SMALLEST_STEP * direction) - values) / SMALLEST_STEP, 0.0
            else:
                products, error = derivative_along(lambda t: values_at(z + t * direction), fine, z.dtype)
        rows = torch.randn((1, *values.shape), generator=generator, device="cpu").to(z)
        factors = torch.tensor([1.0, -0.5], dtype=z.dtype, device=z.device)[: min(count, 2)]
        tangents, several = (factors.view(-1, *[1] * y.dim()) * y for y in (direction, products))
        least = 1e-8 if fine else 10 * torch.finfo(z.dtype).eps
        moves = (whole or not single) and float(products.detach().abs().max()) > least * float(values.abs().max())
        return Reference(exact, z, fine, tangents, values, several, rows, error, moves, single)

    def for_values_of(self, engine: EngineRun) -> "Reference":
        """Return the reference for an engine that draws other random numbers: differences of its own values."""
        with torch.no_grad(), preserved_state(self.function.module):
            v = self.tangents[0]
            products, error = derivative_along(
                lambda t: engine(self.function, self.x + t * v).values, self.fine, self.x.dtype
            )
        factors = torch.tensor([1.0, -0.5], dtype=v.dtype, device=v.device)[: len(self.tangents)]
        return replace(self, products=factors.view(-1, *[1] * products.dim()) * products, uncertainty=error)

    @cached_property
    def coupled(self) -> bool:
        """Whether samples depend on each other, so that only sums over the batch can be compared."""
        with torch.no_grad():
            seed_generators(SEED, self.x.device)
            return couples(replayed_values(self.function, self.x), self.x, self.values, 1e-9 if self.fine else 1e-4)

    @cached_property
    def repeats(self) -> bool:
        """Whether two calls at x agree; not so if random numbers are drawn from a generator that is not global."""
        with torch.no_grad():
            values_at = replayed_values(self.function, self.x)
            return relative_difference(values_at(self.x), values_at(self.x)) <= (1e-12 if self.fine else 1e-6)

    @property
    def tolerance(self) -> float:
        """The error above which an engine is wrong; infinite where the differences are too inaccurate."""
        return STRICT if self.single else tolerance_for(self.uncertainty, self.fine)

    def cotangents(self, z: Tensor) -> Tensor:
        """Return the cotangents u of uᵀJv, in the type of z.

        They require gradients, so that a backward marked `once_differentiable` shows in the graph even where no other
        argument of it does.
        """
        return self.rows.to(z.dtype, copy=True).requires_grad_()

    def error(self, products: Tensor, *, of_rows: bool) -> float:
        """Return the error of the products relative to the size of the reference.

        Jv is compared directly, and rows vᵀJ by uᵀJv: for each sample, or for the whole batch if samples are coupled.
        The parts of uᵀJv may cancel, so its error is relative to their size.
        """
        products = products.detach().to(self.tangents.dtype)
        if not of_rows:
            return relative_difference(products, self.products)
        parts = (self.products[:1] * self.rows).reshape(1, len(self.rows[0]), -1)
        difference = (products * self.tangents[:1]).reshape(1, len(self.x), -1).sum(2) - parts.sum(2)
        error = float(difference.norm()) / max(float(parts.sum(2).norm()), float(parts.norm()), 1e-30)
        if error > self.tolerance and (self.single or self.coupled):
            error = float(difference.sum().abs()) / size_of_sum(parts)
        return error


def plain(module: Module, arguments: Arguments | None = None) -> Function:
    """Return the outputs of the module as a function."""
    return Function(module, Logits(), Context(arguments=arguments), (), "batch")


def replayed_values(function: Function, z: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the values as a function of the input, with the same random numbers and statistics in each call."""
    values_at = replayed(function, z)
    statistics: list[tuple[Tensor, Tensor]] = []

    def called(x: Tensor) -> Tensor:
        with (
            preserved_attributes(function.module),
            twice_differentiable(function.module, function.batch_norm, statistics=True) as frozen,
        ):
            if frozen is None:
                return values_at(x).detach()
            if not statistics:
                values = values_at(x).detach()
                statistics.extend(frozen)
                return values
            frozen.extend(statistics)
            return frozen.replayed(values_at)(x).detach()

    if function.batch_norm == "frozen":
        called(z)
    return called


def exact_copy(function: Function, x: Tensor) -> tuple[Function, Tensor]:
    """Return a copy of the function and x in float64; a copy in their own type if that is not possible."""
    if _size(function) > _LARGE:
        return function, x
    try:
        exact = replace(
            function,
            module=copy_in(function.module, torch.float64),
            readout=copy_in(function.readout, torch.float64),
            context=function.context.to(torch.float64),
        )
    except Exception:  # `deepcopy` raises whatever the contents raise
        return own_copy(function), x
    return exact, x.double()


def evaluated(
    function: Function, x: Tensor, *, exactly: bool = True
) -> tuple[Function, Tensor, Callable[[Tensor], Tensor], Tensor]:
    """Return a copy of the function, in float64 where it runs, its x, its values as a function of x, and those at x."""
    copied, z = exact_copy(function, x) if exactly else (own_copy(function), x)
    seed_generators(SEED, x.device)
    try:
        values_at = replayed_values(copied, z)
        values = values_at(z)
        if not exactly or values.dtype == z.dtype:
            return copied, z, values_at, values
    except Exception:  # the module contains float32, and may raise anything
        if not exactly:
            raise
    return evaluated(function, x, exactly=False)


def own_copy(function: Function) -> Function:
    """Return a copy of the same dtype; the function itself if it is very large or cannot be copied."""
    if _size(function) > _LARGE:
        return function
    try:
        return replace(function, module=copy_in(function.module, None), readout=copy_in(function.readout, None))
    except Exception:  # `deepcopy` raises whatever the contents raise
        return function


def couples(values_at: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Return whether the values of a sample change when another sample changes; y are the values at x.

    Half of the samples are changed and the others compared, once for each binary digit of the sample number, so that
    any two samples are in different halves at least once.
    """
    if len(x) < 2:
        return False
    number = torch.arange(len(x), device=x.device)
    ones = [number.bitwise_right_shift(digit) % 2 == 1 for digit in range((len(x) - 1).bit_length())]
    # values in another order stay in an interval, and a matrix that is multiplied by a number stays positive definite
    for elsewhere in (x.flip(0) * 1.1 + 0.1 * (float(x.std()) or 1.0), x.flip(0), x * 1.01):
        with suppress(RuntimeError, ValueError):
            changes = [
                (values_at(torch.where(moved.view(-1, *[1] * (x.dim() - 1)), elsewhere, x)) - y)[~moved]
                for each in ones
                for moved in (each, ~each)
            ]
            if torch.isfinite(torch.cat(changes)).all():
                return bool(torch.cat(changes).abs().max() > tolerance * y.abs().max() + 1e-12)
    raise UnsupportedError("The function is not defined near x, so it is unknown whether samples depend on each other.")


def _size(function: Function) -> int:
    layers = layers_of(function.module)
    own = [each for layer in layers for each in (*layer._parameters.values(), *layer._buffers.values())]
    return sum(each.numel() for each in (*own, *tensors_of(function.module)) if each is not None)


def _is_resolved(values_at: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> bool:
    """Return whether a tiny step moves all that a larger one moves: not so if a part is computed in float32.

    That part is constant within the tiny step, and an engine that leaves out its derivative would seem to be right.
    """
    precision = Widened()  # type: ignore[no-untyped-call]
    with suppress(Exception), precision:  # some operations allow no such mode
        values_at(x)
        if not precision.seen:
            return True
    near, far = ((values_at(x + h * direction) - values_at(x - h * direction)) / (2 * h) for h in (1e-9, 1e-4))
    return bool(near.any()) and relative_difference(near, far) <= TOLERANCE


def _is_fine(values_at: Callable[[Tensor], Tensor], x: Tensor, here: Tensor, direction: Tensor) -> bool:
    """Return whether values resolve changes below float32 precision; not so if a module casts to float32 inside."""
    if x.dtype != torch.float64:
        return False
    moved = values_at(x + 1e-6 * direction) != here
    for h, rounding in ((1e-11, 0.1), (1e-9, 0.02)):
        once, twice = (values_at(x + t * direction) - here for t in (h, 2 * h))
        even = (twice != 0) & ((twice - 2 * once).abs() <= rounding * twice.abs())
        if int((even & moved).sum()) * 2 >= int(moved.sum()):
            return True
    return False
