"""The experiment `surrogate`: what its tables say of stored numbers, and a run of smoke size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from jacmatch_research.reproduce import EXPERIMENTS
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.equal_error import DERIVATIVES, VALUES
from jacmatch_research.reproduce.surrogate import STANDARD

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "results" / "surrogate-cpu"


def test_points_with_partials_are_compared_with_values_alone():
    errors = {VALUES: (0.4, 0.2), DERIVATIVES: (0.1, 0.06)}
    cells = [
        {
            "row": f"waves: {STANDARD}: {method}",
            "column": str(points),
            "seed": seed,
            "measures": {"values": error, "slopes": 2 * error, "points_asked": 1.0, "train_seconds": 2.0},
        }
        for method, both in errors.items()
        for points, error in zip((64, 256), both, strict=True)
        for seed in range(2)
    ]
    made = {"torch": "2", "jacmatch": "0"}
    values, _, saved, models, *_ = EXPERIMENTS["surrogate"].tables({"cells": cells, "environment": made, "size": "cpu"})
    assert values.rows[1] == (f"waves: {STANDARD}: {DERIVATIVES}", "10.00 ± 0.00", "6.00 ± 0.00")
    assert [row[:3] for row in saved.rows] == [
        ("waves: values, %, n = 64", "40", "64"),
        ("waves: values, %, n = 256", "20", "64"),
        ("waves: partials, %, n = 64", "80", "64"),
        ("waves: partials, %, n = 256", "40", "64"),
    ]
    assert models.rows[0] == (f"waves: {STANDARD}: {VALUES}", "40.00 ± 0.00", "80.00 ± 0.00", "2.0 ± 0.0")


def test_committed_entries_are_means_over_seeds():
    """With numpy, from the files alone."""
    cells = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["cells"]
    cells_of = {}
    for cell in cells:
        for measure, head in (("values", "values"), ("slopes", "partials")):
            cells_of.setdefault((cell["row"], cell["column"], head), []).append(100 * cell["measures"][measure])
    checked = 0
    for table in ("values", "partials", "model", "activation", "weight", "sampling"):
        head, *body = csv.reader((FOLDER / f"{table}.csv").read_text(encoding="utf-8").splitlines())
        for row, *entries in body:
            for title, text in zip(head[1:], entries, strict=True):
                measure, _, column = (f"{table}, n = {title}" if title.isdigit() else title).partition(", n = ")
                values = cells_of.get((row, column, measure))
                if values is not None:
                    std = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
                    assert text == f"{np.mean(values):.2f}{std}"
                    checked += 1
    assert checked > 100


@pytest.mark.ci
@pytest.mark.usefixtures("as_users_run")
def test_smoke_run(tmp_path):
    result = Reproduce(name="surrogate", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [2, 2, 2, 4, 3, 1, 3]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    evaluations = {cell["row"].partition(": ")[2]: cell["measures"]["points_asked"] for cell in stored["cells"]}
    assert evaluations[f"{STANDARD}: {VALUES}"] == 12
    assert evaluations[f"active: {DERIVATIVES}"] == 2 * (4 + 4 * 8)  # a third at first, then four candidates for each
    assert EXPERIMENTS["surrogate"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()
