"""The tables that are committed are those of the numbers that are committed, each computed again from its seeds."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jacmatch.recipes.reproduce import EXPERIMENTS

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob("*/results.json"))


def document(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_and_figure_are_made_of_the_stored_numbers(folder):
    stored = document(folder)
    experiment = EXPERIMENTS[stored["experiment"]]
    for table in experiment.tables(stored):
        assert (folder / f"{table.name}.md").read_text(encoding="utf-8") == table.markdown()
        assert (folder / f"{table.name}.csv").read_text(encoding="utf-8") == table.csv()
    assert (folder / "figure.svg").read_bytes()[:5] in {b"<?xml", b"<svg "}
    assert experiment.figure(stored)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_accuracy_is_the_mean_over_its_seeds(folder):
    """With numpy, from the file alone: each entry of the table of accuracies that has a row and a column."""
    stored = document(folder)
    file = folder / "accuracy.csv"
    if not file.exists():
        pytest.skip("an experiment without accuracies")
    head, *lines = (line.split(",") for line in file.read_text(encoding="utf-8").splitlines())
    values = {}
    for cell in stored["cells"]:
        values.setdefault((cell["row"], cell["column"]), []).append(cell["measures"].get("accuracy"))
    checked = 0
    for row, *entries in lines:
        for column, text in zip(head[1:], entries, strict=True):
            seeds = values.get((row, column))
            if seeds and None not in seeds:
                mean, std = 100 * np.mean(seeds), 100 * np.std(seeds, ddof=1) if len(seeds) > 1 else None
                assert text == (f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}")
                checked += 1
    assert checked


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_name_no_place_of_the_machine(folder):
    for file in folder.iterdir():
        if file.suffix in {".json", ".md", ".csv"}:
            assert not re.search(r"(/root|/home|/tmp|/work|:/)", file.read_text(encoding="utf-8")), file.name
