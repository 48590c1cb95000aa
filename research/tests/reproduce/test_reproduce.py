"""`jacmatch reproduce`: cells are measured once and stored; tables are made of what is stored."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.report import Table
from jacmatch.runs import folder as run_folders
from jacmatch_research.reproduce import EXPERIMENTS, command
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.experiment import Cell, Experiment, Request
from jacmatch_research.reproduce.students import STUDENTS
from jacmatch_research.tables import grid, origin


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def counted(monkeypatch):
    """An experiment that counts what it measures, and stops like Ctrl-C at a given cell."""
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
    message = f"Finished work is kept in {tmp_path / 'run'}: run the same command again to resume."
    assert capsys.readouterr().err == f"jacmatch reproduce: interrupted. {message}\n"
    measure.stop = None
    assert main(command) == 0
    assert measured == [("one", 0), ("one", 1), ("two + 2", 0), ("two + 2", 1)]
    printed = capsys.readouterr().out
    assert printed.startswith("Counts.\n")
    assert "30.0 ± 7.1" in printed


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


def cells_of(run):
    document = json.loads((run / "results.json").read_text())
    return [(cell["row"], cell["seed"]) for cell in document["cells"]]


def test_a_command_for_less_leaves_the_whole_in_the_tables(counted, tmp_path):
    measured, _ = counted
    whole = Reproduce(name="counted", out=tmp_path / "run", seeds=3).run()
    less = Reproduce(name="counted", out=tmp_path / "run", seeds=1, rows=("two + 2",)).run()
    assert len(measured) == len(cells_of(tmp_path / "run")) == 6
    assert less["tables"] == whole["tables"]


def test_cells_are_in_the_order_of_the_experiment_whatever_was_requested_first(counted, tmp_path):
    """Then those that it does not plan, those of this command first."""
    for settings in ({"rows": ("two + 2",), "seeds": 4}, {"rows": ("one",), "seeds": 3}):
        Reproduce(name="counted", out=tmp_path / "run", **settings).run()
    planned = [("one", 0), ("one", 1), ("two + 2", 0), ("two + 2", 1)]
    assert cells_of(tmp_path / "run") == [*planned, ("one", 2), ("two + 2", 2), ("two + 2", 3)]


def test_facts_about_cells_that_are_not_requested_again_stay(counted, monkeypatch, tmp_path):
    def prepare(request, progress):
        return {"base": 0.25, "length": {row: len(row) for row in request.rows}}

    monkeypatch.setitem(EXPERIMENTS, "counted", replace(EXPERIMENTS["counted"], prepare=prepare))
    for row in ("two + 2", "one"):
        Reproduce(name="counted", out=tmp_path / "run", rows=(row,)).run()
    facts = json.loads((tmp_path / "run" / "results.json").read_text())["facts"]
    assert facts == {"base": 0.25, "length": {"two + 2": 7, "one": 3}}


def test_what_other_code_measured_is_not_mixed_in(counted, monkeypatch, tmp_path):
    measured, _ = counted
    Reproduce(name="counted", out=tmp_path / "run", rows=("one",)).run()
    experiment = EXPERIMENTS["counted"]

    def other(request):
        return [replace(cell, settings={"double": False, "new": 1}) for cell in experiment.cells(request)]

    monkeypatch.setitem(EXPERIMENTS, "counted", replace(experiment, cells=other))
    with pytest.raises(InputError, match=r"cell.new \(nothing there, 1 here\)"):
        Reproduce(name="counted", out=tmp_path / "run", rows=("two + 2",)).run()
    assert len(measured) == 2


@pytest.mark.parametrize("part", ["measure", "prepare", "tables", "figure"])
def test_a_finished_run_stays_as_it_is_if_a_later_command_fails(counted, monkeypatch, part, tmp_path):
    run = tmp_path / "run"
    Reproduce(name="counted", out=run).run()
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}

    def failing(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(EXPERIMENTS, "counted", replace(EXPERIMENTS["counted"], **{part: failing}))
    with pytest.raises(KeyboardInterrupt):
        Reproduce(name="counted", out=run, seeds=3).run()
    del before["environment.json"]
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_cell_that_is_requested_twice_is_measured_once(counted, monkeypatch, tmp_path):
    measured, _ = counted
    experiment = EXPERIMENTS["counted"]
    twice = replace(experiment, cells=lambda request: 2 * experiment.cells(request))
    monkeypatch.setitem(EXPERIMENTS, "counted", twice)
    Reproduce(name="counted", out=tmp_path / "run").run()
    assert len(measured) == len(cells_of(tmp_path / "run")) == 4


def test_each_cell_says_where_it_was_measured(counted, monkeypatch, tmp_path):
    """The first cell is of an earlier version of this package, which did not say it yet."""
    run, real = tmp_path / "run", run_folders.environment
    Reproduce(name="counted", out=run, rows=("one",)).run()
    old = run / "cells" / "one" / "a-column" / "seed0" / "result.json"
    old.write_text(json.dumps({key: value for key, value in json.loads(old.read_text()).items() if key != "made"}))
    gpu = {"torch": "99.0", "cuda": "a GPU", "commit": "abc"}
    monkeypatch.setattr(run_folders, "environment", lambda cuda: {**real(cuda), **gpu})
    with pytest.warns(
        UserWarning, match=r"started with torch .*, and is resumed with torch 99\.0, cuda a GPU, commit abc\. The"
    ):
        Reproduce(name="counted", out=run).run()
    document = json.loads((run / "results.json").read_text())
    first, second, *others = document["cells"]
    here = {key: document["environment"][key] for key in ("jacmatch", "torch", "platform", "cuda", "commit")}
    assert "made" not in first
    assert second["made"] == here
    assert [cell["made"] for cell in others] == 2 * [{**here, **gpu}]
    assert f" and a GPU, torch {torch.__version__} and 99.0, jacmatch" in origin(document)


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
        ({"per_class": (5,)}, "`--per-class` of `reproduce` does not apply to `counted`.*distillation, .*low-data"),
        ({"name": "robustness", "per_class": (5,)}, "`--per-class` of `reproduce` does not apply to `robustness`"),
        ({"name": "robustness", "teacher": "cnn5"}, "`--teacher` .* does not apply to `robustness`"),
        ({"name": "transfer", "student": "cnn3"}, "`--student` .* does not apply to `transfer`.*robustness"),
        ({"name": "propositions", "data": "cifar10"}, "`--data` .* does not apply to `propositions`"),
        ({"name": "propositions", "teacher_weights": Path("a")}, "`--teacher-weights` .* `propositions`"),
        ({"name": "distillation", "per_class": (-1,)}, "`--per-class` of `reproduce` must be 0 for all images"),
        ({"name": "distillation", "per_class": (5000,)}, "`--per-class` of `reproduce` .* at most 113"),
        ({"name": "distillation", "data": "synthetic:D=2,K=1,N=9,T=3"}, "`--data` of .* must have classes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(counted, settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Reproduce(**{"name": "counted", "out": tmp_path / "run", **settings}).run()
    assert not (tmp_path / "run").exists()


def test_workers_are_for_the_cpu(counted, monkeypatch, tmp_path):
    """Where there is no GPU, auto is the CPU."""
    Reproduce(name="counted", out=tmp_path / "run", device="cpu").run()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = Reproduce(name="counted", out=tmp_path / "run", workers=2, device="auto").run()
    assert result["settings"]["device"] == "cpu"  # a run that was begun on the CPU goes on there
    monkeypatch.setattr(command, "find_device", lambda name: torch.device("cuda", 0))
    with pytest.raises(InputError, match="`--workers` of `reproduce` must be 1 on a GPU"):
        Reproduce(name="counted", out=tmp_path / "run", workers=2, device="auto").run()


def test_every_field_is_for_every_experiment_or_taken_by_one():
    assert {field.name for field in fields(Request)} == Request.everywhere | STUDENTS
    assert all(experiment.takes <= STUDENTS for experiment in EXPERIMENTS.values())


def test_cells_that_workers_have_measured_are_stored_though_another_fails(counted, monkeypatch, tmp_path):
    """The pool's place is taken: new processes know no experiment that a test makes."""

    def first_then_failure(work, tasks, workers, done):
        done(tasks[0], work(tasks[0]))
        raise ValueError(workers)

    with monkeypatch.context() as patch:
        patch.setattr(command, "side_by_side", first_then_failure)
        with pytest.raises(ValueError, match="2"):
            Reproduce(name="counted", out=tmp_path / "run", workers=2).run()
    measured, _ = counted
    Reproduce(name="counted", out=tmp_path / "run").run()
    assert measured == [("one", 0), ("one", 1), ("two + 2", 0), ("two + 2", 1)]
