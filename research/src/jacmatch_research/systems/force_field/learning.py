"""Networks for the energy of a cluster: a large one trained on the potential, small ones on it, and their errors."""

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import jacobian, vjp
from jacmatch.surrogates.modules import fit_surrogate, regression
from jacmatch_research.systems.force_field.dynamics import State, thermal, verlet
from jacmatch_research.systems.force_field.lennard_jones import ARGON, bipyramid, energy, forces, hessian
from jacmatch_research.systems.second_order import minimize_by_lbfgs

_NEAREST, _FARTHEST = 0.85, 3.4  # range of the centers of the radial functions, in σ


class EnergyNetwork(nn.Module):
    """E = Σᵢ net(gᵢ) over atoms i, with gᵢₖ = Σⱼ exp(−½((rᵢⱼ⁻¹ − cₖ)/w)²)·rᵢⱼ⁻² and a triplet sum.

    The radial functions are even in 1/r, where a short-ranged potential is smoothest. The triplet part is Σₖ-wise the
    squared length of Σⱼ exp(…)·uᵢⱼ, with uᵢⱼ the direction from i to j: it distinguishes angles. One network serves all
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
        """Wrap a network from coordinates to energies (cluster, 1), with the units of energies and forces."""
        super().__init__()
        self.network, self.units = network, (float(energy_unit), float(force_unit))

    def forward(self, x: Float[Tensor, "cluster coordinate"]) -> Float[Tensor, "cluster value"]:
        """Scaled energy and forces."""
        value, gradient = vjp(self.network, x, torch.ones(len(x), 1, dtype=x.dtype, device=x.device))
        return torch.cat((value / self.units[0], -gradient / self.units[1]), 1)


ATOMS = 7
TEMPERATURES = (0.04, 0.16)
"""Range of kT/ε of the configurations, 4.8 to 19 K for argon; the cluster is solid there."""
SIMULATED = 0.1
"""kT/ε at the beginning of simulations, 12 K for argon."""
STEP = 0.005
"""Time step of simulations in √(mσ²/ε): 10.8 fs for argon."""


@lru_cache(maxsize=8)
def configurations(count: int, seed: int) -> Float[Tensor, "cluster coordinate"]:
    """Clusters of seven atoms at temperatures uniform in `TEMPERATURES`, from Langevin dynamics of the potential."""
    generator = torch.Generator().manual_seed(seed)
    low, high = TEMPERATURES
    heat = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    return thermal(forces, bipyramid().expand(count, -1, -1), heat, seed=seed, steps=400).x.flatten(1)


def targets(x: Float[Tensor, "cluster coordinate"]) -> Float[Tensor, "cluster value"]:
    """Energy and forces of the potential, in the format of `ForceField`."""
    positions = x.reshape(-1, ATOMS, 3)
    return torch.cat((energy(positions)[:, None], forces(positions).flatten(1)), 1)


@lru_cache(maxsize=1)
def teacher(count: int, steps: int) -> ForceField:
    """A network with 16 radial functions and two layers of 48, trained on the potential; frozen."""
    x = configurations(count, seed=2**20)
    y = targets(x)
    student = ForceField(_new(y, radial=16, hidden=(48, 48), seed=0))
    fit_surrogate(
        x.float(),
        y.float(),
        partials="none",
        student=student,
        y_scale=units(y).float(),
        steps=steps,
        batch_size=32,
        lr=3e-3,
        seed=0,
    )
    return student.eval().requires_grad_(False)


def trained(
    x: Float[Tensor, "cluster coordinate"],
    teacher: ForceField,
    *,
    forces: bool,
    rows: int,
    seed: int,
    evaluations: int = 0,
    steps: int = 0,
) -> tuple[ForceField, dict[str, float]]:
    """Train a network with 8 radial functions and two layers of 16 on another one; return it with its measures.

    Args:
        x: Configurations.
        teacher: The other network.
        forces: Whether forces are matched besides energies.
        rows: Rows of the Jacobian of energy and forces that are matched at each configuration, always the same ones; 22
            for all, 0 for none. Their weight makes both terms equal for a constant network.
        seed: Seed of weights, batches, rows and held-out samples.
        evaluations: Evaluations of the second-order solver.
        steps: Steps of Adam instead, in batches of 16 and in float32.
    """
    dtype = torch.float32 if steps else torch.float64
    points, teacher = x.to(dtype), teacher.to(dtype)
    y, table = (each.detach() for each in jacobian(teacher, points)) if rows else (teacher(points).detach(), None)
    teacher.float()
    network = _new(y, radial=8, hidden=(16, 16), seed=seed).to(dtype)
    field = ForceField(network)
    student: nn.Module = field if forces else network
    outputs = y if forces else y[:, :1]
    scales: dict[str, Any] = {
        "x_scale": torch.ones(points.shape[1], dtype=dtype),
        "y_scale": units(y)[: outputs.shape[1]],
    }
    start = time.process_time()
    if steps:
        how: dict[str, Any] = {"steps": steps, "batch_size": 16, "lr": 3e-3, "seed": seed}
        fit_surrogate(points, outputs, partials="none", student=student, **scales, **how)
        measures = {"evaluations": float(steps)}
    else:
        compared: dict[str, Any] = (
            {"partials": "rows", "probes": rows, "jacobian": table} if rows else {"partials": "none"}
        )
        objective = regression(student, points, outputs, weight="scale", seed=seed, **compared, **scales)
        measures = minimize_by_lbfgs(
            student,
            lambda ids: objective(points[ids], outputs[ids], ids=ids, draw=0)["loss"],
            len(points),
            evaluations=evaluations,
            seed=seed,
        )
    measures["cpu_seconds"] = time.process_time() - start
    return field.float().eval(), measures


def units(y: Float[Tensor, "cluster value"]) -> Float[Tensor, "value"]:
    """The standard deviation of the energies, and one for all components of the forces."""
    return torch.cat((y[:, :1].std(0), y[:, 1:].square().mean().sqrt().expand(y.shape[1] - 1)))


def errors(field: ForceField, count: int) -> dict[str, float]:
    """Root mean squared errors against the potential at new configurations, in meV, meV/Å and meV/Å²."""
    x = configurations(count, seed=2**20 + 1)
    exact, field = targets(x), field.double()
    predicted, derivatives = (each.detach() for each in jacobian(field, x))
    field.float()
    hessians = -derivatives[:, 1:] - hessian(x.reshape(-1, ATOMS, 3))
    unit, length = ARGON.millielectronvolts, ARGON.angstroms
    return {
        "energy": unit * float((predicted - exact)[:, 0].square().mean().sqrt()),
        "force": unit / length * float((predicted - exact)[:, 1:].square().mean().sqrt()),
        "hessian": unit / length**2 * float(hessians.square().mean().sqrt()),
        "force_std": unit / length * float(exact[:, 1:].square().mean().sqrt()),
    }


def simulated(field: ForceField, *, clusters: int, steps: int, seed: int) -> dict[str, float]:
    """The change of the energy in simulations at constant energy, in meV for a cluster of seven atoms.

    `drift` is the root mean square over time and clusters of H(t) − H(0), H being kinetic energy and the *potential's*
    energy: it measures the deviation from the surface of constant energy. `end` is the mean of |H − H(0)| at the
    end, `own` the same as `drift` with the network's energy instead of the potential's, which any gradient conserves up
    to the square of the step.
    """
    start = _started(clusters, seed)
    field = field.double()
    true: list[Tensor] = []
    own: list[Tensor] = []

    def forces_at(x: Tensor) -> Tensor:
        values: Tensor = field(x.flatten(1))
        return values[:, 1:].reshape(x.shape)

    def watch(state: State) -> None:
        true.append(energy(state.x) + state.kinetic)
        own.append(field.network(state.x.flatten(1))[:, 0] + state.kinetic)

    with torch.no_grad():
        verlet(forces_at, start, steps=steps, step=STEP, watch=watch, every=max(1, steps // 500))
    field.float()
    away, away_own = (torch.stack(each) - each[0] for each in (true, own))
    unit = ARGON.millielectronvolts
    return {
        "drift": unit * float(away.square().mean().sqrt()),
        "end": unit * float(away[-1].abs().mean()),
        "own": unit * float(away_own.square().mean().sqrt()),
    }


@lru_cache(maxsize=8)
def _started(clusters: int, seed: int) -> State:
    return thermal(forces, bipyramid().expand(clusters, -1, -1), SIMULATED, seed=2**21 + seed, steps=400)


def _new(y: Tensor, *, radial: int, hidden: tuple[int, ...], seed: int) -> EnergyNetwork:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        scale, shift = float(y[:, 0].std()), float(y[:, 0].mean())
        return EnergyNetwork(ATOMS, radial=radial, hidden=hidden, scale=scale, shift=shift)
