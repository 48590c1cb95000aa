"""The mean of a Gaussian process that is conditioned on values and partials, as a module without parameters."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.models.inputs import Shape, Statistics, check_sizes

NO_CONSTANT = -1000.0
"""The logarithm of 0."""


class ProcessMean(nn.Module):
    """The mean y = m + t Σₙ k(uₙ) (aₙ + Σᵢ uₙᵢ ρ(uₙᵢ) bₙᵢ), uₙ = (z − zₙ)/ℓ, in raw units and float64 inside.

    k = Π (exp(−½ uᵢ²) + wᵢ)/(1 + wᵢ), and ρ is the share of the first term. All its numbers are buffers, w as its
    logarithm. Outputs whose partials are known at the same samples share their length scales ℓ and constants w.

    References:
        Rasmussen & Williams 2006, section 9.4.
    """

    points: Tensor
    lengths: Tensor
    constants: Tensor
    groups: Tensor
    values: Tensor
    partials: Tensor
    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    def __init__(self, outputs: int, shape: Shape, points: int, groups: int = 1) -> None:
        """Builds a process whose mean is 0 everywhere."""
        super().__init__()
        check_sizes("gaussian-process", outputs, shape)
        d = math.prod(shape)
        sizes = {"points": (points, d), "values": (points, outputs), "partials": (points, d, outputs)}
        sizes |= {"x_mean": (d,), "y_mean": (outputs,)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        for name, size in {"lengths": (groups, d), "x_scale": (d,), "y_scale": (outputs,)}.items():
            self.register_buffer(name, torch.ones(size, dtype=torch.float64))
        self.register_buffer("constants", torch.full((groups, d), NO_CONSTANT, dtype=torch.float64))
        self.register_buffer("groups", torch.zeros(outputs, dtype=torch.int64))

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch out"]:
        """Return the mean for raw inputs."""
        z = (x.flatten(1).double() - self.x_mean) / self.x_scale
        y = torch.zeros(1, dtype=torch.float64, device=x.device)
        for group, (lengths, logarithm) in enumerate(zip(self.lengths, self.constants, strict=True)):
            u = (z[:, None] - self.points) / lengths
            half, w = 0.5 * u.square(), logarithm.exp()
            k = ((torch.exp(-half) + w) / (1 + w)).prod(2)
            shares = u * torch.sigmoid(-(half + logarithm))
            mean = k @ self.values + (k[:, :, None] * shares).flatten(1) @ self.partials.flatten(0, 1)
            y = y + mean * (self.groups == group)
        return (self.y_mean + self.y_scale * y).to(x.dtype)


def process_mean_from_layout(
    layout: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None
) -> ProcessMean:
    """Build the process of a layout, POINTS or POINTS-GROUPS; its weights contain the scaling.

    Example:
        >>> process_mean_from_layout("10-2", 1, (3,)).points.shape
        torch.Size([10, 3])
    """
    numbers = layout.split("-")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise InputError("`gaussian-process:LAYOUT` must be POINTS or POINTS-GROUPS.", got=repr(layout))
    return ProcessMean(outputs, shape, *map(int, numbers))
