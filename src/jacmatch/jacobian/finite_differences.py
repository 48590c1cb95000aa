"""Derivatives from values alone: antithetic differences, for black boxes and for operators without derivatives.

Jv ≈ (f(x + hv) − f(x − hv)) / 2h. The truncation error is h² f‴/6, the rounding error ε|f|/h.
`relative_step` balances them; `derivative_along` compares two steps to estimate the remaining error.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError

TOLERANCE = 0.02
"""Relative error above which an engine is wrong without further evidence. Rounding in float32 stays below 10⁻³."""

STRICT = 1e-4
"""Relative error up to which an engine is right beyond doubt, compared with one difference in float64."""

SMALLEST_STEP = 1e-9
"""The smallest step in float64, relative to the size of what moves: hardly a kink lies within it."""

_UNCERTAIN = 0.2
"""Relative error above which a difference is no reference."""


def relative_step(dtype: torch.dtype) -> float:
    """Return ε^⅓, the step relative to the size of the input that balances truncation and rounding in this type."""
    return float(torch.finfo(dtype).eps ** (1 / 3))


def step_sizes(
    x: Float[Tensor, "batch *input"], tangents: Float[Tensor, "probe batch *input"]
) -> Float[Tensor, "probe batch"]:
    """Return the step h for each direction and sample: h · rms(v) = ε^⅓ · rms(x), ε the machine precision of x's type.

    ε^⅓ balances truncation h² against rounding ε/h. It is 5·10⁻³ in float32 (relative error at least about 10⁻⁵)
    and 6·10⁻⁶ in float64. A sample of zeros is assumed to have scale 1.

    Example:
        >>> step_sizes(torch.ones(2, 3), torch.ones(1, 2, 3)).round(decimals=4)
        tensor([[0.0049, 0.0049]])
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

    Args:
        function: f, called twice for each direction on a batch like x.
        x: The point at which the derivative is taken.
        tangents: The directions v.
        step: h > 0; None takes `step_sizes`.

    Raises:
        InputError: the step is not positive.

    References:
        Bishop 1995, "Training with noise is equivalent to Tikhonov regularization"; Srinivas & Fleuret 2018,
        arXiv:1803.00443, proposition 1, in its corrected (antithetic) form.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> central(lambda x: x**2, x, torch.ones(1, 1, 2, dtype=torch.float64)).round(decimals=6)
        tensor([[[2., 4.]]], dtype=torch.float64)
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

    Args:
        values_at: The values as a function of t.
        fine: Whether the values are computed in float64 throughout.
        dtype: The type of the values.
        expected: The first derivative that agrees with this number is returned without further steps.
        steps: The steps in float64.
        here: The values at t = 0. With these, one more evaluation shows whether `expected` is right.
        close: The relative difference up to which a derivative agrees with `expected`.
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
