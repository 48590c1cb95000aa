"""The potential against definitions, autograd and known minima; the motion against conservation; networks likewise."""

import math

import pytest
import torch
from scipy.optimize import minimize

from jacmatch import jacobian
from jacmatch.errors import InputError
from jacmatch_research.systems.force_field.dynamics import State, at_rest, thermal, verlet
from jacmatch_research.systems.force_field.learning import EnergyNetwork, ForceField
from jacmatch_research.systems.force_field.lennard_jones import ARGON, bipyramid, energy, forces, hessian


def clusters(count=3, atoms=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)[:atoms] * 1.2
    return grid + 0.15 * torch.randn(count, atoms, 3, generator=generator, dtype=torch.float64)


def test_energy_is_the_sum_over_pairs():
    x = clusters()
    for cluster, got in zip(x, energy(x), strict=True):
        expected = 0.0
        for i in range(5):
            for j in range(i):
                r = math.dist(cluster[i].tolist(), cluster[j].tolist())
                expected += 4 * (r**-12 - r**-6)
        assert float(got) == pytest.approx(expected, rel=1e-12)


def test_forces_and_hessian_are_the_derivatives():
    x = clusters()
    gradients = torch.func.vmap(torch.func.grad(lambda y: energy(y[None])[0]))(x)
    torch.testing.assert_close(forces(x), -gradients, rtol=1e-11, atol=1e-11)
    curvatures = torch.func.vmap(torch.func.hessian(lambda y: energy(y.reshape(1, 5, 3))[0]))(x.flatten(1))
    torch.testing.assert_close(hessian(x), curvatures, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("atoms", "lowest"), [(2, -1.0), (3, -3.0), (4, -6.0), (7, -16.505384)])
def test_minima_are_those_of_the_cambridge_cluster_database(atoms, lowest):
    start = bipyramid()[:atoms] if atoms == 7 else clusters(1, atoms)[0]

    def value_and_gradient(flat):
        x = torch.from_numpy(flat).reshape(1, atoms, 3)
        return float(energy(x)), -forces(x).flatten().numpy()

    minimum = minimize(value_and_gradient, start.flatten().numpy(), jac=True, options={"gtol": 1e-8})
    assert minimum.fun == pytest.approx(lowest, abs=1e-6)
    if atoms == 7:
        assert float(energy(start[None])) == pytest.approx(lowest, abs=1e-5)
        assert float(forces(start[None]).abs().max()) < 1e-2


def test_argon_in_si_units():
    assert pytest.approx(2.156e-12, rel=1e-3) == ARGON.time  # as in textbooks on simulation
    assert pytest.approx(10.32, rel=1e-3) == ARGON.millielectronvolts
    assert ARGON.kelvins(1.0) == pytest.approx(119.8)


def drift(step, steps):
    start = thermal(forces, bipyramid()[None], 0.1, seed=0, steps=100)
    seen = []
    verlet(forces, start, steps=steps, step=step, watch=lambda s: seen.append(float(energy(s.x) + s.kinetic)))
    return max(abs(value - seen[0]) for value in seen)


def test_verlet_conserves_energy_to_second_order_and_runs_backwards():
    coarse, fine = drift(0.01, 200), drift(0.005, 400)
    assert coarse < 2e-2
    assert coarse / fine == pytest.approx(4, rel=0.3)
    start = thermal(forces, bipyramid()[None], 0.1, seed=0, steps=100)
    end = verlet(forces, start, steps=100, step=0.01, watch=lambda state: None)
    back = verlet(forces, State(end.x, -end.v), steps=100, step=0.01, watch=lambda state: None)
    torch.testing.assert_close(back.x, start.x, rtol=0, atol=1e-9)
    with pytest.raises(
        InputError, match=r"`steps`, `every` and `step` of `verlet` must be positive\. Got \(0, 1, 0\.1\)"
    ):
        verlet(forces, start, steps=0, step=0.1, watch=lambda state: None)


@pytest.mark.ci
def test_samples_have_their_temperature_and_do_not_drift_or_spin():
    temperatures = torch.tensor([0.05, 0.1], dtype=torch.float64).repeat_interleave(300)
    state = thermal(forces, bipyramid().expand(600, -1, -1), temperatures, seed=1, steps=400)
    momentum, spin = state.v.sum(1), torch.linalg.cross(state.x, state.v).sum(1)
    assert float(momentum.abs().max()) < 1e-12
    assert float(spin.abs().max()) < 1e-12
    freedom = 3 * 7 - 6
    measured = 2 * state.kinetic / freedom
    for temperature in (0.05, 0.1):
        mine = measured[temperatures == temperature]
        assert float(mine.mean()) == pytest.approx(temperature, rel=4.5 * math.sqrt(2 / freedom / 300))


def test_at_rest_changes_nothing_else():
    state = at_rest(State(clusters(), clusters(seed=1)))
    again = at_rest(state)
    torch.testing.assert_close(again.x, state.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.v, state.v, rtol=0, atol=1e-12)


def network(**settings):
    torch.manual_seed(0)
    return EnergyNetwork(5, radial=6, hidden=(8, 8), **settings).double()


def test_energies_of_a_network_do_not_depend_on_position_orientation_or_order():
    net, x = network(), clusters()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    moved = (x @ turn.T + torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))[:, torch.tensor([3, 1, 4, 0, 2])]
    torch.testing.assert_close(net(moved.flatten(1)), net(x.flatten(1)), rtol=1e-10, atol=1e-12)
    assert net(x.flatten(1)).std() > 1e-6


def test_a_force_field_has_forces_and_the_hessian_as_derivatives():
    net, x = network(scale=2.0, shift=3.0), clusters().flatten(1)
    field = ForceField(net, energy_unit=4.0, force_unit=5.0)
    outputs, derivatives = jacobian(field, x)
    torch.testing.assert_close(outputs[:, :1], net(x) / 4)
    gradient = torch.func.vmap(torch.func.grad(lambda y: net(y[None])[0, 0]))(x)
    torch.testing.assert_close(outputs[:, 1:], -gradient / 5)
    torch.testing.assert_close(derivatives[:, 0], gradient / 4)
    curvature = torch.func.vmap(torch.func.hessian(lambda y: net(y[None])[0, 0]))(x)
    torch.testing.assert_close(derivatives[:, 1:], -curvature / 5, rtol=1e-8, atol=1e-10)
    derivatives[:, 3].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [net.layers[0].weight, net.layers[2].weight])


def test_too_few_atoms_are_refused():
    with pytest.raises(InputError, match=r"`atoms` and `radial` of `EnergyNetwork` must be at least 2\. Got \(1, 4\)"):
        EnergyNetwork(1, radial=4, hidden=(4,))
