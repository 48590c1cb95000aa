"""Motion in a potential: simulations at constant energy, and samples at a temperature."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError

Forces = Callable[[Tensor], Tensor]
"""Clusters (cluster, atom, 3) to their forces; energies and masses in the units of `lennard_jones`."""


@dataclass(frozen=True)
class State:
    """Positions and velocities of clusters."""

    x: Float[Tensor, "cluster atom 3"]
    v: Float[Tensor, "cluster atom 3"]

    @property
    def kinetic(self) -> Float[Tensor, "cluster"]:
        """½ Σ v²."""
        return self.v.square().sum((1, 2)) / 2


def verlet(
    forces: Forces, state: State, *, steps: int, step: float, watch: Callable[[State], None], every: int = 1
) -> State:
    """The state after `steps` of velocity Verlet: v += hF/2, x += hv, v += hF/2, h being `step`.

    `watch` is called with the state at the beginning and after every `every` steps.

    Raises:
        InputError: A number is not positive.

    References:
        Swope, Andersen, Berens & Wilson, J. Chem. Phys. 76 (1982) 637.
    """
    if steps < 1 or every < 1 or not step > 0:
        raise InputError("`steps`, `every` and `step` of `verlet` must be positive.", got=(steps, every, step))
    x, v, force = state.x, state.v, forces(state.x)
    watch(state)
    for number in range(1, steps + 1):
        half = v + step / 2 * force
        x = x + step * half
        force = forces(x)
        v = half + step / 2 * force
        if number % every == 0:
            watch(State(x, v))
    return State(x, v)


def thermal(
    forces: Forces,
    x: Float[Tensor, "cluster atom 3"],
    temperature: float | Float[Tensor, "cluster"],
    *,
    seed: int,
    steps: int = 1500,
    step: float = 0.01,
    friction: float = 1.0,
) -> State:
    """Clusters at a temperature (kT in ε, one or one for each), by Langevin dynamics from x, at rest as a whole.

    Each step is a half kick, a half drift, friction with its noise exactly, a half drift and a half kick (BAOAB:
    Leimkuhler & Matthews, 2013). Momentum and angular momentum are removed at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    heat = torch.as_tensor(temperature, dtype=x.dtype).reshape(-1, 1, 1)
    keep = math.exp(-friction * step)
    v, force = heat.sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype), forces(x)
    for _ in range(steps):
        v = v + step / 2 * force
        x = x + step / 2 * v
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        v = keep * v + (heat * (1 - keep**2)).sqrt() * noise
        x = x + step / 2 * v
        force = forces(x)
        v = v + step / 2 * force
    return at_rest(State(x, v))


def at_rest(state: State) -> State:
    """The state about its center of mass, without momentum and angular momentum."""
    x, v = (each - each.mean(1, keepdim=True) for each in (state.x, state.v))
    spin = torch.linalg.cross(x, v).sum(1)
    inertia = torch.diag_embed(x.square().sum((1, 2))[:, None].expand(-1, 3)) - x.mT @ x
    omega = torch.linalg.solve(inertia, spin)
    return State(x, v - torch.linalg.cross(omega[:, None].expand_as(x), x))
