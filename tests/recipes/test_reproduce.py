"""`jacmatch reproduce`: cells are measured once and stored; tables are made of what is stored."""

import json
import math

import numpy as np
import pytest

from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.recipes import Reproduce
from jacmatch.recipes.progress import Progress
from jacmatch.recipes.reproduce import EXPERIMENTS, students
from jacmatch.recipes.reproduce.experiment import Cell, Experiment
from jacmatch.report import Table
from jacmatch.report.experiments import grid, spreads


@pytest.fixture(autouse=True)
def _place(tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def counted(monkeypatch):
    """An experiment that counts what it measures, and stops like Ctrl-C where it is told to."""
    measured = []

    def cells(request):
        return [
            Cell(row, "a column", seed, {"double": row == "two + 2"})
            for row in ("one", "two + 2")
            for seed in range(request.seeds or 2)
        ]

    def measure(request, cell, facts):
        if (cell.row, cell.seed) == measure.stop:
            raise KeyboardInterrupt
        measured.append((cell.row, cell.seed))
        return {"accuracy": facts["base"] + 0.1 * cell.seed + cell.settings["double"] * 0.2, "absent": None}

    measure.stop = None
    experiment = Experiment(
        about="counts",
        cells=cells,
        measure=measure,
        tables=lambda document: [Table("main", "Main", ("row", "a column"), tuple(grid(document, "accuracy")))],
        figure=lambda document: b"<svg/>",
        prepare=lambda request, progress: {"base": 0.25},
    )
    monkeypatch.setitem(EXPERIMENTS, "counted", experiment)
    return measured, measure


def test_every_cell_is_measured_once_and_stored(counted, tmp_path):
    measured, _ = counted
    result = Reproduce(name="counted", out=tmp_path / "run").run()
    assert measured == [("one", 0), ("one", 1), ("two + 2", 0), ("two + 2", 1)]
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [cell["measures"]["accuracy"] for cell in document["cells"]] == pytest.approx([0.25, 0.35, 0.45, 0.55])
    assert document["facts"] == {"base": 0.25}
    assert result["tables"][0]["rows"] == (("one", "30.0 ± 7.1"), ("two + 2", "50.0 ± 7.1"))
    assert (tmp_path / "run" / "main.md").read_text().splitlines()[4] == "| one | 30.0 ± 7.1 |"
    assert (tmp_path / "run" / "main.csv").read_text().splitlines()[1] == "one,30.0 ± 7.1"
    assert (tmp_path / "run" / "figure.svg").read_bytes() == b"<svg/>"


def test_a_stopped_run_goes_on_with_the_next_cell(counted, tmp_path):
    measured, measure = counted
    measure.stop = ("two + 2", 0)
    with pytest.raises(KeyboardInterrupt):
        Reproduce(name="counted", out=tmp_path / "run").run()
    assert not (tmp_path / "run" / "result.json").exists()
    measure.stop = None
    Reproduce(name="counted", out=tmp_path / "run").run()
    assert measured == [("one", 0), ("one", 1), ("two + 2", 0), ("two + 2", 1)]


def test_ctrl_c_keeps_what_is_measured_and_the_same_command_goes_on(counted, tmp_path, capsys):
    measured, measure = counted
    measure.stop = ("one", 1)
    command = ["reproduce", "counted", "--out", str(tmp_path / "run")]
    assert main(command) == 130
    kept = f"What is done is kept in {tmp_path / 'run'}: the same command goes on."
    assert capsys.readouterr().err == f"jacmatch reproduce: interrupted. {kept}\n"
    measure.stop = None
    assert main(command) == 0
    assert measured == [("one", 0), ("one", 1), ("two + 2", 0), ("two + 2", 1)]
    assert "30.0 ± 7.1" in capsys.readouterr().out


def test_ctrl_c_before_the_first_cell_leaves_nothing(counted, tmp_path, capsys):
    _, measure = counted
    measure.stop = ("one", 0)
    assert main(["reproduce", "counted", "--out", str(tmp_path / "run")]) == 130
    assert "No run folder was written." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_seeds_are_added_to_a_finished_run_and_rows_can_be_chosen(counted, tmp_path):
    measured, _ = counted
    Reproduce(name="counted", out=tmp_path / "run", rows=("one",)).run()
    assert measured == [("one", 0), ("one", 1)]
    result = Reproduce(name="counted", out=tmp_path / "run", seeds=3).run()
    assert measured[2:] == [("one", 2), ("two + 2", 0), ("two + 2", 1), ("two + 2", 2)]
    assert result["tables"][0]["rows"] == (("one", "35.0 ± 10.0"), ("two + 2", "55.0 ± 10.0"))


def test_another_seed_is_another_run(counted, tmp_path):
    Reproduce(name="counted", out=tmp_path / "run").run()
    with pytest.raises(InputError, match=r"other settings: seed \(0 there, 1 here\)"):
        Reproduce(name="counted", out=tmp_path / "run", seed=1).run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "The experiment of `reproduce`"),
        ({"name": "distilation"}, "The experiment of `reproduce`.*distillation"),
        ({"rows": ("three",)}, "A row .`--rows`. of `reproduce counted`.*one"),
        ({"workers": 0}, "`--workers` of `reproduce` must be at least 1"),
        ({"seeds": 0}, "`--seeds` of `reproduce` must be at least 1"),
        ({"workers": 2, "device": "cuda"}, "`--workers` of `reproduce` must be 1 on a GPU"),
        ({"name": "distillation", "per_class": (-1,)}, "`--per-class` of `reproduce` must be 0 for all images"),
        ({"name": "distillation", "per_class": (5000,)}, "`--per-class` of `reproduce` .* at most 113"),
        ({"name": "distillation", "data": "synthetic:D=2,K=1,N=9,T=3"}, "`--data` of .* must have classes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(counted, settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Reproduce(**{"name": "counted", "out": tmp_path / "run", **settings}).run()
    assert not (tmp_path / "run").exists()


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
    found = spreads(document, "accuracy")
    both, values = (found[row, "5"]["values"] for row in ("labels + outputs + Jacobians", "labels + outputs"))
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


def test_cost_counts_passes():
    """Labels 3; a teacher of r forward passes r more; one product doubles that; a pair of values triples it."""
    row = {"method": "jacobians", "probe": "random-outputs"}
    assert students.cost({"method": "labels"}, 10, 2.5) == 3
    assert students.cost({"method": "outputs"}, 10, 2.5) == 5.5
    assert students.cost(row, 10, 2.5) == 11
    assert students.cost({**row, "every": 2}, 10, 2.5) == 8.25
    assert students.cost({**row, "probes": 3}, 10, 2.5) == 22
    assert students.cost({**row, "probe": "every-row"}, 10, 2.5) == 60.5
    assert students.cost({**row, "probe": "antithetic-noise"}, 10, 2.5) == 16.5
