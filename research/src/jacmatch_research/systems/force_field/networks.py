"""Networks for the energy of a cluster that do not see its position, its orientation and the order of its atoms."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import vjp

_NEAREST, _FARTHEST = 0.85, 3.4  # where the radial functions lie, in σ


class EnergyNetwork(nn.Module):
    """E = Σᵢ net(gᵢ), the surroundings of atom i being gᵢₖ = Σⱼ exp(−½((rᵢⱼ⁻¹ − cₖ)/w)²)·rᵢⱼ⁻² and a triplet sum.

    The radial functions are even in 1/r, where a short-ranged potential is smoothest. The triplet part is Σₖ-wise the
    squared length of Σⱼ exp(…)·uᵢⱼ, with uᵢⱼ the direction from i to j: it tells angles apart. One network serves all
    atoms (Behler & Parrinello, Phys. Rev. Lett. 98 (2007) 146401), and its activation is smooth: forces and Hessians
    are its derivatives.
    """

    centres: Tensor

    def __init__(
        self, atoms: int, *, radial: int, hidden: Sequence[int], scale: float = 1.0, shift: float = 0.0
    ) -> None:
        """Build the network with torch's initialization; scale and shift are those of the energies to be learned.

        Raises:
            InputError: There are fewer than two atoms or radial functions.
        """
        super().__init__()
        if atoms < 2 or radial < 2:
            rule = "`atoms` and `radial` of `EnergyNetwork` must be at least 2."
            raise InputError(rule, got=(atoms, radial))
        self.atoms, self.scale, self.shift = atoms, float(scale), float(shift)
        self.register_buffer("centres", torch.linspace(1 / _FARTHEST, 1 / _NEAREST, radial))
        layers: list[nn.Module] = []
        width = 2 * radial
        for following in hidden:
            layers += [nn.Linear(width, following), nn.SiLU()]
            width = following
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Float[Tensor, "cluster coordinate"]) -> Float[Tensor, "cluster 1"]:
        """Energies in ε of clusters whose coordinates, atom by atom, are in σ."""
        positions = x.reshape(len(x), self.atoms, 3)
        apart = positions[:, :, None] - positions[:, None]
        own = torch.eye(self.atoms, dtype=x.dtype, device=x.device)
        inverse = (1 - own) / (apart.square().sum(-1) + own).sqrt()
        width = self.centres[1] - self.centres[0]
        radial = (-((inverse[..., None] - self.centres) / width).square() / 2).exp() * inverse.square()[..., None]
        directed = torch.einsum("nijk,nijd->nikd", radial, apart * inverse[..., None])
        seen = torch.cat((radial.sum(2), directed.square().sum(-1)), -1)
        each: Tensor = self.layers(seen).sum(1)
        return self.shift + self.scale * each


class ForceField(nn.Module):
    """Energy and forces of an energy network as one output: [E/energy_unit, F/force_unit], F = −∂E/∂x.

    The Jacobian of these outputs has the forces in its first row and the rows of the Hessian in the others.
    """

    def __init__(self, network: nn.Module, *, energy_unit: float | int = 1.0, force_unit: float | int = 1.0) -> None:
        """Keep the network, coordinates to energies (cluster, 1), and what energies and forces are divided by."""
        super().__init__()
        self.network, self.units = network, (float(energy_unit), float(force_unit))

    def forward(self, x: Float[Tensor, "cluster coordinate"]) -> Float[Tensor, "cluster value"]:
        """Scaled energy and forces."""
        value, gradient = vjp(self.network, x, torch.ones(len(x), 1, dtype=x.dtype, device=x.device))
        return torch.cat((value / self.units[0], -gradient / self.units[1]), 1)
