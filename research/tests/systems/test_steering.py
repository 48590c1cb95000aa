"""The car against its equations of motion, the controller against its cost, derivatives against differences."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm, solve_continuous_lyapunov

from jacmatch.errors import InputError
from jacmatch_research.systems.steering.control import (
    ACCEPTED,
    LARGEST,
    Linear,
    Lqr,
    Scheduled,
    Vehicle,
    drive,
    lane_change,
    largest_real_part,
)
from jacmatch_research.systems.steering.learning import GRID, below_limits, gain_error, loops, regret, samples, taught

CAR = Vehicle()


def accelerations(z, u, speed):
    """Newton's and Euler's laws with forces at the axles, written without matrices."""
    front, rear = CAR.stiffness
    _, heading, lateral, yaw = z
    force_front = front * (u[0] - (lateral + CAR.front * yaw) / speed)
    force_rear = rear * (u[1] - (lateral - CAR.rear * yaw) / speed)
    return [
        lateral + speed * heading,
        yaw,
        (force_front + force_rear) / CAR.mass - speed * yaw,
        (CAR.front * force_front - CAR.rear * force_rear) / CAR.inertia,
    ]


@pytest.mark.parametrize("speed", [8.0, 30.0])
def test_the_matrices_are_those_of_the_forces_at_the_axles(speed):
    a, b = CAR.matrices(speed)
    random = np.random.default_rng(0)
    for z, u in zip(random.normal(size=(5, 4)), random.normal(size=(5, 2)), strict=True):
        np.testing.assert_allclose(a @ z + b @ u, accelerations(z, u, speed), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(
        CAR.by_speed(speed), (CAR.matrices(speed + 1e-5)[0] - CAR.matrices(speed - 1e-5)[0]) / 2e-5, atol=1e-6
    )


def test_the_car_turns_as_the_textbook_says():
    """Yaw rate in steady cornering: V/(L + K V²) for a steered front, K = m (b C_r − a C_f)/(L C_f C_r)."""
    front, rear = CAR.stiffness
    base = CAR.front + CAR.rear
    understeer = CAR.mass * (CAR.rear * rear - CAR.front * front) / (base * front * rear)
    a, b = CAR.matrices(20.0)
    steady = np.linalg.solve(a[2:, 2:], -b[2:] @ [0.01, 0])
    assert steady[1] == pytest.approx(0.01 * 20 / (base + understeer * 400), rel=1e-12)
    both = np.linalg.solve(a[2:, 2:], -b[2:] @ [0.01, 0.01])
    assert both[1] == pytest.approx(0, abs=1e-12)  # wheels in parallel: it slides aside and does not turn


@pytest.mark.parametrize("wheels", [2, 4])
def test_no_gain_nearby_costs_less(wheels):
    """The cost of a gain from four states, by a Lyapunov equation: Riccati's costs zᵀPz, and gains nearby cost more."""
    lqr, start = Lqr(CAR, wheels), np.diag(ACCEPTED)
    gain, p = lqr.solution(20.0)
    (a, b), (q, r), random = CAR.matrices(20.0), lqr.weights, np.random.default_rng(0)

    def cost(used):
        closed = a - b @ used
        return np.trace(start @ solve_continuous_lyapunov(closed.T, -(q + used.T @ r @ used)) @ start)

    assert cost(gain) == pytest.approx(np.trace(start @ p @ start), rel=1e-9)
    for _ in range(20):
        assert cost(gain * (1 + 0.1 * random.normal(size=(2, 4)))) > cost(gain)
    assert (gain[wheels // 2 :] == 0).all()
    driven = drive(CAR, Linear(gain), start, np.full(4, 20.0), seconds=3, step=0.002)
    assert driven.cost.sum() == pytest.approx(cost(gain), rel=0.01)


def test_derivatives_of_the_controller_are_those_of_differences():
    z, speed = samples(40, seed=1)
    teacher, h = Scheduled(), 1e-5
    derivatives = teacher.jacobian(z, speed)
    inside = np.abs(np.abs(teacher._wanted(z, speed)) - LARGEST).min(1) > 1e-3
    assert (derivatives[..., :4] == 0).all(2).any()
    for k in range(5):
        step, faster = h * (np.arange(4) == k), h * (k == 4)
        ends = [teacher(z + sign * step, speed + sign * faster) for sign in (1, -1)]
        np.testing.assert_allclose(derivatives[inside, :, k], (ends[0] - ends[1])[inside] / (2 * h), atol=1e-6)


def test_a_drive_is_the_exponential_of_the_closed_loop():
    gain, _ = Lqr().solution(15.0)
    a, b = CAR.matrices(15.0)
    start = np.array([[0.4, 0.05, 0.2, -0.1]])
    motion = drive(CAR, Linear(gain), start, np.array([15.0]), seconds=1, step=0.001)
    np.testing.assert_allclose(motion.states[-1, 0], expm((a - b @ gain) * 0.999) @ start[0], atol=2e-3)
    assert motion.inputs.shape == (1000, 1, 2)
    summary = motion.summary(15.0)
    assert summary["offset_largest"] == pytest.approx(0.4, rel=0.1)
    assert summary["effort"] > 0


def test_a_lane_change_starts_and_ends_at_rest():
    wanted = lane_change(width=3.0, start=1.0, seconds=2.0)
    assert wanted(0.5) == (0.0, 0.0)
    assert wanted(4.0) == (3.0, 0.0)
    assert wanted(2.0)[0] == pytest.approx(1.5)
    assert wanted(2.0)[1] == pytest.approx((wanted(2.0 + 1e-6)[0] - wanted(2.0 - 1e-6)[0]) / 2e-6, rel=1e-6)


def test_four_wheels_cost_no_more_than_two():
    for speed in (8.0, 20.0, 40.0):
        two, four = (np.linalg.eigvalsh(Lqr(CAR, wheels).solution(speed)[1]) for wheels in (2, 4))
        assert (four <= two + 1e-9).all()


@pytest.mark.ci
def test_one_state_with_its_derivatives_gives_the_gain():
    assert gain_error(20.0, 1, partials=True, steps=300, seed=0) <= 1e-6


def test_a_network_that_is_the_controller_has_no_regret():
    """The teacher's gain at one speed as a network: exact there, stable, and worse elsewhere."""
    gain = Lqr().solution(float(GRID[8]))[0]

    class OneGain(torch.nn.Module):
        def forward(self, x):
            limit = torch.from_numpy(LARGEST).float()
            return torch.clamp(-x[:, :4] @ torch.from_numpy(gain).float().T, -limit, limit)

    parts, error = loops(OneGain())
    assert error[8] == pytest.approx(0, abs=1e-6)
    assert error[0] > 0.05
    assert parts[8] == pytest.approx(largest_real_part(CAR, -gain, GRID[8]), abs=1e-4)
    more = regret(OneGain())
    assert (more > -0.05).all()
    assert np.median(more) < 0.1


def test_what_is_learned_from_is_what_the_controller_does():
    x, y, partials = taught(30, seed=3)
    assert x.shape == (30, 5)
    np.testing.assert_allclose(y, Scheduled()(x[:, :4].double().numpy(), x[:, 4].double().numpy()), atol=1e-5)
    assert partials.shape == (30, 2, 5)


def test_below_limits_a_controller_at_one_speed_is_linear():
    """Least squares on the states below the limit gives the row of the gain, whatever the other states say."""
    x, y, partials = taught(60, seed=3)
    x[:, 4] = 20.0
    gain = torch.from_numpy(Lqr().solution(20.0)[0])
    y = torch.clamp(-x[:, :4] @ gain.T, -torch.from_numpy(LARGEST), torch.from_numpy(LARGEST))

    def least_squares(points, _):
        network = torch.nn.Linear(5, 1, bias=False)
        solution = torch.linalg.lstsq(points[0][:, :4], points[1]).solution
        network.weight.data = torch.cat((solution, torch.zeros(1, 1, dtype=torch.float64))).T.float()
        return network, {"cpu_seconds": 1.0}

    network, measured = below_limits(x, y, partials, least_squares)
    torch.testing.assert_close(network(x.float()), (-x[:, :4] @ gain.T).float(), atol=1e-6, rtol=0)
    assert measured == {"cpu_seconds": 2.0}
    y[:] = 1.0
    seen = []
    below_limits(x, y, partials, lambda points, _: (seen.append(len(points[0])), (torch.nn.Identity(), {}))[1])
    assert seen == [60, 60]


def test_bad_numbers_are_refused():
    with pytest.raises(InputError, match=r"`speed` of `Vehicle` must be above 0\. Got 0\."):
        CAR.matrices(0.0)
    with pytest.raises(InputError, match=r"`wheels` of `Lqr` must be 2 or 4\. Got 3\."):
        Lqr(CAR, 3)
