"""The committed tables of kinematics, grasp and steering again, with numpy and from the files alone."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"
THOUSAND, PERCENT = 1e3, 100
COLUMNS = {  # measure and scale of each column
    "kinematics-cpu/kinematics": [
        *(("place", THOUSAND), ("turn", THOUSAND), ("partials", PERCENT), ("evaluations", 1), ("cpu_seconds", 1)),
    ],
    "kinematics-cpu/inverse": [
        *(("reached", PERCENT), ("iterations", 1), ("straight_reached", PERCENT), ("straight_iterations", 1)),
        *(("alone_place", THOUSAND), ("alone_turn", THOUSAND)),
    ],
    "kinematics-cpu/switching": [
        (name, THOUSAND)
        for name in (
            "into",
            "inside",
            "off",
            "straight_into",
            "straight_inside",
            "straight_off",
            "alone_into",
            "alone_off",
        )
    ],
    "grasp-cpu/grasp": [
        *(("place", THOUSAND), ("turn", THOUSAND), ("partials", PERCENT), ("torque", PERCENT), ("power", 1e6)),
        ("cpu_seconds", 1),
    ],
    "grasp-cpu/singular": [(f"torque_{lowest}", PERCENT) for lowest in (0.02, 0.1, 0.2, 0.4)],
    "steering-cpu/controllers": [
        *(("rmse", THOUSAND), ("gain", PERCENT), ("stable", PERCENT), ("part", 1), ("regret", PERCENT)),
        ("good", PERCENT),
    ],
}


def cells(name):
    return json.loads((RESULTS / name.partition("/")[0] / "results.json").read_text(encoding="utf-8"))["cells"]


def values(stored, row, column, measure):
    """Of each seed; a regret above 1,000 % counts as that, and a number that is not there as none."""
    numbers = [cell["measures"][measure] for cell in stored if (cell["row"], cell["column"]) == (row, column)]
    numbers = [min(value, 10.0) if measure == "regret" else value for value in numbers]
    return [value for value in numbers if value is not None and np.isfinite(value)]


def close(text, number):
    """Whether a text with so many digits is this number, rounded."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - number) <= 0.501 * 10.0**-digits


@pytest.mark.parametrize("name", COLUMNS)
def test_entries_are_means_over_seeds(name):
    stored, compared = cells(name), 0
    _, *body = csv.reader((RESULTS / f"{name}.csv").read_text(encoding="utf-8").splitlines())
    for title, *entries in body:
        if not title.startswith("n = "):
            continue  # what has no seed
        column, _, row = title.removeprefix("n = ").partition(": ")
        for (measure, scale), text in zip(COLUMNS[name], entries, strict=True):
            expected = scale * np.array(values(stored, row, column.replace(",", ""), measure))
            mean, _, deviation = text.partition(" ± ")
            assert close(mean, expected.mean()), (title, measure)
            assert close(deviation, expected.std(ddof=1)) if len(expected) > 1 else not deviation, (title, measure)
            compared += 1
    assert compared >= 24


def test_partials_lower_every_error_of_the_arm_at_each_number_of_samples():
    stored = cells("kinematics-cpu")
    for samples in ("100", "200", "500"):
        for measure in ("place", "turn", "partials"):
            both, alone = (values(stored, row, samples, measure) for row in ("values + partials", "values"))
            assert np.max(both) < np.min(alone)


def test_an_inverse_network_with_partials_has_the_best_torques():
    stored = cells("grasp-cpu")
    for samples in ("100", "500"):
        inverse, direct = (
            np.mean(values(stored, row, samples, "torque"))
            for row in ("inverse: values + partials", "values + partials")
        )
        assert inverse < direct
