"""Means under Gaussian noise in the plane, exact to rounding also where a network has kinks.

Gauss–Hermite quadrature is exact for smooth functions. Across the kink of a ReLU it converges slowly; there the plane
is cut along the kinks, and Gauss–Legendre quadrature is used on each side, where the function is smooth again.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

REACH = 7.5
"""Noise beyond so many standard deviations has a probability of 10⁻¹² and is left out where there are kinks."""


@dataclass(frozen=True)
class Nodes:
    """Standard normal noise z for each point, or one for all, and weights, which have the sum 1."""

    z: Float[Tensor, "point node 2"]
    weights: Float[Tensor, "point node"]


def hermite(count: int) -> Nodes:
    """Gauss–Hermite nodes, count², for functions that are smooth."""
    nodes, weights = _normal(count)
    return Nodes(torch.cartesian_prod(nodes, nodes)[None], torch.outer(weights, weights).flatten()[None])


def kinked(offsets: Float[Tensor, "point kink"], normals: Float[Tensor, "kink 2"], count: int) -> Nodes:
    """Nodes for functions of z and of −z that have a kink where offset + normal · z = 0 and are smooth elsewhere.

    z = s n + t n', n the normal of the nearest kink. The outer integral, over s, is cut at that kink and where two
    other kinks meet; the inner one, over t, at the other kinks. Offsets are signed, in standard deviations of the
    noise, and unit normals point to where they grow. Each piece has `count` nodes, and at most 2.5 standard deviations.
    """
    order = offsets.abs().argsort(1)
    near = int((offsets.abs() < REACH).sum(1).max())
    if not near:
        return hermite(2 * count)
    distance, direction = offsets.gather(1, order[:, :near]), normals[order[:, :near]]
    n = direction[:, 0]
    across = torch.stack((-n[:, 1], n[:, 0]), 1)
    along_n = (direction[:, 1:] * n[:, None]).sum(2).repeat(1, 2)
    along_t = (direction[:, 1:] * across[:, None]).sum(2).repeat(1, 2)
    others = torch.cat((distance[:, 1:], -distance[:, 1:]), 1)  # the kinks of the function of −z as well
    outer = torch.cat((distance[:, :1], -distance[:, :1], _meetings(others, along_n, along_t)), 1)
    s, s_weights = _pieces(outer, count)
    if near > 1:
        # a kink is crossed at t = −(offset + s n·normal) / (n'·normal)
        t, t_weights = _pieces(-(others[:, None] + s[:, :, None] * along_n[:, None]) / along_t[:, None], count)
    else:  # along the only kink all is smooth
        t, t_weights = (part.expand(*s.shape, -1) for part in _normal(2 * count))
    z = s[:, :, None, None] * n[:, None, None] + t[..., None] * across[:, None, None]
    weights = (s_weights[:, :, None] * t_weights).flatten(1)
    return Nodes(z.flatten(1, 2), weights / weights.sum(1, keepdim=True))


def segments(cuts: Float[Tensor, "*row cut"], count: int) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights between neighboring cuts, which ascend."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(count))
    length = cuts.diff(dim=-1)[..., None]
    inside = cuts[..., :-1, None] + length * (nodes + 1) / 2
    return inside.flatten(-2), (length * weights / 2).flatten(-2)


def _pieces(cuts: Float[Tensor, "*row cut"], count: int) -> tuple[Tensor, Tensor]:
    """Nodes on the line, cut there and at fixed places, with weights that contain the normal density."""
    fixed = torch.linspace(-REACH, REACH, 7, dtype=cuts.dtype)
    every = torch.cat((cuts.nan_to_num(REACH).clamp(-REACH, REACH), fixed.expand(*cuts.shape[:-1], -1)), -1)
    nodes, weights = segments(every.sort(-1).values, count)
    return nodes, weights * torch.exp(-nodes.square() / 2)


def _normal(count: int) -> tuple[Tensor, Tensor]:
    """Gauss–Hermite nodes and weights of a standard normal on the line."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(count))
    return nodes, weights / weights.sum()


def _meetings(
    offsets: Float[Tensor, "point line"], along_n: Float[Tensor, "point line"], along_t: Float[Tensor, "point line"]
) -> Float[Tensor, "point pair"]:
    """Where two lines offset + along_n s + along_t t = 0 meet, as s; not finite for parallel ones."""
    i, j = torch.triu_indices(offsets.shape[1], offsets.shape[1], 1)
    determinant = along_n[:, i] * along_t[:, j] - along_n[:, j] * along_t[:, i]
    return (offsets[:, j] * along_t[:, i] - offsets[:, i] * along_t[:, j]) / determinant
