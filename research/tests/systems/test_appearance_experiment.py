"""The experiment `appearance`: what its tables say of stored numbers, and a run of smoke size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from jacmatch_research.reproduce import EXPERIMENTS
from jacmatch_research.reproduce.appearance import DISTANCES, SECOND_ORDER
from jacmatch_research.reproduce.command import Reproduce


def test_the_aim_is_judged_by_error_and_evaluations():
    def cell(row, error, evaluations):
        measures = {f"{name} {d:g}": 1.0 for d in DISTANCES for name in ("error", "median", "converged")}
        measures |= {f"{name} {d:g}": evaluations for d in DISTANCES for name in ("evaluations", "milliseconds")}
        return {"row": row, "column": "all", "seed": 0, "measures": measures | {"error 0.1": error}}

    cells = [cell("NEWUOA", 5.0, 400.0), cell("near", 5.4, 3.0), cell("far", 5.6, 3.0), cell("slow", 5.0, 5.0)]
    made = {"cells": cells, "environment": {"torch": "2", "jacmatch": "0"}}
    aim = EXPERIMENTS["appearance"].tables(made)[1]
    assert aim.rows == (
        ("near", "108", "100", "0.75", "0.75", "yes"),
        ("far", "112", "100", "0.75", "0.75", "no"),
        ("slow", "100", "100", "1.25", "1.25", "no"),
    )


@pytest.mark.ci
def test_smoke_run(as_users_run, tmp_path):
    pytest.importorskip("nlopt")
    result = Reproduce(name="appearance", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [8, 6, 8, 8]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    measured = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert measured["first guess"]["error 0.4"] > 3 * measured["first guess"]["error 0.05"]
    assert measured["NEWUOA"]["error 0.1"] < measured["first guess"]["error 0.1"]
    assert measured["student: values + partials"]["calls"] == measured["student: values, equal calls"]["calls"] == 12
    assert EXPERIMENTS["appearance"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()


def test_committed_entries_are_means_over_seeds_and_the_student_reaches_the_fitter():
    """With numpy, from the files alone."""
    folder = Path(__file__).resolve().parents[3] / "docs" / "results" / "appearance-cpu"
    cells = json.loads((folder / "results.json").read_text(encoding="utf-8"))["cells"]
    _, *body = csv.reader((folder / "error.csv").read_text(encoding="utf-8").splitlines())
    means = {}
    for row, *entries in body:
        for distance, text in zip(DISTANCES, entries, strict=True):
            values = [cell["measures"][f"error {distance:g}"] for cell in cells if cell["row"] == row]
            assert len(values) >= (1 if row == SECOND_ORDER else 5)
            deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            assert text == f"{np.mean(values):.1f}{deviation}"
            means[row, distance] = np.mean(values)
    for student in ("student: values", "student: values + partials"):
        assert means[student, 0.1] <= 1.1 * means["NEWUOA", 0.1]
