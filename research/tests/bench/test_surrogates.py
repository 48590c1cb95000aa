"""The comparison of surrogates: problems, cells that are continued, cells that take too long."""

import json
import time

import numpy as np
import pytest

from jacmatch_research.bench import surrogates
from jacmatch_research.bench.claims import Conditions, NotMeasured


@pytest.mark.ci
def test_partials_of_the_problems():
    for name, problem in surrogates.PROBLEMS.items():
        d = len(problem.low)
        unit, step = 0.2 + 0.6 * np.random.default_rng(0).random((3, d)), 1e-6
        _, _, j = problem.samples(unit)
        width = np.subtract(problem.high, problem.low)
        shift = step * np.eye(d)
        values = [problem.samples(np.concatenate([unit + e, unit - e]))[1] for e in shift]
        differences = np.stack([(v[:3] - v[3:]) / (2 * step) for v in values], 2) / width
        np.testing.assert_allclose(
            j * width, differences * width, rtol=1e-5, atol=1e-6 * np.abs(j * width).max(), err_msg=name
        )


def test_cells_are_continued_and_a_failure_is_a_cell(tmp_path, monkeypatch):
    calls = []

    def mean(problem, x, y, j, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise ValueError("singular")
        shape = (y.shape[1], x.shape[1])
        return lambda points: np.tile(y.mean(0), (len(points), 1)), lambda points: np.zeros((len(points), *shape))

    monkeypatch.setattr(surrogates, "PROBLEMS", {"rosenbrock": surrogates.PROBLEMS["rosenbrock"]})
    monkeypatch.setattr(surrogates, "METHODS", {"mean": mean})
    monkeypatch.setattr(surrogates.importlib.metadata, "version", lambda name: "1")
    path = tmp_path / "cells.json"
    cells = surrogates.measure(path, ("mean",), sizes=(32,), seeds=2)
    assert cells["rosenbrock/32/0/mean"]["partials"] == pytest.approx(100)
    assert cells["rosenbrock/32/0/mean"]["values"] == pytest.approx(100, rel=0.1)
    assert cells["rosenbrock/32/1/mean"] == {"failed": "ValueError: singular"}
    again = surrogates.measure(path, ("mean",), sizes=(32,), seeds=2)
    assert len(calls) == 2
    assert json.loads(path.read_text())["cells"] == cells == again


def test_a_cell_that_takes_too_long_is_given_up():
    def busy():
        start = time.process_time()
        while time.process_time() < start + 5:
            pass

    with pytest.raises(TimeoutError, match=r"over 0.02 s"), surrogates._limited(0.02):
        busy()


def test_the_best_of_the_peers_is_what_counts(monkeypatch):
    def cells(values):
        return {
            f"branch/32/{seed}/{method}": {"values": values.get(method)} if method in values else {"failed": "over 1 s"}
            for seed in range(surrogates.SEEDS)
            for method in surrogates.METHODS
        }

    monkeypatch.setattr(surrogates, "_cells", lambda _: cells({"auto": 2.0, "jenn": 8.0, "gekpls": 4.0}))
    measured = surrogates.ratio(Conditions(), "branch", 32, "values")
    assert measured.spread.median == 0.5
    assert measured.details == {"auto": 2.0, "jenn": 8.0, "gekpls": 4.0}
    monkeypatch.setattr(surrogates, "_cells", lambda _: cells({"auto": 2.0}))
    with pytest.raises(NotMeasured, match="no method of the peers within"):
        surrogates.ratio(Conditions(), "branch", 32, "values")
