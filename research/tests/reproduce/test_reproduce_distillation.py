"""`jacmatch reproduce distillation`: the smallest real experiment, its stored numbers and what is made of them."""

import json
import math

import numpy as np
import pytest

from jacmatch.jobs.study import Progress
from jacmatch_research.reproduce import EXPERIMENTS
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.tables import spreads

# The recipes below are run with type checks in test_cli.py.
pytestmark = [pytest.mark.usefixtures("all_as_users_run"), pytest.mark.ci]


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A run of the smallest real experiment."""
    folder = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACMATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        Reproduce(name="distillation", smoke=True, out=folder / "run").run(Progress(quiet=True))
    return folder / "run"


def test_the_document_has_no_path_of_this_machine(distilled):
    text = (distilled / "results.json").read_text()
    assert str(distilled.parent) not in text
    assert '"/' not in text


def test_tables_are_means_and_deviations_of_the_stored_numbers(distilled):
    """The arithmetic again, with numpy and from the file alone."""
    document = json.loads((distilled / "results.json").read_text())
    document["cells"] += [{**cell, "seed": 1, "measures": _shifted(cell)} for cell in document["cells"]]
    table = EXPERIMENTS["distillation"].tables(document)[0]
    for row in table.rows[:6]:
        for column, text in zip(table.head[1:], row[1:], strict=True):
            values = [
                cell["measures"]["accuracy"]
                for cell in document["cells"]
                if (cell["row"], cell["column"]) == (row[0], column)
            ]
            assert len(values) == 2
            assert text == f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
    accuracy = spreads(document, "accuracy")
    both, values = (accuracy[row, "5"]["values"] for row in ("labels + outputs + Jacobians", "labels + outputs"))
    gain = 100 * np.mean(np.subtract(both, values))
    assert float(table.rows[6][2].split()[0]) == pytest.approx(gain, abs=0.051)


def _shifted(cell):
    """Other numbers for a second seed, by an amount that depends on the cell."""
    move = 0.01 + 0.003 * len(cell["row"])
    return {name: value and value + move for name, value in cell["measures"].items()}


def test_a_cell_measures_what_is_transferred_besides_accuracy(distilled):
    document = json.loads((distilled / "results.json").read_text())
    for cell in document["cells"]:
        measures = cell["measures"]
        assert {"accuracy", "top1", "jacobian_cosine", "calibration_error", "noisy_accuracy"} <= set(measures)
        assert all(math.isfinite(value) for value in measures.values())


@pytest.mark.slow  # starts two processes; test_side_by_side.py has the parts
def test_workers_measure_the_same(distilled, tmp_path):
    rows = ("labels", "labels + outputs + Jacobians")
    Reproduce(name="distillation", smoke=True, out=tmp_path / "run", workers=2, per_class=(5,), rows=rows).run()
    one, two = (json.loads((run / "results.json").read_text())["cells"] for run in (distilled, tmp_path / "run"))
    same = {(cell["row"], cell["column"]): cell["measures"] for cell in one}
    assert len(two) == 2
    for cell in two:
        expected = same[cell["row"], cell["column"]]
        assert {k: v for k, v in cell["measures"].items() if k != "train_seconds"} == {
            k: v for k, v in expected.items() if k != "train_seconds"
        }
