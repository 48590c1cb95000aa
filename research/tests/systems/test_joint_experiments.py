"""The experiments `kinematics`, `grasp` and `steering`: what their tables say of numbers, and runs of smoke size."""

import json

import pytest
import torch

from jacmatch_research.reproduce import EXPERIMENTS, steering
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.equal_error import DERIVATIVES, METHODS, VALUES, best_of_lengths, curves, reached


def document(errors):
    cells = [
        {"row": row, "column": str(samples), "seed": seed, "measures": {"error": error * (0.9 + 0.2 * seed)}}
        for (row, samples), error in errors.items()
        for seed in range(2)
    ]
    return {"cells": cells}


def test_samples_with_slopes_are_compared_with_values_alone_at_each_number():
    errors = {(VALUES, 100): 0.4, (DERIVATIVES, 100): 0.08, (VALUES, 400): 0.04, (DERIVATIVES, 400): 0.02}
    rows = reached(document(errors), [("error", "e, mm", 1e3)])
    assert rows == [
        ("e, mm, n = 100", "400", "100", "100 %", "–"),
        ("e, mm, n = 400", "40", "400", "100 %", "200 (50 %)"),
    ]
    rows = reached(document({**errors, (VALUES, 400): 0.001}), [("error", "e", 1)])
    assert rows[1] == ("e, n = 400", "0.001", "none", "–", "–")


def test_of_the_lengths_the_one_whose_values_are_best_at_held_out_points_is_kept():
    """The held-out points contradict those to learn from: the less is learned, the better."""
    x = torch.linspace(-1, 1, 8)[:, None]
    points, held = (x, x), (x, -x)
    asked = {"slopes": "none", "probes": 1, "weight": 0.0, "hidden": (4,), "activation": "tanh", "batch_size": 8}
    asked |= {"lr": 0.05, "lengths": (40, 1)}
    network, found = best_of_lengths(points, torch.zeros(8, 1, 1), held, asked, seed=0)
    assert found["steps"] == 1
    wrong = (network(held[0]) - held[1]).detach()
    assert found["held_error"] == pytest.approx(float(wrong.square().mean().sqrt() / held[1].std(correction=0)))
    _, other = best_of_lengths(points, torch.zeros(8, 1, 1), points, asked, seed=0)
    assert other["steps"] == 40


def test_curves_leave_out_what_a_logarithm_cannot_show():
    lines = curves(document({(VALUES, 100): 0.0, (VALUES, 50): 0.3, (DERIVATIVES, 50): 0.1}), "error", 10)
    assert [(line.label, line.x) for line in lines] == [(VALUES, [50.0]), (DERIVATIVES, [50.0])]
    assert lines[0].mean == pytest.approx([3.0])


@pytest.mark.ci
def test_smoke_run_of_kinematics(as_users_run, tmp_path):
    result = Reproduce(name="kinematics", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [2, 3, 3, 4]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    by_row = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert by_row[DERIVATIVES]["slope"] < by_row[VALUES]["slope"]
    assert all(cell["measures"]["into"] == 0 for cell in stored["cells"])  # measured poses: nothing to jump to
    own = stored["facts"]["exact"]
    assert own["reached"] > 0.5
    assert own["into"] == 0
    assert own["cold_into"] > 0.3
    assert EXPERIMENTS["kinematics"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()


@pytest.mark.ci
def test_smoke_run_of_grasp(as_users_run, tmp_path):
    result = Reproduce(name="grasp", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [3, 3, 3, 7]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    for cell in stored["cells"]:
        assert cell["measures"]["power"] < 1e-4
        assert cell["measures"]["torque"] == pytest.approx(cell["measures"]["slope"], rel=0.2)
    by_row = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert by_row[DERIVATIVES]["torque"] < by_row[VALUES]["torque"]
    agreed = stored["facts"]["agreement"]
    assert agreed["regular"]["velocities"] < 1e-10
    assert agreed["regular"]["torques"] < 1e-10
    assert agreed["0.9999"]["slopes"] > 1e3 * agreed["0"]["slopes"]


@pytest.mark.ci
def test_smoke_run_of_steering(as_users_run, tmp_path):
    result = Reproduce(name="steering", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [2, 3, 2, 4]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    by_row = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert by_row[steering.ONE_DERIVATIVES]["gain_error"] < by_row[steering.ONE_VALUES]["gain_error"]
    assert by_row[DERIVATIVES]["rmse"] < by_row[VALUES]["rmse"]
    drives = {(row["task"], row["speed"], row["wheels"]): row for row in stored["facts"]["drives"]}
    for task, speed, wheels in drives:
        if wheels == 4:
            assert drives[task, speed, 4]["cost"] <= drives[task, speed, 2]["cost"]
    assert set(METHODS) <= set(by_row)
