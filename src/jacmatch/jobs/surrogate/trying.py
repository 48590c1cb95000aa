"""What is tried on a function before anything is learned from it: a surrogate of nonsense would be nonsense."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.jobs.surrogate.answers import place
from jacmatch.jobs.surrogate.functions import Function

_REPEATS = 1e-9  # largest relative difference between two calls
_ALONE = 1e-5  # between a point in a batch and the same point alone: float32 adds up in another order
_AGREES = 1e-3  # between a Jacobian and differences, of the largest slope


@dataclass(frozen=True)
class Tried:
    """What was found.

    Attributes:
        outputs: K.
        way: How slopes are found.
        disagreement: Largest difference of the Jacobian from differences, relative to the largest slope; None where
            the slopes are differences, or the function is not smooth at their step and they say nothing.
        bent: Share of the points where the function is not smooth at the step of differences.
        place: One of these points.
        calls: Points that were asked to find this out.
        values: What the function says at the points.
        jacobians: Its Jacobian there, where that is not by differences.
    """

    outputs: int
    way: str
    disagreement: float | None
    bent: float
    place: str | None
    calls: int = 0
    values: Float[Tensor, "sample out"] | None = None
    jacobians: Float[Tensor, "sample out input"] | None = None

    def plain(self) -> dict[str, Any]:
        """As it stands in a result."""
        return {name: value for name, value in vars(self).items() if name not in ("values", "jacobians")}


def tried(function: Function, x: Float[Tensor, "sample input"], *, slopes: bool = True) -> Tried:
    """What the function does at some points.

    Args:
        function: The function.
        x: The points.
        slopes: Whether slopes are looked at as well.

    Raises:
        InputError: it gives another answer when asked again, or in another batch, or its Jacobian disagrees with
            differences.
    """
    y = function.values(x)
    largest = y.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    again = ((function.values(x) - y).abs() / largest).max()
    if again > _REPEATS:
        raise InputError(
            f"{function.name} must give the same answer to the same question.",
            got=f"two calls that differ by {float(again):.2g} of the largest value",
            do="Fix its random numbers (a seed set inside the function), or give data as npz:FILE.",
        )
    alone = ((torch.cat([function.values(each[None]) for each in x[:4]]) - y[:4]).abs() / largest).max()
    if alone > _ALONE:
        raise InputError(
            f"{function.name} must answer each point of a batch as if it were alone.",
            got=f"a difference of {float(alone):.2g} of the largest value",
            do="If it takes one point at a time, wrap it: lambda x: np.stack([f(each) for each in x]).",
        )
    if not slopes:
        return Tried(y.shape[1], "none", None, 0.0, None, values=y)
    return _slopes(function, x, y)


def _slopes(function: Function, x: Tensor, y: Tensor) -> Tried:
    """Whether the Jacobian is that of the function, and whether the function has one."""
    rough, bent = function.by_differences(x)
    share = float(bent.double().mean())
    worst = place(x[int(bent.int().argmax())]) if share else None
    if function.way == "differences":
        return Tried(y.shape[1], function.way, None, share, worst, values=y)
    j = function.slopes(x)
    if j.shape != rough.shape:
        rule = f"The Jacobian of {function.name} must have the shape {tuple(rough.shape)}."
        raise InputError(rule, got=f"shape {tuple(j.shape)}", do="The order is batch, outputs, inputs.")
    found = [_compared(function, y, j, rough, bent)]
    if function.step is not None:  # a long step is off where the function curves, a short one where it is noisy
        found.append(_compared(function, y, j, *function.by_differences(x, function.precision ** (1 / 3))))
    told = [each for each in found if each is not None]
    if not told:
        return Tried(y.shape[1], function.way, None, share, worst, values=y, jacobians=j)
    best = min(told, key=lambda each: float(each.beyond.max()))
    if float(best.beyond.max()) > _AGREES:
        n, k, i = (int(each) for each in torch.unravel_index(best.beyond.argmax(), best.beyond.shape))
        raise InputError(
            f"The Jacobian of {function.name} ({function.way}) must agree with differences of its values.",
            got=f"a largest disagreement at ∂y{k}/∂x{i}, x = {place(x[n])}: {float(j[n, k, i]):.6g}, and "
            f"{float(best.rough[n, k, i]):.6g} by differences",
            do="Mend the Jacobian, or use --jacobian differences; where the values are noisy, give a longer --step.",
        )
    return Tried(y.shape[1], function.way, best.off, share, worst, values=y, jacobians=j)


@dataclass(frozen=True)
class _Compared:
    """A Jacobian beside differences of one step."""

    rough: Tensor
    beyond: Tensor
    off: float


def _compared(function: Function, y: Tensor, j: Tensor, rough: Tensor, bent: Tensor) -> _Compared | None:
    """How far both are apart where the function is smooth at the step; None if it is at less than half of the points.

    What lies within the rounding of the values is not beyond.
    """
    if float(bent.double().mean()) > 0.5:
        return None
    largest = (rough.abs() * function.units)[~bent].amax((0, 2)).clamp_min(1e-300)[:, None]  # of each output
    rounding = 8 * function.precision ** (2 / 3) * y.abs().amax(0)[:, None]
    off = (j - rough).abs() * function.units
    beyond = (off - rounding) / largest
    beyond[bent] = 0.0  # there no difference means anything
    return _Compared(rough, beyond, float((off / largest)[~bent].max()))
