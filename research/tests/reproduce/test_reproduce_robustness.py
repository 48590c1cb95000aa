"""`jacmatch reproduce robustness`: its smoke run, its cells, and its tables again from the stored numbers."""

import copy
import json
import statistics

import pytest
import torch

from jacmatch import datasets
from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jobs.study import Progress
from jacmatch_research.reproduce import robustness
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.robustness import KINDS, LEVELS, PUBLISHED, ROBUSTNESS, ROWS, UNSEEN

# The recipes below are run with type checks in test_cli.py.
pytestmark = [pytest.mark.usefixtures("all_as_users_run"), pytest.mark.ci]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The document of a smoke run."""
    folder = tmp_path_factory.mktemp("robustness") / "run"
    Reproduce(name="robustness", smoke=True, out=folder).run(Progress(quiet=True))
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def document(smoke):
    """The same with a second seed, whose measures are others."""
    whole = copy.deepcopy(smoke)
    for number, cell in enumerate(smoke["cells"]):
        changed = {name: 0.5 * value + 0.01 * number for name, value in cell["measures"].items()}
        changed["steps"] = cell["measures"]["steps"]
        whole["cells"].append({**cell, "seed": 1, "measures": changed})
    return whole


def values(document, row, measure):
    return [cell["measures"][measure] for cell in document["cells"] if cell["row"] == row]


def text(numbers, scale=100):
    return f"{scale * statistics.fmean(numbers):.1f} ± {scale * statistics.stdev(numbers):.1f}"


def test_the_smoke_run_measures_every_row(smoke):
    assert [cell["row"] for cell in smoke["cells"]] == list(ROWS)
    assert smoke["facts"]["model"] == "cnn3"
    assert {cell["measures"]["steps"] for cell in smoke["cells"]} == {2}
    for cell in smoke["cells"]:
        for name in (
            "accuracy",
            "validation_accuracy",
            "gaussian-noise 0.4",
            "validation gaussian-noise 0.4",
            "blur 1",
        ):
            assert 0 <= cell["measures"][name] <= 1


def test_rows_of_equal_cost_have_equal_cost():
    """A step with one product costs as many passes as two without; λ = 0 once is there as in the paper."""
    for rows in KINDS.values():
        for row in rows:
            assert ("penalty" in ROWS[row]) != (ROWS[row].get("times", 1) == 2)
    assert set().union(*KINDS.values()) == set(ROWS) - {"λ = 0"}


def test_the_table_of_noise_is_made_of_the_stored_numbers(document):
    table = ROBUSTNESS.tables(document)[0]
    assert table.head == ("row", "0", "0.1", "0.2", "0.3", "0.4")
    for row, line in zip(ROWS, table.rows, strict=False):
        names = ["accuracy", *(f"gaussian-noise {level:g}" for level in LEVELS)]
        assert line == (row, *(text(values(document, row, name)) for name in names))
    theirs = table.rows[len(ROWS) :]
    assert [line[0].rpartition(": ")[2] for line in theirs] == list(PUBLISHED)
    assert theirs[0][1:] == ("64.78", "61.90", "47.53", "29.63", "17.69")
    assert theirs[4][1:] == ("63.59", "62.66", "57.53", "47.48", "35.43")
    assert "5,178 parameters" in table.notes[0]


def test_of_each_kind_the_best_on_validation_images_is_chosen(document):
    def score(row, seed):
        cells = [cell for cell in document["cells"] if (cell["row"], cell["seed"]) == (row, seed)]
        names = ["validation_accuracy", *(f"validation gaussian-noise {level:g}" for level in LEVELS)]
        return statistics.fmean(cells[0]["measures"][name] for name in names)

    best = {
        kind: max(rows, key=lambda row: statistics.fmean([score(row, 0), score(row, 1)]))
        for kind, rows in KINDS.items()
    }
    assert robustness.chosen(document) == best
    table = ROBUSTNESS.tables(document)[1]
    for (kind, row), line in zip(best.items(), table.rows, strict=True):
        names = ["accuracy", *(f"gaussian-noise {level:g}" for level in LEVELS)]
        names += [f"{name} {severity:g}" for name, severity in UNSEEN]
        last = text([score(row, 0), score(row, 1)])
        assert line == (f"{kind}: {row}", *(text(values(document, row, name)) for name in names), last)


def test_the_front_has_the_rows_that_no_row_beats_in_both_columns():
    measured = {"a": (0.9, 0.4), "b": (0.8, 0.6), "c": (0.7, 0.5), "d": (0.8, 0.3)}
    noises = [f"gaussian-noise {level:g}" for level in LEVELS]
    cells = [
        {"row": row, "column": "all", "seed": 0, "measures": {"accuracy": clean} | dict.fromkeys(noises, noisy)}
        for row, (clean, noisy) in measured.items()
    ]
    assert robustness.front({"cells": cells}) == (
        ("a", "90.0", "40.0", "yes"),
        ("b", "80.0", "60.0", "yes"),
        ("d", "80.0", "30.0", "no"),
        ("c", "70.0", "50.0", "no"),
    )


def test_the_choice_looks_at_no_test_image(document):
    changed = copy.deepcopy(document)
    for number, cell in enumerate(changed["cells"]):
        for name in cell["measures"]:
            if not name.startswith("validation"):
                cell["measures"][name] = (7 * number % 10) / 10
    assert robustness.chosen(changed) == robustness.chosen(document)


def test_the_table_of_shifts_is_made_of_the_stored_numbers(document):
    table = ROBUSTNESS.tables(document)[2]
    assert table.head == ("row", "steps", "none", "salt-and-pepper 0.05", "blur 1", "contrast 0.5")
    for row, line in zip(ROWS, table.rows, strict=True):
        names = ["accuracy", *table.head[3:]]
        assert line[0] == row
        assert line[2:] == tuple(text(values(document, row, name)) for name in names)


def test_some_rows_make_tables_and_a_figure_too(document):
    few = {**document, "cells": [cell for cell in document["cells"] if cell["row"] in {"λ = 0", "λ = 1"}]}
    assert [line[0] for line in ROBUSTNESS.tables(few)[1].rows] == ["penalty: λ = 1"]
    assert ROBUSTNESS.figure(few).startswith(b"<?xml")
    assert ROBUSTNESS.figure(document) == ROBUSTNESS.figure(document)


def test_sizes():
    cells = {size: ROBUSTNESS.cells(Reproduce(name="robustness", size=size, seeds=2)) for size in ("cpu", "paper")}
    assert [cell.seed for cell in cells["cpu"]] == [0] * len(ROWS) + [1] * len(ROWS)
    training = round(0.9 * len(datasets.load("digits").train))
    assert {cell.settings["steps"] for cell in cells["paper"]} == {500 * (training // 128)}
    assert {cell.settings["schedule"] for cell in cells["paper"]} == {"step"}
    with pytest.raises(InputError, match=r"`--data` of `reproduce robustness` must have classes\. Got synthetic"):
        ROBUSTNESS.cells(Reproduce(name="robustness", data="synthetic:D=2,K=1,N=9,T=3"))


@pytest.mark.parametrize(("size", "count", "wanted"), [("cpu", 3000, 1000), ("cpu", 700, 700), ("paper", 3000, 3000)])
def test_networks_are_judged_on_a_random_sample_of_sorted_data(size, count, wanted):
    split = Split(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count) * 3 // count)
    request = Reproduce(name="robustness", size=size)
    part = robustness._some(split, request)
    assert len(part.y.unique()) == 3
    assert len(part) == len(part.x.unique()) == wanted
    assert torch.equal(part.x, robustness._some(split, request).x)


def test_every_column_is_of_the_sample(monkeypatch):
    """With data of which the sample is a part, each accuracy is a whole number of its images."""
    monkeypatch.setattr(robustness, "_JUDGED", 7)
    request = Reproduce(name="robustness", smoke=True)
    cell = ROBUSTNESS.cells(request)[0]
    facts = ROBUSTNESS.prepare(request, Progress(quiet=True))
    assert facts["images"]["test"][0] == facts["images"]["validation"][0] == 7
    assert min(every for _, every in facts["images"].values()) > 7
    measures = ROBUSTNESS.measure(request, cell, facts)
    names = ("accuracy", "validation_accuracy", "blur 1", "validation gaussian-noise 0.4")
    assert all(7 * measures[name] == pytest.approx(round(7 * measures[name])) for name in names)


@pytest.mark.parametrize(
    ("data", "images", "note"),
    [
        ("cifar10", None, "without noise or shift is measured on all images, the other columns on the first 1,000"),
        ("digits", None, "All columns are measured on all test and validation images"),
        ("digits", {"test": [360, 360], "validation": [144, 144]}, "are measured on all test and validation images"),
        (
            "cifar10",
            {"test": [1000, 10000], "validation": [1000, 5000]},
            "1,000 of 10,000 test images and 1,000 of 5,000",
        ),
    ],
)
def test_every_table_says_which_images_it_is_of(document, data, images, note):
    facts = {**document["facts"], "images": images}
    if images is None:
        del facts["images"]
    changed = {**document, "facts": facts, "size": "cpu", "settings": {**document["settings"], "data": data}}
    tables = ROBUSTNESS.tables(changed)
    assert all(note in " ".join(table.notes) for table in tables)
    assert "in passes" in tables[1].title
