"""Four-wheel and two-wheel steering, and networks instead of the controller."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jacmatch.jobs.study import Progress
from jacmatch.report import Table
from jacmatch_research.figures import line_figure
from jacmatch_research.reproduce.equal_error import (
    ADAM,
    DERIVATIVES,
    METHODS,
    VALUES,
    columns_of,
    curves,
    made,
    measured,
    saved,
    surrogate,
)
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.systems.steering.control import Linear, Lqr, drive, lane_change
from jacmatch_research.systems.steering.learning import (
    CARS,
    GRID,
    answers,
    as_controller,
    below_limits,
    gain_error,
    loops,
    regret,
    taught,
)
from jacmatch_research.tables import Document, seeds_of, spreads

FREE = {VALUES: "values below the limits", DERIVATIVES: "values + partials below the limits"}
"""Rows that learn each angle from the states in which it is below its limit."""
ROWS = (*METHODS, *FREE.values(), ADAM)
ONE_VALUES, ONE_DERIVATIVES = "gain: values", "gain: values + partials"
SAMPLES = {"smoke": (30,), "cpu": (10, 20, 50, 100)}
_STATES = {"smoke": (1,), "cpu": (1, 2, 4, 5)}
EVALUATIONS: dict[str, dict[str, dict[int, int]]] = {
    "smoke": {VALUES: {30: 60}, DERIVATIVES: {30: 40}},
    "cpu": {VALUES: dict.fromkeys((10, 20, 50, 100), 3000), DERIVATIVES: dict.fromkeys((10, 20, 50, 100), 2000)},
}
"""Evaluations of the last fit: about as many processor seconds for both methods at each number of samples."""
_ADAM = {"smoke": (30, 20), "cpu": (50, 700)}
"""Samples at which Adam is compared, and its steps: about as many processor seconds again."""
_GAIN_STEPS = {"smoke": 30, "cpu": 1500}
_HIDDEN = {"hidden": (32, 32), "activation": "silu"}
_OF_ADAM = {**_HIDDEN, "probes": 2, "batch_size": 64, "lr": 0.02, "weight": "scale"}
TESTED, _TEST_SEED = {"smoke": 60, "cpu": 2000}, 2**20
_DRIVEN = {"smoke": (20.0,), "cpu": (10.0, 20.0, 35.0)}
_SPEED = 20.0
CAP = 10.0
"""Maximum regret that is counted, as a multiple of the teacher's cost."""
MEASURES = (
    ("rmse", "angles, mrad", 1e3, 2),
    ("gain", "gain, %", 100, 1),
    ("stable", "stable loops, %", 100, 1),
    ("part", "largest real part, 1/s", 1, 2),
    ("regret", "regret, median %", 100, 2),
    ("good", "drives below 10 % regret, %", 100, 0),
)


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    seeds = request.seed_numbers(5)
    shared = {"steps": _GAIN_STEPS[size], "speed": _SPEED}
    cells = [
        Cell(row, str(states), seed, {**shared, "states": states, "partials": row == ONE_DERIVATIVES})
        for states in _STATES[size]
        for row in (ONE_VALUES, ONE_DERIVATIVES)
        for seed in seeds
    ]
    of_adam, steps = _ADAM[size]
    for seed in seeds:
        for samples in SAMPLES[size]:
            for method in METHODS:
                each = {"samples": samples, "partials": method == DERIVATIVES}
                how = {**_HIDDEN, "evaluations": EVALUATIONS[size][method][samples], **each}
                cells.append(Cell(method, str(samples), seed, {**how, "free": False}))
                cells.append(Cell(FREE[method], str(samples), seed, {**how, "free": True}))
                if samples == of_adam and method == DERIVATIVES:
                    cells.append(Cell(ADAM, str(samples), seed, {**_OF_ADAM, "steps": steps, **each, "free": False}))
    return cells


def _prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """Drives with two and with four wheels, which need no seed."""
    rows = []
    for name, wanted, start in (("lane change of 3.5 m", lane_change(), 0.0), ("step of 1 m", None, 1.0)):
        for speed in _DRIVEN["smoke" if request.smoke else "cpu"]:
            for wheels in (2, 4):
                lqr = Lqr(wheels=wheels)
                gain, _ = lqr.solution(speed)
                options: dict[str, Any] = {} if wanted is None else {"wanted": wanted}
                states = np.array([[start, 0.0, 0.0, 0.0]])
                results = drive(lqr.vehicle, Linear(gain), states, np.array([speed]), **options)
                summary = {key: round(value, 7) for key, value in results.summary(speed).items()}
                largest = np.abs(results.inputs).max((0, 1)).round(5).tolist()
                cost = round(float(results.cost[0]), 5)
                rows.append(
                    {"task": name, "speed": speed, "wheels": wheels, **summary, "angles": largest, "cost": cost}
                )
    return {"drives": rows}


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """The error of a gain, or of a network: its angles, closed loops and regret."""
    options, size = cell.settings, "smoke" if request.smoke else "cpu"
    if "states" in options:
        error = gain_error(
            options["speed"], options["states"], partials=options["partials"], steps=options["steps"], seed=cell.seed
        )
        return {"gain_error": error}
    x, y, partials = taught(options["samples"], cell.seed)
    learn = partial(surrogate, settings=options, seed=cell.seed, device=request.device)
    student, training = below_limits(x, y, partials, learn) if options["free"] else learn((x, y), partials)
    at, exact = answers(TESTED[size], _TEST_SEED)
    angles = as_controller(student)(at[:, :4].numpy(), at[:, 4].numpy())
    error = float(np.sqrt(np.square(angles - exact.numpy()).mean()))
    parts, gains = loops(student)
    more = regret(student)
    return {
        "rmse": error,
        "gain": float(gains.mean()),
        "stable": float((parts < 0).mean()),
        "part": float(parts.max()),
        "regret": float(np.median(more)),
        "good": float((more < 0.1).mean()),
        **training,
    }


def _tables(document: Document) -> list[Table]:
    document = _capped(document)
    size = document["size"]
    notes = (
        f"Mean ± standard deviation over seeds (of states and weights): {seeds_of(document)}. Angles at "
        f"{TESTED[size]} new states, clipped at the limits. Gain: ‖J + K‖/‖K‖ at z = 0, with each entry of z in "
        f"units of its acceptable value. Loops: the eigenvalues of A + BJ at {len(GRID)} speeds from {GRID[0]:.0f} to "
        f"{GRID[-1]:.0f} m/s. Regret: cost of {CARS} drives of 6 s above that of the teacher, which is clipped at the "
        f"same angles; a regret above {100 * CAP:,.0f} % counts as {100 * CAP:,.0f} %.",
        made(document),
    )
    compared = {"{}": METHODS, "{}, below the limits": (FREE[VALUES], FREE[DERIVATIVES])}
    title = "Networks instead of the scheduled, saturated controller"
    return [
        measured(document, "controllers", title, MEASURES, ROWS, notes),
        saved(document, "Samples", (*MEASURES[:2], ("regret", "regret, %", 100, 2)), compared),
        _gain_table(document),
        _drive_table(document),
    ]


def _capped(document: Document) -> Document:
    """Return the document with regrets clipped at `CAP`: the unbounded cost of a lost car would dominate a mean."""
    cells = [dict(cell, measures=dict(cell["measures"])) for cell in document["cells"]]
    for cell in cells:
        if "regret" in cell["measures"]:
            cell["measures"]["regret"] = min(cell["measures"]["regret"], CAP)
    return {**document, "cells": cells}


def _gain_table(document: Document) -> Table:
    results = spreads(document, "gain_error")
    columns = columns_of(document, ONE_VALUES)
    rows = [
        (row, *(f"{max(results[row, column]['values']):.1e}" for column in columns if (row, column) in results))
        for row in (ONE_VALUES, ONE_DERIVATIVES)
    ]
    return Table(
        "gain",
        f"Largest error of the gain of u = −Kz at {_SPEED:.0f} m/s, relative to its largest entry, by number of states",
        ("learned from", *columns),
        tuple(rows),
        ("A linear network with an offset, in float32; the worst of the seeds. Values alone need five states.",),
    )


def _drive_table(document: Document) -> Table:
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "largest offset, cm": lambda row: f"{100 * row['offset_largest']:.1f}",
        "rms offset, cm": lambda row: f"{100 * row['offset_rms']:.1f}",
        "below 5 cm after, s": lambda row: f"{row['settled']:.2f}",
        "side slip, mrad": lambda row: f"{1e3 * row['slip_largest']:.1f}",
        "angles front / rear, mrad": lambda row: " / ".join(f"{1e3 * angle:.0f}" for angle in row["angles"]),
        "effort, 10⁻³ rad² s": lambda row: f"{1e3 * row['effort']:.2f}",
        "cost": lambda row: f"{row['cost']:.2f}",
    }
    rows = tuple(
        (f"{row['task']}, {row['speed']:.0f} m/s: {row['wheels']} wheels", *(text(row) for text in shown.values()))
        for row in document["facts"]["drives"]
    )
    return Table("wheels", "Four-wheel against two-wheel steering, unsaturated", ("drive of 6 s", *shown), rows)


def _figure(document: Document) -> bytes:
    """Angles, stable loops and regret over the number of samples."""
    document, drawn = _capped(document), (*METHODS, *FREE.values())
    panels = [
        ("angles, RMSE in mrad", curves(document, "rmse", 1e3, drawn)),
        ("error of the gain, %", curves(document, "gain", 100, drawn)),
        ("loops that are not stable + 0.1, %", _unstable(document, drawn)),
        ("regret, median in %", curves(document, "regret", 100, drawn)),
    ]
    return line_figure(panels, x_label="samples", y_label="", log_x=True, log_y=True)


def _unstable(document: Document, rows: Sequence[str]) -> list[Any]:
    lines = curves(document, "stable", 100, rows)
    return [type(line)(line.label, line.x, [100.1 - mean for mean in line.mean]) for line in lines]


_ABOUT = "four-wheel against two-wheel steering by LQR, and networks that replace the controller"
STEERING = Experiment(_ABOUT, _cells, _measure, _tables, _figure, _prepare)
