"""Networks instead of the controller: their training data, and drives with them."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.jacobian import jacobian
from jacmatch.surrogates.modules import fit_surrogate
from jacmatch_research.systems.steering.control import (
    ACCEPTED,
    LARGEST,
    SPEEDS,
    Array,
    Controller,
    Lqr,
    Scheduled,
    drive,
    largest_real_part,
)

Learn = Callable[[tuple[Tensor, Tensor], Tensor], tuple[nn.Module, dict[str, float]]]
"""Function of (inputs, values) and partials that returns a trained network and its measures."""
WIDTH = 1.5
"""States are uniform within this multiple of `ACCEPTED`."""
CARS, _CAR_SEED = 64, 2**20
GRID = np.linspace(*SPEEDS, 33)
"""Speeds at which the closed loops are evaluated."""


def samples(count: int, seed: int) -> tuple[Array, Array]:
    """States (sample, 4) and speeds (sample,), uniform."""
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, (count, 4)) * WIDTH * np.array(ACCEPTED), random.uniform(*SPEEDS, count)


def taught(
    count: int, seed: int
) -> tuple[Float[Tensor, "sample 5"], Float[Tensor, "sample 2"], Float[Tensor, "sample 2 5"]]:
    """States with speeds, steering angles, and their derivatives."""
    return *answers(count, seed), torch.from_numpy(Scheduled().jacobian(*samples(count, seed)))


def answers(count: int, seed: int) -> tuple[Float[Tensor, "sample 5"], Float[Tensor, "sample 2"]]:
    """States with speeds, and steering angles."""
    z, speed = samples(count, seed)
    return torch.from_numpy(np.concatenate((z, speed[:, None]), 1)), torch.from_numpy(Scheduled()(z, speed))


def gain_error(speed: float | int, states: int, *, partials: bool, steps: int, seed: int) -> float:
    """The largest error, relative to max |K|, of a gain learned by a linear network u = W z + c.

    The teacher is u = −K z at one speed, without limits of the steering angle.
    """
    gain, _ = Lqr().solution(speed)
    z, _ = samples(states, seed)
    x, known = torch.from_numpy(z).float(), torch.from_numpy(-gain).float()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        student = nn.Linear(4, 2)
    unit = torch.tensor(ACCEPTED)
    fit_surrogate(
        x,
        x @ known.T,
        jacobian=known.expand(states, 2, 4),
        partials="jacobian" if partials else "none",
        weight=1.0,
        student=student,
        x_scale=unit,
        y_scale=torch.full((2,), float((known.abs() * unit).max())),
        steps=steps,
        lr=0.2,
        seed=seed,
    )
    return float((student.weight.detach() - known).abs().max() / known.abs().max())


class _Angles(nn.Module):
    """A network for each angle, side by side."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([network(x) for network in self.networks], 1)


def below_limits(
    x: Float[Tensor, "sample 5"], y: Float[Tensor, "sample 2"], partials: Float[Tensor, "sample 2 5"], learn: Learn
) -> tuple[nn.Module, dict[str, float]]:
    """Train a network for each angle, on the states in which the angle is below its limit, and add up their measures.

    The angles of a controller are clipped at the limits, so its networks need not learn the kink. Where fewer than two
    states are below a limit, all are used.
    """
    networks, measures = [], Counter[str]()
    for k, limit in enumerate(LARGEST):
        free = y[:, k].abs() < limit
        rows = free if int(free.sum()) > 1 else torch.ones_like(free)
        network, measured = learn((x[rows], y[rows, k : k + 1]), partials[rows, k : k + 1])
        networks.append(network)
        measures.update(measured)
    return _Angles(networks), dict(measures)


def as_controller(student: nn.Module) -> Controller:
    """A network of (z, V) as a controller of a car with the same steering limits as the teacher."""

    def steered(z: Array, speed: Array) -> Array:
        x = torch.from_numpy(np.concatenate((z, speed[:, None]), 1)).float()
        with torch.no_grad():
            return np.clip(student(x).double().numpy(), -LARGEST, LARGEST)

    return steered


def loops(student: nn.Module) -> tuple[Array, Array]:
    """At each speed of `GRID`: the largest real part of the closed loop's eigenvalues, and the error of the gain.

    Both by the network's Jacobian at z = 0; the error is ‖J + K‖/‖K‖ with the columns in units of `ACCEPTED`.
    """
    x = torch.zeros(len(GRID), 5)
    x[:, 4] = torch.from_numpy(GRID)
    by_state = jacobian(student, x)[1].detach().double().numpy()[..., :4]
    teacher, unit = Scheduled().lqr, np.array(ACCEPTED)
    parts = [largest_real_part(teacher.vehicle, each, speed) for each, speed in zip(by_state, GRID, strict=True)]
    gains = np.stack([teacher.solution(speed)[0] for speed in GRID])
    error = np.linalg.norm((by_state + gains) * unit, axis=(1, 2)) / np.linalg.norm(gains * unit, axis=(1, 2))
    return np.array(parts), error


def regret(student: nn.Module) -> Array:
    """Return the relative excess of the cost over the teacher's, for each of `CARS` drives."""
    z, speed = samples(CARS, _CAR_SEED)
    cost = drive(Scheduled().lqr.vehicle, as_controller(student), z, speed).cost
    return cost / _teachers_costs() - 1


@lru_cache(maxsize=1)
def _teachers_costs() -> Array:
    z, speed = samples(CARS, _CAR_SEED)
    return drive(Scheduled().lqr.vehicle, Scheduled(), z, speed).cost
