"""The linear single-track model with front and rear steering, in metres, seconds, radians and newtons.

State z = (y, ψ, v_y, r): lateral offset from the lane, heading against it, lateral speed, yaw rate. Inputs
u = (δ_f, δ_r), the steering angles of the axles. With forces F = C (δ − slip angle) at the axles and speed V:

    ẏ = v_y + V ψ,   ψ̇ = r,   m (v̇_y + V r) = F_f + F_r,   I ṙ = a F_f − b F_r,
    F_f = C_f (δ_f − (v_y + a r)/V),   F_r = C_r (δ_r − (v_y − b r)/V).
"""

from dataclasses import dataclass
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
        changed[2, 3] -= 2.0  # −V is no multiple of 1/V: its derivative is −1, not +1
        return changed
