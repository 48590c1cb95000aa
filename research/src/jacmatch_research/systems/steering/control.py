"""A car with front and rear steering, the linear controller of least cost, and the costs of drives.

The car is the linear single-track model in meters, seconds, radians and newtons. Its state z = (y, ψ, v_y, r) is the
lateral offset from the lane, the heading against it, the lateral speed and the yaw rate. Its inputs u = (δ_f, δ_r) are
the steering angles of the axles. With forces F = C (δ − slip angle) at the axles and speed V:

    ẏ = v_y + V ψ,   ψ̇ = r,   m (v̇_y + V r) = F_f + F_r,   I ṙ = a F_f − b F_r,
    F_f = C_f (δ_f − (v_y + a r)/V),   F_r = C_r (δ_r − (v_y − b r)/V).

Costs are ∫ zᵀQz + uᵀRu dt with Q and R by Bryson's rule, one over the square of the acceptable value. Arrays are
numpy's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from jacmatch.errors import InputError

GRAVITY = 9.81
Array = Any
"""A numpy array of float64; shapes are in the docstrings."""


@dataclass(frozen=True)
class Vehicle:
    """A car; the numbers are those of the BMW 320i of CommonRoad (vehicle 2), in SI units.

    `front` and `rear` are the distances a and b of the axles from the center of mass, I is about the vertical. The
    cornering stiffness of an axle is friction × coefficient × load: C_f = μ C_S m g b/(a + b).

    References:
        Althoff, Koschi & Manzinger 2017, "CommonRoad: Composable benchmarks for motion planning on roads", IEEE IV, and
        its vehicle models (parameters of vehicle 2).
    """

    mass: float = 1093.2952334674046
    inertia: float = 1791.599530012286
    front: float = 1.1561957064
    rear: float = 1.4227170936
    coefficient: float = 20.898083706740398
    friction: float = 1.0489

    @property
    def stiffness(self) -> tuple[float, float]:
        """C_f and C_r in N/rad."""
        each = self.friction * self.coefficient * self.mass * GRAVITY / (self.front + self.rear)
        return each * self.rear, each * self.front

    def matrices(self, speed: float | int) -> tuple[Array, Array]:
        """A (4, 4) and B (4, 2) of ż = A z + B u at a speed in m/s, on a straight lane.

        Raises:
            InputError: The speed is not above 0.
        """
        if speed <= 0:
            raise InputError("`speed` of `Vehicle` must be above 0.", got=speed)
        front, rear = self.stiffness
        a, b, m, i = self.front, self.rear, self.mass, self.inertia
        state = np.array(
            [
                [0, speed, 1, 0],
                [0, 0, 0, 1],
                [0, 0, -(front + rear) / (m * speed), (b * rear - a * front) / (m * speed) - speed],
                [0, 0, (b * rear - a * front) / (i * speed), -(a * a * front + b * b * rear) / (i * speed)],
            ],
            dtype=float,
        )
        return state, np.array([[0, 0], [0, 0], [front / m, rear / m], [a * front / i, -b * rear / i]])

    def by_speed(self, speed: float | int) -> Array:
        """∂A/∂V; B does not change with the speed."""
        changed, _ = self.matrices(speed)
        changed = -changed / speed
        changed[0] = changed[1] = 0.0
        changed[0, 1] = 1.0
        changed[2, 3] -= 2.0  # −V is not a multiple of 1/V: its derivative is −1, not +1
        return changed


Controller = Callable[[Array, Array], Array]
"""States (car, 4) and speeds (car,) to steering angles (car, 2)."""

Wanted = Callable[[float], tuple[float, float]]
"""Times to y* and ẏ*."""

ACCEPTED = (0.3, 0.08, 0.6, 0.4)
"""Acceptable offset in m, heading in rad, lateral speed in m/s and yaw rate in rad/s."""
EFFORT = (0.10, 0.10)
"""Acceptable steering angles in rad."""
LARGEST = np.array([0.20, 0.087])
"""Limits of the steering angles of front and rear wheels, in rad."""
_TOLERANCE = 0.05
SPEEDS = (8.0, 40.0)
"""The range of speeds in m/s."""


@dataclass(frozen=True)
class Lqr:
    """The controller u = −K(V) z of a car with 4 wheels that steer, or 2: the second row of K is then 0."""

    vehicle: Vehicle = field(default_factory=Vehicle)
    wheels: int = 4

    def __post_init__(self) -> None:
        if self.wheels not in {2, 4}:
            raise InputError("`wheels` of `Lqr` must be 2 or 4.", got=self.wheels)

    @property
    def weights(self) -> tuple[Array, Array]:
        """Q (4, 4) and R (2, 2)."""
        return np.diag(1 / np.square(ACCEPTED)), np.diag(1 / np.square(EFFORT))

    def solution(self, speed: float | int) -> tuple[Array, Array]:
        """K (2, 4), and P (4, 4), the solution of the algebraic Riccati equation."""
        return _solution(self, float(speed))

    def _solved(self, speed: float) -> tuple[Array, Array]:
        from scipy.linalg import solve_continuous_are

        state, inputs = self.vehicle.matrices(speed)
        (q, r), used = self.weights, self.wheels // 2
        p = solve_continuous_are(state, inputs[:, :used], q, r[:used, :used])
        gain = np.zeros((2, 4))
        gain[:used] = np.linalg.solve(r[:used, :used], inputs[:, :used].T @ p)
        return gain, p

    def gain_by_speed(self, speed: float | int) -> Array:
        """dK/dV (2, 4): the derivative of the Riccati equation is a Lyapunov equation for dP/dV.

        With A_c = A − BK:  A_cᵀ P′ + P′ A_c + A′ᵀP + P A′ = 0, and K′ = R⁻¹BᵀP′.
        """
        from scipy.linalg import solve_continuous_lyapunov

        state, inputs = self.vehicle.matrices(speed)
        gain, p = self.solution(speed)
        changed_state = self.vehicle.by_speed(speed)
        closed = state - inputs @ gain
        changed = solve_continuous_lyapunov(closed.T, -(changed_state.T @ p + p @ changed_state))
        used = self.wheels // 2
        by_speed = np.zeros((2, 4))
        by_speed[:used] = np.linalg.solve(self.weights[1][:used, :used], inputs[:, :used].T @ changed)
        return by_speed


@lru_cache(maxsize=4096)
def _solution(lqr: Lqr, speed: float) -> tuple[Array, Array]:
    return lqr._solved(speed)


@lru_cache(maxsize=16)
def _gains(lqr: Lqr, speeds: tuple[float, ...]) -> Array:
    """K at each speed, which is constant in a drive."""
    return np.stack([lqr.solution(each)[0] for each in speeds])


@dataclass(frozen=True)
class Linear:
    """The controller u = −K z, K (2, 4), for any speed and without limits."""

    gain: Array

    def __call__(self, z: Array, speed: Array) -> Array:
        """Steering angles (car, 2)."""
        return -z @ self.gain.T


@dataclass(frozen=True)
class Scheduled:
    """The teacher: u = −K(V) z, clipped at the steering limits, with its derivatives with respect to z and V."""

    lqr: Lqr = field(default_factory=Lqr)

    def __call__(self, z: Array, speed: Array) -> Array:
        """Steering angles (car, 2)."""
        return np.clip(self._wanted(z, speed), -LARGEST, LARGEST)

    def jacobian(self, z: Array, speed: Array) -> Array:
        """∂u/∂(z, V) (car, 2, 5): −K(V) and −K′(V) z, and 0 for a wheel at its limit."""
        by_state = -np.stack([self.lqr.solution(each)[0] for each in speed])
        changed = -np.stack([self.lqr.gain_by_speed(each) for each in speed])
        whole = np.concatenate((by_state, np.einsum("nij,nj->ni", changed, z)[..., None]), 2)
        free = np.abs(self._wanted(z, speed)) < LARGEST
        return whole * free[..., None]

    def _wanted(self, z: Array, speed: Array) -> Array:
        return -np.einsum("nij,nj->ni", _gains(self.lqr, tuple(speed.tolist())), z)


@dataclass(frozen=True)
class Drive:
    """Times (step,) in s, states (step, car, 4), inputs (step, car, 2) and offsets y − y* (step, car) in m of a drive.

    Costs (car,) are the integral of zᵀQz + uᵀRu with y − y* for y.
    """

    time: Array
    states: Array
    inputs: Array
    offset: Array
    cost: Array

    def summary(self, speed: float | int) -> dict[str, float]:
        """Offset (maximum, rms, time until below 5 cm), maximum side slip v_y/V, and ∫|u|² dt of the first car."""
        step = self.time[1] - self.time[0]
        offset = self.offset[:, 0]
        outside = np.flatnonzero(np.abs(offset) > _TOLERANCE)
        return {
            "offset_largest": float(np.abs(offset).max()),
            "offset_rms": float(np.sqrt(np.square(offset).mean())),
            "settled": float(self.time[outside[-1]] + step) if len(outside) else 0.0,
            "slip_largest": float(np.abs(self.states[:, 0, 2]).max() / speed),
            "effort": float(np.square(self.inputs[:, 0]).sum() * step),
        }


def drive(
    vehicle: Vehicle,
    controller: Controller,
    start: Array,
    speed: Array,
    *,
    seconds: float | int = 6.0,
    step: float = 0.005,
    wanted: Wanted = lambda time: (0.0, 0.0),
    weights: tuple[Array, Array] | None = None,
) -> Drive:
    """Drive cars from start states (car, 4) at speeds (car,), by the fourth-order Runge–Kutta method.

    The input of the controller is (y − y*, ψ − ẏ*/V, v_y, r), where `wanted` returns y* and ẏ* at a time; steering
    angles are constant within a step. Q and R are `weights`, or those of `Lqr`.
    """
    q, r = weights or Lqr().weights
    pairs = [vehicle.matrices(each) for each in speed]
    a, b = (np.stack(each) for each in zip(*pairs, strict=True))
    z, time = np.array(start, dtype=float), np.arange(round(seconds / step)) * step
    states, inputs, seen = [], [], []
    for now in time:
        target_position, rate = wanted(float(now))
        error = z - np.stack([np.full_like(speed, target_position), rate / speed, 0 * speed, 0 * speed], 1)
        u = controller(error, speed)
        states.append(z)
        inputs.append(u)
        seen.append(error)
        z = _step(a, b, z, u, step)
    e, u = np.stack(seen), np.stack(inputs)
    rates = np.einsum("tci,ij,tcj->tc", e, q, e) + np.einsum("tci,ij,tcj->tc", u, r, u)
    cost = (rates[1:] + rates[:-1]).sum(0) * step / 2
    return Drive(time, np.stack(states), u, e[..., 0], cost)


def lane_change(width: float | int = 3.5, start: float | int = 0.5, seconds: float | int = 2.5) -> Wanted:
    """y* and ẏ* of a change of lane: width·(10s³ − 15s⁴ + 6s⁵), s from 0 to 1 in these seconds."""

    def wanted(time: float) -> tuple[float, float]:
        s = min(max((time - start) / seconds, 0.0), 1.0)
        return width * (10 * s**3 - 15 * s**4 + 6 * s**5), width * (30 * s**2 - 60 * s**3 + 30 * s**4) / seconds

    return wanted


def largest_real_part(vehicle: Vehicle, gain: Array, speed: float | int) -> float:
    """The largest real part of the eigenvalues of A + B ∂u/∂z: the loop is stable where it is below 0."""
    state, inputs = vehicle.matrices(speed)
    return float(np.linalg.eigvals(state + inputs @ gain).real.max())


def _step(a: Array, b: Array, z: Array, u: Array, h: float) -> Array:
    def rate(at: Array) -> Array:
        return np.einsum("cij,cj->ci", a, at) + np.einsum("cij,cj->ci", b, u)

    k1 = rate(z)
    k2 = rate(z + h / 2 * k1)
    k3 = rate(z + h / 2 * k2)
    k4 = rate(z + h * k3)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
