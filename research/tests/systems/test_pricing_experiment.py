"""The experiment `pricing`: what its tables say of stored numbers, and a run of smoke size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from jacmatch_research.reproduce import EXPERIMENTS
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.equal_error import crossing
from jacmatch_research.reproduce.pricing import DERIVATIVES, HINDSIGHT, LONGER, LONGEST, METHODS, SECOND_ORDER, VALUES
from jacmatch_research.systems.pricing import OPTIONS


def document(errors, held_out=None):
    """Two seeds around each error of (method, paths), for the price of every option; deltas are ten times that.

    The loss on held-out paths falls with the error, unless it is given; stopping early halves it.
    """
    cells = [
        {
            "row": f"{option}: {method}",
            "column": str(paths),
            "seed": seed,
            "measures": {
                "price_rmse": error * (1 + 0.1 * (2 * seed - 1)),
                "delta_rmse": 10 * error,
                "early_price_rmse": error / 2,
                "early_delta_rmse": 5 * error,
                "held_out": (held_out or {}).get((method, paths, seed), error),
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


ERRORS = {(method, paths): 0.1 for method in METHODS for paths in (100, 400, 1600)} | {
    (VALUES, 1600): 0.03,
    (LONGER, 1600): 0.02,
    (LONGEST, 1600): 0.025,
    (DERIVATIVES, 100): 0.04,
    (DERIVATIVES, 400): 0.01,
    (DERIVATIVES, 1600): 0.005,
}


def test_paths_with_partials_are_compared_with_each_rival():
    price, _, reached, _ = EXPERIMENTS["pricing"].tables(document(ERRORS))
    assert price.head == ("paths", "100", "400", "1,600")
    assert price.rows[0] == (f"{next(iter(OPTIONS))}: {VALUES}", "1000.0 ± 141.4", "1000.0 ± 141.4", "300.0 ± 42.4")
    by_rival = {row[1]: row[2:] for row in reached.rows[:3]}
    assert by_rival["length held out"] == by_rival[HINDSIGHT] == ("200.00", "400", "25.0 %", "200 (12.5 %)")
    assert by_rival["stopped early"][:3] == ("125.00", "400", "25.0 %")
    worse = ERRORS | {(DERIVATIVES, paths): 0.5 for paths in (100, 400, 1600)}
    last = [row[2:] for row in EXPERIMENTS["pricing"].tables(document(worse))[2].rows[:3]]
    assert all(row[1:] == ("none", "–", "–") for row in last)


def test_the_length_is_chosen_by_held_out_paths_and_never_by_the_error():
    """Seed 0's held-out paths are mistaken about the best length: the table has to live with it."""
    mistaken = document(ERRORS, {(VALUES, 1600, 0): 0.001})
    price, _, reached, _ = EXPERIMENTS["pricing"].tables(mistaken)
    chosen = next(row for row in price.rows if row[0].endswith(f"{VALUES}, length held out"))
    assert chosen[-1] == "245.0 ± 35.4"  # the mean of 0.9 · 300 and 1.1 · 200
    assert [row[2] for row in reached.rows[:3]] == ["245.00", "125.00", "200.00"]


@pytest.mark.parametrize("error", ["price", "delta"])
def test_committed_entries_are_means_over_seeds(error):
    """With numpy, from the files alone."""
    folder = Path(__file__).resolve().parents[3] / "docs" / "results" / "pricing-cpu"
    cells = json.loads((folder / "results.json").read_text(encoding="utf-8"))["cells"]
    scale, digits = {"price": (1e4, 1), "delta": (100, 2)}[error]
    head, *body = csv.reader((folder / f"{error}.csv").read_text(encoding="utf-8").splitlines())
    for row, *entries in body:
        lengths = [row]
        if row.endswith("length held out"):
            lengths = [row.replace(", length held out", more) for more in ("", ", 4 × steps", ", 16 × steps")]
        measure = f"early_{error}_rmse" if row.endswith("stopped early") else f"{error}_rmse"
        lengths[0] = lengths[0].removesuffix(", stopped early")
        for column, text in zip(head[1:], entries, strict=True):
            there = [c for c in cells if c["row"] in lengths and c["column"] == column.replace(",", "")]
            if text == "–":
                continue
            values = []
            for seed in range(1 if row.endswith(SECOND_ORDER) else 5):
                own = [c["measures"] for c in there if c["seed"] == seed]
                values.append(scale * min(own, key=lambda m: m.get("held_out", 0.0))[measure])
            deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            assert text == f"{np.mean(values):.{digits}f}{deviation}"


def test_crossing_of_a_curve_that_is_below_from_the_start():
    assert crossing([(10, 0.1), (100, 0.05)], 0.2) is None


@pytest.mark.ci
def test_smoke_run(as_users_run, tmp_path):
    result = Reproduce(name="pricing", smoke=True, out=tmp_path / "run").run()
    assert [len(table["rows"]) for table in result["tables"]] == [18, 18, 12, 12]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    measured = {cell["row"]: cell["measures"] for cell in stored["cells"]}
    assert len(stored["cells"]) == len(measured) == 12
    for option in OPTIONS:
        few, many = (measured[f"{option}: {method}"]["price_rmse"] for method in (VALUES, LONGER))
        assert many < few
        assert measured[f"{option}: {DERIVATIVES}"]["price_std"] == pytest.approx(0.155, rel=0.2)
    assert EXPERIMENTS["pricing"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()
