"""A large network taught by the potential, small ones taught by that network, and how wrong each of them is."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.jacobian import jacobian
from jacmatch.objectives import GradientShare
from jacmatch.surrogates.modules import fit_surrogate
from jacmatch_research.systems.force_field.dynamics import State, thermal, verlet
from jacmatch_research.systems.force_field.lennard_jones import ARGON, bipyramid, energy, forces, hessian
from jacmatch_research.systems.force_field.networks import EnergyNetwork, ForceField

ATOMS = 7
TEMPERATURES = (0.04, 0.16)
"""Range of kT/ε of the configurations, 4.8 to 19 K for argon; the cluster is solid there."""
SIMULATED = 0.1
"""kT/ε at the beginning of simulations, 12 K for argon."""
STEP = 0.005
"""Of simulations, in √(mσ²/ε): 10.8 fs for argon."""


@lru_cache(maxsize=8)
def configurations(count: int, seed: int) -> Float[Tensor, "cluster coordinate"]:
    """Clusters of seven atoms at temperatures uniform in `TEMPERATURES`, from Langevin dynamics of the potential."""
    generator = torch.Generator().manual_seed(seed)
    low, high = TEMPERATURES
    heat = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    return thermal(forces, bipyramid().expand(count, -1, -1), heat, seed=seed, steps=400).x.flatten(1)


def targets(x: Float[Tensor, "cluster coordinate"]) -> Float[Tensor, "cluster value"]:
    """Energy and forces of the potential, as `ForceField` has them."""
    positions = x.reshape(-1, ATOMS, 3)
    return torch.cat((energy(positions)[:, None], forces(positions).flatten(1)), 1)


@lru_cache(maxsize=1)
def teacher(count: int, steps: int) -> ForceField:
    """A network with 16 radial functions and two layers of 48, taught energies and forces by the potential; frozen."""
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


def taught(
    x: Float[Tensor, "cluster coordinate"],
    by: ForceField,
    *,
    forces: bool,
    rows: int,
    share: float,
    steps: int,
    seed: int,
) -> ForceField:
    """A network with 8 radial functions and two layers of 16, taught by another one.

    Args:
        x: Configurations.
        by: The teacher.
        forces: Whether forces are matched besides energies.
        rows: Rows of the Jacobian of energy and forces, sampled anew in each step; 0 for none.
        share: Of the rows in the gradient norm.
        steps: Of the optimizer.
        seed: Of weights, batches and rows.
    """
    points = x.float()
    y = by(points).detach()
    network = _new(y, radial=8, hidden=(16, 16), seed=seed)
    field = ForceField(network)
    wide = units(y) if forces else units(y)[:1]
    fit_surrogate(
        points,
        y if forces else y[:, :1],
        teacher=by if rows else None,
        partials="rows" if rows else "none",
        probes=max(rows, 1),
        weight=GradientShare(share),
        student=field if forces else network,
        x_scale=torch.ones(points.shape[1]),
        y_scale=wide,
        steps=steps,
        batch_size=16,
        lr=3e-3,
        seed=seed,
    )
    return field.eval()


def units(y: Float[Tensor, "cluster value"]) -> Float[Tensor, "value"]:
    """The standard deviation of the energies, and one for all components of the forces."""
    return torch.cat((y[:, :1].std(0), y[:, 1:].square().mean().sqrt().expand(y.shape[1] - 1)))


def errors(field: ForceField, count: int) -> dict[str, float]:
    """Root mean squared errors against the potential at fresh configurations, in meV, meV/Å and meV/Å²."""
    x = configurations(count, seed=2**20 + 1)
    exact, field = targets(x), field.double()
    predicted, slopes = (each.detach() for each in jacobian(field, x))
    field.float()
    hessians = -slopes[:, 1:] - hessian(x.reshape(-1, ATOMS, 3))
    unit, length = ARGON.millielectronvolts, ARGON.angstroms
    return {
        "energy": unit * float((predicted - exact)[:, 0].square().mean().sqrt()),
        "force": unit / length * float((predicted - exact)[:, 1:].square().mean().sqrt()),
        "hessian": unit / length**2 * float(hessians.square().mean().sqrt()),
        "force_std": unit / length * float(exact[:, 1:].square().mean().sqrt()),
    }


def simulated(field: ForceField, *, clusters: int, steps: int, seed: int) -> dict[str, float]:
    """What simulations at constant energy do to the energy, in meV for a cluster of seven atoms.

    `drift` is the root mean square over time and clusters of H(t) − H(0), H being kinetic energy and the *potential's*
    energy: it is how far the motion leaves the surface that it should stay on. `end` is the mean of |H − H(0)| at the
    end, `own` the same as `drift` with the network's energy instead of the potential's, which any gradient conserves
    up to the square of the step.
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
