"""Little data at equal cost: budgets, the rival that is chosen, and the margin."""

import pytest

from jacmatch_research.reproduce import low_data, students
from jacmatch_research.reproduce.experiment import Request


def cell(row, column, seed, accuracy, validation):
    return {
        "row": row,
        "column": column,
        "seed": seed,
        "measures": {"accuracy": accuracy, "validation_accuracy": validation},
        "seconds": 1.0,
    }


RECIPE, LABELS, MIXED = "mixed: KL + row", "labels", "mixed: outputs, KL"
DOCUMENT = {
    "cells": [
        *(cell(RECIPE, "5", seed, accuracy, 0.0) for seed, accuracy in enumerate((0.50, 0.54, 0.52, 0.56))),
        *(cell(LABELS, "5", seed, 0.51, 0.30) for seed in range(4)),
        *(cell(MIXED, "5", seed, accuracy, 0.40) for seed, accuracy in enumerate((0.48, 0.50, 0.50, 0.52))),
    ]
}


def test_the_rival_is_chosen_on_validation_images_not_on_test():
    """Labels are better on test here, and must not be taken for that."""
    assert low_data.best_free(DOCUMENT, "5") == MIXED


def test_the_margin_is_taken_seed_by_seed():
    """Differences 2, 4, 2, 4 points: mean 3, standard deviation √(4/3) = 1.155, standard error 0.577."""
    assert low_data.margins(DOCUMENT) == [("5", MIXED, "3.0 ± 1.2", "0.6", "5.2")]


def test_every_recipe_has_the_same_budget():
    request = Request(name="low-data", smoke=True)
    cells = low_data.LOW_DATA.cells(request)
    data = students.data_of("digits", 0, True)
    ratio = students.prepare(request, students.Progress(quiet=True))["forward_ratio"]
    spent = {cell.row: cell.settings["steps"] * students.cost(cell.settings, data.outputs, ratio) for cell in cells}
    assert set(spent) == {LABELS, "outputs, KL", "mixed: outputs, squared", MIXED, RECIPE}
    budget = 20 * (3 + ratio)
    for row, cost in spent.items():
        assert cost == pytest.approx(budget, rel=0.03), row  # steps are integers
    assert spent[RECIPE] == pytest.approx(budget, rel=1e-12)


def test_directions_have_the_same_budget():
    """A step of an averaged row costs 1 + 2 · 2 passes: each noisy input takes a forward pass and a row."""
    cells = low_data.LOW_DATA_DIRECTIONS.cells(Request(name="low-data-directions", data="digits"))
    steps = {cell.row: cell.settings["steps"] for cell in cells}
    assert steps == {
        MIXED: 800,
        RECIPE: 400,
        "mixed: KL + data pair": 400,
        "mixed: KL + 16 low frequencies": 400,
        "mixed: KL + row averaged over noise": 160,
    }
    assert {(cell.column, cell.seed) for cell in cells} == {(n, seed) for n in ("1", "5") for seed in range(3)}


def test_every_candidate_is_an_objective():
    """Each row of the grid can be built, and has the terms that its name says."""
    request = Request(name="low-data-grid", smoke=True)
    world = students.world_of(request)
    for row, settings in {**low_data.CANDIDATES, **low_data.DIRECTIONS}.items():
        recipe, method = students.recipe_of(request, world, 0, settings)
        objective = recipe.objective(method, world.description.build(), world.teacher, world.pool, world.data, 0)
        weights = objective.loss_weights.weights
        assert bool(weights["jacobians"]) == (row not in low_data.FREE), row
        assert bool(weights["labels"]) != ("no labels" in row), row
        assert bool(weights["outputs"]) != (row == "labels"), row
