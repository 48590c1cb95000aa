"""The tables that are committed are those of the numbers that are committed, each computed again from its seeds."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jacmatch_research.reproduce import EXPERIMENTS

RESULTS = Path(__file__).resolve().parents[3] / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/results.json"))


def document(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.ci
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_and_figure_are_made_of_the_stored_numbers(folder):
    stored = document(folder)
    experiment = EXPERIMENTS[stored["experiment"]]
    for table in experiment.tables(stored):
        assert (folder / f"{table.name}.md").read_text(encoding="utf-8") == table.markdown()
        assert (folder / f"{table.name}.csv").read_text(encoding="utf-8") == table.csv()
    assert (folder / "figure.svg").read_bytes()[:5] in {b"<?xml", b"<svg "}
    assert experiment.figure(stored)


BY_COLUMN = {"accuracy": "accuracy", "grid": "validation_accuracy", "validation": "validation_accuracy"}
"""Tables with a row of cells in each row and a column of cells in each column, and what they show."""
HEADS = {
    "accuracy %": "accuracy",
    "agreement %": "top1",
    "probed teacher %": "probe_accuracy",
    "ECE %": "calibration_error",
    "under noise %": "noisy_accuracy",
    "none": "accuracy",
    "0": "accuracy",
    **{f"0.{level}": f"gaussian-noise 0.{level}" for level in (1, 2, 3, 4)},
}
"""Measures that the tables with a column for each measure have under another name."""


BY_COUNT = {"labels alone": "accuracy", "probe's outputs": "accuracy", "probed teacher": "probe_accuracy"}
"""Columns of the table by number of labeled images that are means of cells."""
OTHERS = {"propositions", "kinematics", "grasp", "steering", "pricing", "force-field", "appearance", "surrogate"}
"""Experiments whose tables show no accuracy."""


def meant(table, row, head):
    """Row, column and measure of the cells whose mean, in per cent, an entry of a table is."""
    if table in BY_COLUMN:
        return row, head.removeprefix("n = "), BY_COLUMN[table]
    if table == "by-count":
        labels, outputs = "labels, mixed pairs", "probe on the teacher, then its outputs; 900 unlabelled"
        return labels if head == "labels alone" else outputs, row, BY_COUNT.get(head, head)
    column = "10" if table == "recipes" else "all"  # of transfer, whose recipes are measured in one column
    if row.startswith("n = "):
        column, _, row = row.removeprefix("n = ").partition(": ")
    return row, column, HEADS.get(head, head)


def measured(stored):
    """The values of all shares that the cells measured, by row, column and measure."""
    values = {}
    for cell in stored["cells"]:
        for measure, value in cell["measures"].items():
            if value is not None and not measure.startswith(("steps", "train_seconds")):
                values.setdefault((cell["row"], cell["column"], measure), []).append(value)
    return values


def wrong_entries(table, lines, values):
    """How many entries are means of cells, and those of them that are not the right ones."""
    head, *body = csv.reader(lines)
    entries = [
        (meant(table, row, title), text) for row, *rest in body for title, text in zip(head[1:], rest, strict=True)
    ]
    entries = [(values[key], key, text) for key, text in entries if key in values]
    return len(entries), [(key, text) for seeds, key, text in entries if not right(text, seeds)]


def right(text, seeds):
    """Whether a text is the mean ± standard deviation of these shares in per cent, with one digit."""
    expected = [100 * np.mean(seeds), *([100 * np.std(seeds, ddof=1)] if len(seeds) > 1 else [])]
    written = text.split(" ± ")
    return len(written) == len(expected) and all(
        re.fullmatch(r"-?\d+\.\d", one) and abs(float(one) - other) <= 0.05 + 1e-9
        for one, other in zip(written, expected, strict=True)
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_accuracy_is_the_mean_over_its_seeds(folder):
    """With numpy, from the files alone: each entry of a table that is the mean of cells."""
    stored = document(folder)
    if stored["experiment"] in OTHERS:
        pytest.skip("no accuracies; tests of their own compute their tables again")
    values, checked = measured(stored), {}
    for file in sorted(folder.glob("*.csv")):
        lines = file.read_text(encoding="utf-8").splitlines()
        checked[file.stem], wrong = wrong_entries(file.stem, lines, values)
        assert not wrong, file.name
    main = set(checked) & {*BY_COLUMN, "noise", "recipes"}
    assert main
    assert all(checked[table] for table in main)


def test_a_wrong_entry_is_reported():
    values = {("labels, twice", "5", "accuracy"): [0.5, 0.7], ("b", "5", "accuracy"): [0.25]}
    lines = ["row,n = 5", '"labels, twice",60.0 ± 14.1', "b,25.0", "gain: b − a,1.0"]
    assert wrong_entries("accuracy", lines, values) == (2, [])
    for text in ("60.1 ± 14.1", "60.0 ± 14.2", "60.0", "–"):
        changed = [lines[0], f'"labels, twice",{text}', *lines[2:]]
        assert wrong_entries("accuracy", changed, values) == (2, [(("labels, twice", "5", "accuracy"), text)])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_name_no_folder_of_the_machine(folder):
    for file in folder.iterdir():
        if file.suffix in {".json", ".md", ".csv"}:
            assert not re.search(r"(/root|/home|/tmp|/work|:/)", file.read_text(encoding="utf-8")), file.name
