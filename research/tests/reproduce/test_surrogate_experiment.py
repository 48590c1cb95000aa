"""The experiment `surrogate`: what its tables say of stored numbers, and a run of smoke size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from jacmatch_research.reproduce import EXPERIMENTS
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.equal_error import DERIVATIVES, VALUES
from jacmatch_research.reproduce.surrogate import DERIVATIVES_LONGER, LONGER, STANDARD

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "results" / "surrogate-cpu"


def test_points_with_partials_are_compared_with_each_length_of_training():
    errors = {VALUES: (0.4, 0.2), LONGER: (0.3, 0.05), DERIVATIVES: (0.1, 0.06), DERIVATIVES_LONGER: (0.04, 0.02)}
    cells = [
        {
            "row": f"waves: {STANDARD}: {method}",
            "column": str(points),
            "seed": seed,
            "measures": {"values": error, "slopes": 2 * error, "points_asked": 1.0},
        }
        for method, both in errors.items()
        for points, error in zip((64, 256), both, strict=True)
        for seed in range(2)
    ]
    made = {"torch": "2", "jacmatch": "0"}
    values, _, saved, *_ = EXPERIMENTS["surrogate"].tables({"cells": cells, "environment": made, "size": "cpu"})
    assert values.rows[2] == (f"waves: {STANDARD}: {DERIVATIVES}", "10.0 ± 0.0", "6.0 ± 0.0")
    assert [(row[0], row[1], row[2]) for row in saved.rows[::2]] == [
        (f"waves: values, %, n = 256; {VALUES} ← {DERIVATIVES}", "20", "64"),
        (f"waves: values, %, n = 256; {LONGER} ← {DERIVATIVES}", "5", "none"),
        (f"waves: values, %, n = 256; {LONGER} ← {DERIVATIVES_LONGER}", "5", "64"),
    ]


def test_committed_entries_are_means_over_seeds():
    """With numpy, from the files alone."""
    cells = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["cells"]
    cells_of = {}
    for cell in cells:
        for measure, head in (("values", "values"), ("slopes", "partials")):
            cells_of.setdefault((cell["row"], cell["column"], head), []).append(100 * cell["measures"][measure])
    assert all(len(values) >= 5 for values in cells_of.values())
    checked = 0
    for table in ("values", "partials", "activation", "weight", "sampling"):
        head, *body = csv.reader((FOLDER / f"{table}.csv").read_text(encoding="utf-8").splitlines())
        for row, *entries in body:
            for title, text in zip(head[1:], entries, strict=True):
                measure, _, column = (f"{table}, n = {title}" if title.isdigit() else title).partition(", n = ")
                values = cells_of.get((row, column, measure))
                if values is not None:
                    assert text == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
                    checked += 1
    assert checked > 200


@pytest.mark.ci
@pytest.mark.usefixtures("as_users_run")
def test_smoke_run(tmp_path):
    result = Reproduce(name="surrogate", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [4, 4, 6, 4, 3, 4]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    evaluations = {cell["row"].partition(": ")[2]: cell["measures"]["points_asked"] for cell in stored["cells"]}
    assert evaluations[f"{STANDARD}: {VALUES}"] == 12
    assert evaluations[f"active: {VALUES}"] == 4 + 4 * 8  # a third at first, then four candidates for each point
    assert EXPERIMENTS["surrogate"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()
