"""The potential of Lennard-Jones: energy, forces and Hessian of a cluster, in closed form.

Everything is in the potential's own units: lengths in σ, energies in ε, masses in that of an atom, hence times in
√(mσ²/ε). `Atom` has these in SI units.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BOLTZMANN = 1.380649e-23
"""J/K, exact (SI 2019)."""
ELEMENTARY_CHARGE = 1.602176634e-19
"""C, exact (SI 2019): one electronvolt in joule."""
ATOMIC_MASS = 1.66053906892e-27
"""kg (CODATA 2022)."""


@dataclass(frozen=True)
class Atom:
    """Factors from the units of the potential to SI units: ε in joules, σ in meters, the mass in kilograms."""

    depth: float
    size: float
    mass: float

    @property
    def time(self) -> float:
        """√(mσ²/ε), in seconds."""
        return math.sqrt(self.mass * self.size**2 / self.depth)

    @property
    def millielectronvolts(self) -> float:
        """ε in meV."""
        return 1000 * self.depth / ELEMENTARY_CHARGE

    @property
    def angstroms(self) -> float:
        """σ in Å."""
        return 1e10 * self.size

    def kelvins(self, temperature: float) -> float:
        """A temperature kT/ε in K.

        Example:
            >>> round(ARGON.kelvins(0.1), 2)
            11.98
        """
        return temperature * self.depth / BOLTZMANN


ARGON = Atom(depth=119.8 * BOLTZMANN, size=3.405e-10, mass=39.948 * ATOMIC_MASS)
"""ε/k = 119.8 K and σ = 3.405 Å: Rahman, Phys. Rev. 136 (1964) A405, after Michels. Standard atomic weight of IUPAC."""


def energy(x: Float[Tensor, "cluster atom 3"]) -> Float[Tensor, "cluster"]:
    """E = 4 Σ_{i<j} (r⁻¹² − r⁻⁶) with r the distance of atoms i and j.

    Example:
        >>> energy(torch.tensor([[[0.0, 0.0, 0.0], [2 ** (1 / 6), 0.0, 0.0]]])).round(decimals=5)
        tensor([-1.])
    """
    inverse = _pairs(x)[1]
    return 2 * (inverse.square() - inverse).sum((1, 2))


def forces(x: Float[Tensor, "cluster atom 3"]) -> Float[Tensor, "cluster atom 3"]:
    """F = −∂E/∂x: the pair pushes atom i by 24 (2 r⁻¹² − r⁻⁶) (xᵢ − xⱼ)/r²."""
    apart, inverse, square = _pairs(x)
    return (24 * (2 * inverse.square() - inverse) / square)[..., None].mul(apart).sum(2)


def hessian(x: Float[Tensor, "cluster atom 3"]) -> Float[Tensor, "cluster coordinate coordinate"]:
    """∂²E/∂x², coordinates atom by atom.

    With u = (xᵢ − xⱼ)/r the block of two atoms is −[(V″ − V′/r) uuᵀ + V′/r I], and each diagonal block is minus the sum
    of the other blocks of its row.
    """
    count, atoms, _ = x.shape
    apart, inverse, square = _pairs(x)
    first = -24 * (2 * inverse.square() - inverse) / square  # V′/r
    second = 24 * (26 * inverse.square() - 7 * inverse) / square  # V″
    along = ((second - first) / square)[..., None, None] * apart[..., :, None] * apart[..., None, :]
    block = along + first[..., None, None] * torch.eye(3, dtype=x.dtype, device=x.device)
    own = torch.eye(atoms, dtype=x.dtype, device=x.device)[:, :, None, None]
    blocks = own * block.sum(2)[:, :, None] - block
    return blocks.permute(0, 1, 3, 2, 4).reshape(count, 3 * atoms, 3 * atoms)


def bipyramid() -> Float[Tensor, "atom 3"]:
    """The minimum of seven atoms, E = −16.505384 (Hoare & Pal 1971; the Cambridge Cluster Database): a pentagon.

    Two further atoms lie on its axis. Radius and height are those of lowest energy, to six digits.
    """
    angles = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
    radius, height = 0.956206, 0.573870
    ring = torch.stack((radius * angles.cos(), radius * angles.sin(), torch.zeros(5, dtype=torch.float64)), 1)
    return torch.cat((ring, torch.tensor([[0.0, 0.0, height], [0.0, 0.0, -height]], dtype=torch.float64)))


def _pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """xᵢ − xⱼ, r⁻⁶ and r² for all pairs; r⁻⁶ = 0 and r² = 1 of an atom with itself."""
    apart = x[:, :, None] - x[:, None]
    own = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    square = apart.square().sum(-1) + own
    return apart, (1 - own) / square**3, square
