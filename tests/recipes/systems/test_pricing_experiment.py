"""The experiment `pricing`: what its tables say of stored numbers, and a run of smoke size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from jacmatch.recipes import Reproduce
from jacmatch.recipes.reproduce import EXPERIMENTS
from jacmatch.recipes.reproduce.pricing import LONGER, METHODS, SLOPES, VALUES, crossing
from jacmatch.recipes.systems.pricing import OPTIONS


def document(errors):
    """Two seeds around each error of (method, paths), for the price of every option; deltas are ten times that."""
    cells = [
        {
            "row": f"{option}: {method}",
            "column": str(paths),
            "seed": seed,
            "measures": {
                "price_rmse": error * (1 + 0.1 * (2 * seed - 1)),
                "delta_rmse": 10 * error,
                "price_std": 0.1,
                "delta_std": 0.2,
                "train_seconds": 1.0,
            },
        }
        for option in OPTIONS
        for (method, paths), error in errors.items()
        for seed in range(2)
    ]
    return {"cells": cells, "environment": {"torch": "2", "jacmatch": "0"}, "settings": {"data": ""}, "size": "cpu"}


def test_paths_with_slopes_are_compared_with_the_better_of_the_rivals():
    errors = {(method, paths): 0.1 for method in METHODS for paths in (100, 400, 1600)}
    errors |= {(VALUES, 1600): 0.03, (LONGER, 1600): 0.02}
    errors |= {(SLOPES, 100): 0.04, (SLOPES, 400): 0.01, (SLOPES, 1600): 0.005}
    price, _, reached, _ = EXPERIMENTS["pricing"].tables(document(errors))
    assert price.head == ("paths", "100", "400", "1,600")
    assert price.rows[0] == (f"{next(iter(OPTIONS))}: {VALUES}", "1000.0 ± 141.4", "1000.0 ± 141.4", "300.0 ± 42.4")
    assert reached.rows[0][1:] == ("200.00", "400", "25.0 %", "200 (12.5 %)")
    worse = errors | {(SLOPES, paths): 0.5 for paths in (100, 400, 1600)}
    assert EXPERIMENTS["pricing"].tables(document(worse))[2].rows[0][2:] == ("none", "–", "–")


@pytest.mark.parametrize("error", ["price", "delta"])
def test_committed_entries_are_means_over_seeds(error):
    """With numpy, from the files alone."""
    folder = Path(__file__).resolve().parents[3] / "docs" / "results" / "pricing-cpu"
    cells = json.loads((folder / "results.json").read_text(encoding="utf-8"))["cells"]
    scale, digits = {"price": (1e4, 1), "delta": (100, 2)}[error]
    head, *body = csv.reader((folder / f"{error}.csv").read_text(encoding="utf-8").splitlines())
    for row, *entries in body:
        for column, text in zip(head[1:], entries, strict=True):
            place = (row, column.replace(",", ""))
            if text == "–":
                continue
            values = [scale * c["measures"][f"{error}_rmse"] for c in cells if (c["row"], c["column"]) == place]
            assert len(values) >= 5
            assert text == f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def test_crossing_of_a_curve_that_is_below_from_the_start():
    assert crossing([(10, 0.1), (100, 0.05)], 0.2) is None


def test_smoke_run(as_users_run, tmp_path):
    result = Reproduce(name="pricing", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [10, 10, 4, 10]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    measured = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert len(stored["cells"]) == len(measured) == 10
    for option in OPTIONS:
        few, many = (measured[f"{option}: {method}"]["price_rmse"] for method in (VALUES, LONGER))
        assert many < few
        assert measured[f"{option}: {SLOPES}"]["price_std"] == pytest.approx(0.155, rel=0.2)
    assert EXPERIMENTS["pricing"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()
