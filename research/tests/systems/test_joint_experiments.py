"""The experiments `kinematics`, `grasp` and `steering`: what their tables say of numbers, and runs of smoke size."""

import json

import numpy as np
import pytest
import torch

from jacmatch.surrogates import JacobianRegressor
from jacmatch_research.reproduce import EXPERIMENTS, grasp, steering
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.equal_error import ADAM, DERIVATIVES, METHODS, VALUES, curves, reached, surrogate


def document(errors):
    cells = [
        {"row": row, "column": str(samples), "seed": seed, "measures": {"error": error * (0.9 + 0.2 * seed)}}
        for (row, samples), error in errors.items()
        for seed in range(2)
    ]
    return {"cells": cells}


def test_samples_with_partials_are_compared_with_values_alone_at_each_number():
    errors = {(VALUES, 100): 0.4, (DERIVATIVES, 100): 0.08, (VALUES, 400): 0.04, (DERIVATIVES, 400): 0.02}
    rows = reached(document(errors), [("error", "e, mm", 1e3, 1)])
    assert rows == [
        ("e, mm, n = 100", "400", "100", "100 %", "–"),
        ("e, mm, n = 400", "40", "400", "100 %", "200 (50 %)"),
    ]
    rows = reached(document({**errors, (VALUES, 400): 0.001}), [("error", "e", 1, 1)])
    assert rows[1] == ("e, n = 400", "0.001", "none", "–", "–")


def test_the_second_order_solver_learns_values_alone_or_partials_too():
    """A cubic at five points: its derivative there tells two functions apart that agree at the points."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    partials = (3 * x**2)[:, :, None]
    settings = {"partials": True, "hidden": (16,), "activation": "silu", "evaluations": 400}
    network, measured = surrogate((x, x**3), partials, settings, seed=0)
    between = torch.tensor([[-0.75], [0.25]])
    torch.testing.assert_close(network(between).detach(), between**3, atol=5e-3, rtol=0)
    assert measured["evaluations"] >= 400
    assert measured["cpu_seconds"] > 0
    model = JacobianRegressor("network", "lbfgs", (16,), starts=1, max_evaluations=400, random_state=0)
    alone, _ = surrogate((x, x**3), partials * float("nan"), {**settings, "partials": False}, seed=0)
    expected = model.fit(x.numpy(), x.numpy() ** 3).predict(between.numpy())
    np.testing.assert_allclose(alone(between).detach(), expected, atol=1e-5)


def test_adam_takes_the_steps_of_its_cell():
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    settings = {"partials": True, "hidden": (4,), "activation": "tanh", "steps": 3}
    settings |= {"lr": 0.05, "weight": 1.0, "probes": 1, "batch_size": 8}
    network, measured = surrogate((x, x), torch.ones(8, 1, 1), settings, seed=0)
    assert measured["evaluations"] == 3
    assert network(x.float()).shape == (8, 1)


def test_samples_with_large_partials_weigh_less():
    q = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    weights = grasp._by_size(q, q, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None, None])
    torch.testing.assert_close(weights, torch.tensor([1 / 1.25, 1 / 2, 1 / 5], dtype=torch.float64))


def test_curves_leave_out_what_a_logarithm_cannot_show():
    lines = curves(document({(VALUES, 100): 0.0, (VALUES, 50): 0.3, (DERIVATIVES, 50): 0.1}), "error", 10)
    assert [(line.label, line.x) for line in lines] == [(VALUES, [50.0]), (DERIVATIVES, [50.0])]
    assert lines[0].mean == pytest.approx([3.0])


@pytest.mark.ci
def test_smoke_run_of_kinematics(as_users_run, tmp_path):
    result = Reproduce(name="kinematics", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [3, 3, 4, 5]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    by_row = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert by_row[DERIVATIVES]["partials"] < by_row[VALUES]["partials"]
    assert all(cell["measures"]["into"] == 0 for cell in stored["cells"])  # measured poses: nothing to jump to
    own = stored["facts"]["exact"]
    assert own["reached"] > 0.5
    assert own["into"] == 0
    assert own["cold_into"] > 0.3
    assert EXPERIMENTS["kinematics"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()


@pytest.mark.ci
def test_smoke_run_of_grasp(as_users_run, tmp_path):
    result = Reproduce(name="grasp", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [6, 6, 5, 7]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    for cell in stored["cells"]:
        assert cell["measures"]["power"] < 1e-4
        if cell["row"] not in grasp.INVERSE.values():
            assert cell["measures"]["torque"] == pytest.approx(cell["measures"]["partials"], rel=0.2)
    by_row = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert by_row[DERIVATIVES]["torque"] < by_row[VALUES]["torque"]
    agreed = stored["facts"]["agreement"]
    assert agreed["regular"]["velocities"] < 1e-10
    assert agreed["regular"]["torques"] < 1e-10
    assert agreed["0.9999"]["jacobian"] > 1e3 * agreed["0"]["jacobian"]


@pytest.mark.ci
def test_smoke_run_of_steering(as_users_run, tmp_path):
    result = Reproduce(name="steering", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [5, 6, 2, 4]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    by_row = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert by_row[steering.ONE_DERIVATIVES]["gain_error"] < by_row[steering.ONE_VALUES]["gain_error"]
    assert by_row[DERIVATIVES]["rmse"] < by_row[VALUES]["rmse"]
    drives = {(row["task"], row["speed"], row["wheels"]): row for row in stored["facts"]["drives"]}
    for task, speed, wheels in drives:
        if wheels == 4:
            assert drives[task, speed, 4]["cost"] <= drives[task, speed, 2]["cost"]
    assert by_row[steering.FREE[DERIVATIVES]]["rmse"] < by_row[DERIVATIVES]["rmse"]
    assert {*METHODS, ADAM} <= set(by_row)
