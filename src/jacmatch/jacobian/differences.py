"""Derivatives from values alone: antithetic differences, for black boxes and for operators without derivatives.

Jv ≈ (f(x + hv) − f(x − hv)) / 2h. The two errors pull in opposite directions: truncation h² f‴/6 and rounding ε|f|/h.
The step rule balances them; `with_error` measures what is left.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError


def step_sizes(
    x: Float[Tensor, "batch *input"], tangents: Float[Tensor, "probe batch *input"]
) -> Float[Tensor, "probe batch"]:
    """The step h for each direction and sample: h · rms(v) = ε^⅓ · rms(x), ε the machine precision of x's type.

    ε^⅓ balances truncation h² against rounding ε/h. It is 5·10⁻³ in float32 (floor of the relative error about 10⁻⁵)
    and 6·10⁻⁶ in float64. A sample that is zero everywhere counts as of scale 1.

    Example:
        >>> step_sizes(torch.ones(2, 3), torch.ones(1, 2, 3)).round(decimals=4)
        tensor([[0.0049, 0.0049]])
    """
    relative = torch.finfo(x.dtype).eps ** (1 / 3)
    scale = x.reshape(len(x), -1).square().mean(1).sqrt()
    length = tangents.reshape(*tangents.shape[:2], -1).square().mean(2).sqrt()
    one = torch.ones((), dtype=x.dtype, device=x.device)
    steps: Tensor = relative * torch.where(scale > 0, scale, one) / torch.where(length > 0, length, one)
    return steps


def central(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *input"],
    tangents: Float[Tensor, "probe batch *input"],
    *,
    step: float | Float[Tensor, "probe batch"] | None = None,
) -> Float[Tensor, "probe batch *row"]:
    """Jv for each direction v, by one antithetic pair of values: (f(x + hv) − f(x − hv)) / 2h.

    With Gaussian v and a given h = σ this is the antithetic noise pair, whose mean square is ‖J‖²_F + O(σ²).

    Args:
        function: f, called twice for each direction on a batch like x.
        x: Where the derivative is taken.
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


def with_error(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *input"],
    tangents: Float[Tensor, "probe batch *input"],
) -> tuple[Float[Tensor, "probe batch *row"], float]:
    """Jv by Richardson extrapolation of two steps, and an estimate of its relative error (0 = exact, 1 = useless).

    Steps 4h and 8h give D₄ and D₈; (4 D₄ − D₈) / 3 has no h² error left. What the extrapolation still changes,
    ‖D₄ − D₈‖/3 ÷ ‖result‖, bounds the truncation from above for a smooth function; it grows to the order of 1 where a
    kink lies within the step. All samples move by one and the same step, so that it holds for coupled samples too.
    """
    h = step_sizes(x, tangents)
    h = h.mean(1, keepdim=True).expand_as(h)
    near = central(function, x, tangents, step=4 * h)
    far = central(function, x, tangents, step=8 * h)
    best = (4 * near - far) / 3
    size = float(best.detach().norm())
    change = float((near - far).detach().norm()) / 3
    if size > 0:
        return best, change / size
    return best, 0.0 if change == 0 else math.inf


def _like(size: Float[Tensor, "batch"], x: Float[Tensor, "batch *any"]) -> Tensor:
    return size.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
