"""Shifts of the input that are not used in training, and the quality of a network under them.

A shift is a pure function of the sample's input, its index and the seed; it does not depend on the other samples of the
batch. Each shift defines the meaning of `severity`; one value leaves the input unchanged.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.datasets import Split
from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian import probes
from jacmatch.training.evaluation import evaluate

_SEED = 1_000_099
"""Offset of the seed: these are not the numbers that a training with the same seed has drawn."""

Scale: TypeAlias = float | int | Sequence[float | int]


def gaussian_noise(
    x: Float[Tensor, "batch *input"],
    severity: float | int,
    *,
    ids: Int64[Tensor, "batch"],
    seed: int = 0,
    scale: Scale = 1.0,
) -> Float[Tensor, "batch *input"]:
    """Return x + σ·scale·ξ, ξ ~ N(0, I), σ = `severity` ≥ 0, without clipping.

    `scale` is one number or one for each channel; the same noise, scaled, for every severity. With the standard
    deviation of the data it is noise on normalized inputs.

    Example:
        >>> x = torch.zeros(1, 2, 100, 100)
        >>> [round(float(s), 1) for s in gaussian_noise(x, 0.5, ids=torch.arange(1), scale=(1, 4)).std((0, 2, 3))]
        [0.5, 2.0]
    """
    _within("gaussian-noise", severity, severity >= 0, "at least 0")
    shape = tuple(x.shape[1:])
    noise = probes.directions("gaussian", seed=seed + _SEED, ids=ids, draw=0, count=1, shape=shape, dtype=x.dtype)[0]
    unit = torch.tensor([float(value) for value in (scale if isinstance(scale, Sequence) else [scale])]).to(x)
    if len(unit) not in {1, x.shape[1]}:
        rule = (
            f"`scale` of the shift gaussian-noise must have one number, or one for each of the {x.shape[1]} channels."
        )
        raise InputError(rule, got=f"{len(unit)} numbers")
    return x + severity * unit.view(-1, *[1] * (x.dim() - 2)) * noise


def salt_and_pepper(
    x: Float[Tensor, "batch *input"], severity: float | int, *, ids: Int64[Tensor, "batch"], seed: int = 0, **_: Any
) -> Float[Tensor, "batch *input"]:
    """Returns x with each pixel black (0) with probability p/2 and white (1) with p/2, p = `severity` in [0, 1].

    A pixel of an image is changed in all channels; of a vector each element is a pixel.

    Example:
        >>> changed = salt_and_pepper(torch.full((1, 1, 100, 100), 0.5), 0.2, ids=torch.arange(1)) != 0.5
        >>> round(float(changed.float().mean()), 1)
        0.2
    """
    _within("salt-and-pepper", severity, 0 <= severity <= 1, "in [0, 1]")
    sides = tuple(x.shape[2:]) if x.dim() == 4 else tuple(x.shape[1:])
    u = probes.uniform(seed + _SEED, ids, 0, math.prod(sides)).view(len(x), *([1] if x.dim() == 4 else []), *sides)
    # Which color is decided by the last bits, so that a larger severity keeps the changed pixels as they are.
    white = (u * 2**23) % 1 >= 0.5
    return torch.where(u < severity, white.to(x.dtype), x)


def blur(x: Float[Tensor, "batch *input"], severity: float | int, **_: Any) -> Float[Tensor, "batch *input"]:
    """Return the images convolved with a Gaussian of standard deviation `severity` pixels, truncated at three.

    x′(i, j) = Σ_{a,b = −r…r} w_a w_b x(i+a, j+b), w_a ∝ exp(−a²/2σ²), Σ w = 1, r = ⌈3σ⌉; beyond the border the image
    continues with its last pixel.
    """
    _within("blur", severity, severity >= 0, "at least 0")
    _images("blur", x)
    if severity == 0:
        return x
    radius = math.ceil(3 * severity)
    weights = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * float(severity) ** 2))
    weights = (weights / weights.sum()).to(x)
    padded = functional.pad(x.flatten(0, 1)[:, None], [radius] * 4, mode="replicate")
    blurred = functional.conv2d(functional.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return blurred.view_as(x)


def contrast(x: Float[Tensor, "batch *input"], severity: float | int, **_: Any) -> Float[Tensor, "batch *input"]:
    """Return m + c·(x − m), c = `severity` ≥ 0, where m is the mean of each channel of the image.

    References:
        The corruption `contrast` of Hendrycks & Dietterich 2019, arXiv:1903.12261, without its clipping.
    """
    _within("contrast", severity, severity >= 0, "at least 0")
    _images("contrast", x)
    mean = x.mean((2, 3), keepdim=True)
    return mean + severity * (x - mean)


SHIFTS: dict[str, Callable[..., Tensor]] = {
    "gaussian-noise": gaussian_noise,
    "salt-and-pepper": salt_and_pepper,
    "blur": blur,
    "contrast": contrast,
}
"""The shifts by name; each is called as f(x, severity, ids=, seed=, scale=)."""

RANDOM = ("gaussian-noise", "salt-and-pepper")
"""Shifts that depend on the seed."""


def shifted(
    split: Split, name: str, severity: float | int, *, seed: int = 0, scale: Scale = 1.0, batch_size: int = 500
) -> Split:
    """Return the split with each input shifted, as floats; row numbers are the ids.

    Args:
        split: The data.
        name: One of `SHIFTS`.
        severity: Severity, as the shift defines it.
        seed: Of the draw.
        scale: The unit of gaussian-noise.
        batch_size: Samples at once.

    Raises:
        InputError: The name is unknown, or the shift refuses the severity or the inputs.

    Example:
        >>> split = Split(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
        >>> shifted(split, "salt-and-pepper", 1.0).inputs().unique()
        tensor([0., 1.])
    """
    if name not in SHIFTS:
        raise unknown_name("A shift of `shifted`", name, SHIFTS)
    parts = [
        SHIFTS[name](split.inputs(rows), severity, ids=rows.to(split.x.device), seed=seed, scale=scale)
        for rows in torch.split(torch.arange(len(split)), batch_size)
    ]
    return Split(torch.cat(parts), split.y)


def evaluate_under_shifts(
    module: nn.Module,
    split: Split,
    shifts: Iterable[tuple[str, float | int]],
    *,
    draws: int = 3,
    seed: int = 0,
    scale: Scale = 1.0,
    device: str | torch.device,
) -> dict[tuple[str, float | int], list[float]]:
    """Return accuracies (RMSE in a regression) under each shift, one for each draw of a random shift.

    Args:
        module: The network, as for `evaluate`.
        split: The data.
        shifts: Name and severity of each shift.
        draws: Number of draws of a random shift, at least 1, with the seeds `seed`, `seed` + 1, …
        seed: Seed of the first draw.
        scale: The unit of gaussian-noise.
        device: Where to run; see `find_device`.

    Raises:
        InputError: `draws` is below 1, or `evaluate` or `shifted` refuses its arguments.

    Example:
        >>> split = Split(torch.rand(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> found = evaluate_under_shifts(nn.Linear(4, 2), split, [("gaussian-noise", 0.1)], draws=2, device="cpu")
        >>> len(found["gaussian-noise", 0.1])
        2
    """
    if draws < 1:
        raise InputError("`draws` of `evaluate_under_shifts` must be at least 1.", got=draws)
    results: dict[tuple[str, float | int], list[float]] = {}
    for name, severity in shifts:
        seeds = range(seed, seed + draws) if name in RANDOM else (seed,)
        moved = (shifted(split, name, severity, seed=number, scale=scale) for number in seeds)
        results[name, severity] = [next(iter(evaluate(module, each, device=device).values())) for each in moved]
    return results


def _within(name: str, severity: float | int, holds: bool, rule: str) -> None:
    if not (holds and math.isfinite(severity)):
        raise InputError(f"The severity of the shift {name} must be {rule}.", got=severity)


def _images(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        got = f"inputs of shape {tuple(x.shape[1:])}"
        raise InputError(f"The shift {name} needs images (channel, height, width).", got=got)
