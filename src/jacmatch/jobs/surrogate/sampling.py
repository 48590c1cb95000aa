"""Where a function is asked: points in a box, given ones, or those where the student is worst so far."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacmatch.errors import InputError, unknown_name

Sampling = Literal["box", "sobol", "latin-hypercube", "given", "active"]
SAMPLINGS: tuple[Sampling, ...] = ("box", "sobol", "latin-hypercube", "given", "active")
Points = Float[Tensor, "sample input"]


def cube(kind: str, count: int, inputs: int, seed: int) -> Points:
    """Points in the unit cube, float64.

    `box` draws them independently and uniformly; `sobol` takes a scrambled Sobol sequence, whose first n points are
    spread evenly for any n; in a `latin-hypercube` of n points each of n slices along each axis has one.

    Args:
        kind: One of the three.
        count: How many.
        inputs: Dimensions.
        seed: Of the randomness.

    Raises:
        InputError: the kind is unknown, or the numbers are not positive.

    References:
        Sobol 1967; Owen 1998 (scrambling); McKay, Beckman & Conover 1979 (Latin hypercube).

    Example:
        >>> x = cube("latin-hypercube", 4, 2, seed=0)
        >>> (4 * x).floor().sort(0).values[:, 0].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    if count < 1 or inputs < 1:
        raise InputError("`count` and `inputs` of a sample must be at least 1.", got=f"{count} and {inputs}")
    generator = torch.Generator().manual_seed(seed)
    if kind == "box":
        return torch.rand(count, inputs, generator=generator, dtype=torch.float64)
    if kind in ("sobol", "active"):
        if inputs > torch.quasirandom.SobolEngine.MAXDIM:
            most = torch.quasirandom.SobolEngine.MAXDIM
            rule = f"`--sampling sobol` and `active` of `surrogate` must have at most {most} inputs."
            raise InputError(rule, got=inputs, do="Use --sampling box or latin-hypercube.")
        engine = torch.quasirandom.SobolEngine(inputs, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        return engine.draw(count, dtype=torch.float64)
    if kind == "latin-hypercube":
        slices = torch.stack([torch.randperm(count, generator=generator) for _ in range(inputs)], 1)
        return (slices + torch.rand(count, inputs, generator=generator, dtype=torch.float64)) / count
    raise unknown_name("`--sampling` of `surrogate`", kind, SAMPLINGS)


def box(low: tuple[float, ...], high: tuple[float, ...], inputs: int | None) -> Float[Tensor, "2 input"]:
    """The corners of the box: a bound for each input, or one for all.

    Raises:
        InputError: bounds are missing, not finite, not in order, or not as many as inputs.
    """
    size = inputs or max(len(low), len(high))
    for name, given in (("low", low), ("high", high)):
        if len(given) not in (1, size) or not size:
            rule = f"`--{name}` of `surrogate` must have a bound for each of the {size or 'D'} inputs, or one for all."
            raise InputError(rule, got=f"{len(given)}", do="--low 0 -1 --high 1 1 is a box of two inputs.")
    corners = [torch.tensor(given, dtype=torch.float64).expand(size) for given in (low, high)]
    if not bool(((corners[1] > corners[0]) & (corners[1] - corners[0]).isfinite()).all()):
        raise InputError("`--low` must be below `--high` for each input, both finite.", got=f"{low} and {high}")
    return torch.stack(corners)


def inside(unit: Points, corners: Float[Tensor, "2 input"]) -> Points:
    """Points of the unit cube, moved into the box."""
    return corners[0] + unit * (corners[1] - corners[0])


def worst(disagreement: Float[Tensor, "sample"], count: int, seed: int) -> Int[Tensor, "chosen"]:
    """Which `count` candidates are taken, drawn without replacement by their disagreement.

    Drawn, and not the largest ones: those lie in a heap.

    Args:
        disagreement: How far student and teacher are from each other at each candidate, squared.
        count: How many.
        seed: Of the draw.
    """
    weights = disagreement.double().clamp_min(0)
    weights = weights + 1e-12 * weights.sum() + 1e-300
    return torch.multinomial(weights, count, generator=torch.Generator().manual_seed(seed))


def shares(count: int, rounds: int) -> list[int]:
    """How many points are there at the beginning and after each round of active sampling; the last is `count`.

    A third at the beginning, the rest in equal parts.

    Example:
        >>> shares(90, 3)
        [30, 50, 70, 90]
    """
    first = max(2, count // 3)
    return [first + (count - first) * number // rounds for number in range(rounds + 1)]
