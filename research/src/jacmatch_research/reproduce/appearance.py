"""Fitting an appearance model: with a fixed Jacobian, without derivatives, and by a student of the latter."""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, Spread, entry
from jacmatch_research.figures import Line, line_figure
from jacmatch_research.reproduce.equal_error import made
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.systems.appearance.faces import Array, Faces, faces
from jacmatch_research.systems.appearance.learning import Glance, displaced, distilled, jumps, lesson, seen
from jacmatch_research.systems.appearance.model import (
    Model,
    build,
    by_fixed_jacobian,
    by_newuoa,
    fixed_jacobian,
    in_image,
    windows,
)
from jacmatch_research.tables import Document, names, seeds_of, spreads

GUESS, FIXED, NEWUOA = "first guess", "fixed Jacobian", "NEWUOA"
UNTAUGHT = "student: not taught"
VALUES, CALLS, DERIVATIVES = "student: values", "student: values, equal calls", "student: values + partials"
SECOND_ORDER = "student: values, L-BFGS"
METHODS: dict[str, Mapping[str, Any]] = {
    GUESS: {},
    FIXED: {},
    NEWUOA: {},
    UNTAUGHT: {},
    VALUES: {"directions": 0, "times": 1},
    CALLS: {"directions": 0, "times": 3},
    DERIVATIVES: {"directions": 1, "times": 1},
    SECOND_ORDER: {"directions": 0, "times": 1, "evaluations": 300},
}
"""A derivative costs two calls of the fitter, so methods without derivatives get three times as many faces."""
DISTANCES = (0.05, 0.1, 0.2, 0.3, 0.4)
"""Distances of the first guess from the true position of the face, in half widths of a face."""
NEAR = 0.1
"""The distance of the main column."""
CONVERGED = 7.5
"""A fit has converged if its mean landmark error is below this percentage of the distance of the eyes."""
_SIZES = {
    "smoke": {"model": 40, "faces": 4, "tested": 3, "steps": 5, "most": 60},
    "cpu": {"model": 150, "faces": 800, "tested": 40, "steps": 400, "most": 1000},
}
_LESSON, _TEST = 10_000, 20_000  # seeds of the faces: those of the cell and this


def _cells(request: Request) -> list[Cell]:
    size = _SIZES["smoke" if request.smoke else "cpu"]
    return [
        Cell(method, "all", seed, {**size, **how, "share": 0.1})
        for seed in request.seed_numbers(5)
        for method, how in METHODS.items()
    ]


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Landmark error, share of converged fits, evaluations and milliseconds, at each distance."""
    options = cell.settings
    model, update = _model(options["model"])
    results: Measures = {}
    if "times" in options:
        examples = lesson(
            model,
            faces(options["times"] * options["faces"], cell.seed + _LESSON),
            directions=options["directions"],
            seed=cell.seed,
            known=_known(options["model"], cell.seed),
        )
        results |= {
            "calls": float(examples.fits),
            "kept": len(examples.x) * (1 + 2 * options["directions"]) / examples.fits,
        }
        if cell.row == DERIVATIVES:
            results["jumps"] = jumps(model, examples, max(1, len(examples.x) // 5))
        how = {name: options[name] for name in ("share", "steps", "evaluations") if name in options}
        student = distilled(model, examples, seed=cell.seed, update=update, **how)
        fit = _student(model, student)
    elif cell.row == UNTAUGHT:
        fit = _student(model, Glance(model, update=update).eval())
    else:
        fit = _fitter(cell.row, model, options)
    shown = faces(options["tested"], cell.seed + _TEST)
    for distance in DISTANCES:
        results |= _tried(fit, shown, model, distance, cell.seed)
    return results


Fitted = Callable[[Faces, Array], tuple[Array, Array]]
"""Faces and first poses to landmarks (face, landmark, 2) in the image, and the evaluations of each."""


def _tried(fit: Fitted, shown: Faces, model: Model, distance: float, seed: int) -> Measures:
    """Return the measures of a method from first guesses that are wrong by `distance`, each in a random direction."""
    angle = np.random.default_rng((seed, int(1000 * distance))).uniform(0, 2 * np.pi, len(shown))
    change = 10 * distance * np.stack((0 * angle, 0 * angle, np.cos(angle), np.sin(angle)), 1)
    poses = displaced(model, shown, change)
    start = time.perf_counter()
    landmarks, evaluations = fit(shown, poses)
    seconds = time.perf_counter() - start
    errors = 100 * np.linalg.norm(landmarks - shown.landmarks, axis=-1).mean(1) / shown.eye_distance
    return {
        f"error {distance:g}": float(errors.mean()),
        f"median {distance:g}": float(np.median(errors)),
        f"converged {distance:g}": float((errors < CONVERGED).mean()),
        f"evaluations {distance:g}": float(np.mean(evaluations)),
        f"milliseconds {distance:g}": 1000 * seconds / len(shown),
    }


def _fitter(method: str, model: Model, options: Mapping[str, Any]) -> Fitted:
    update = _model(options["model"])[1]

    def fit(shown: Faces, poses: Array) -> tuple[Array, Array]:
        if method == GUESS:
            return in_image(np.broadcast_to(model.mean, shown.landmarks.shape), poses), np.zeros(len(shown))
        window = windows(shown.images, poses)
        results = (
            by_fixed_jacobian(model, update, window)
            if method == FIXED
            else by_newuoa(model, window, most=options["most"])
        )
        return in_image(model.shape(results.p), poses), results.evaluations

    return fit


def _student(model: Model, student: Glance) -> Fitted:
    def fit(shown: Faces, poses: Array) -> tuple[Array, Array]:
        p = seen(student, shown.images, poses)
        return in_image(model.shape(p), poses), np.full(len(shown), len(student.maps))

    return fit


@lru_cache(maxsize=1)
def _known(count: int, seed: int) -> dict[bytes, Array]:
    """Stored results of the fitter with a model of this number of faces: training sets of a seed share windows."""
    return {}


@lru_cache(maxsize=1)
def _model(count: int) -> tuple[Model, Array]:
    """The model of this number of faces with their true landmarks, and its fixed Jacobian."""
    shown = faces(count, seed=0)
    model = build(shown)
    return model, fixed_jacobian(model, shown)


def _tables(document: Document) -> list[Table]:
    """The main one, shares of NEWUOA's errors and evaluations, and both measures over the distance."""
    rows = names(document, "row")
    shown = {
        "landmark error %": (f"error {NEAR:g}", 1, 1),
        "median %": (f"median {NEAR:g}", 1, 1),
        "converged %": (f"converged {NEAR:g}", 100, 0),
        "evaluations": (f"evaluations {NEAR:g}", 1, 0),
        "ms": (f"milliseconds {NEAR:g}", 1, 2),
        "calls to learn": ("calls", 1, 0),
        "used %": ("kept", 100, 0),
        "jumps %": ("jumps", 100, 0),
    }
    results = {head: spreads(document, name) for head, (name, _, _) in shown.items()}
    main = Table(
        "appearance",
        f"Fits from a first guess that is wrong by {NEAR:g} half widths of a face",
        ("way to fit", *shown),
        tuple(
            (
                row,
                *(_entry(results[head].get((row, "all")), scale, digits) for head, (_, scale, digits) in shown.items()),
            )
            for row in rows
        ),
        (
            f"Mean ± standard deviation over seeds: {seeds_of(document)}. Landmark error: mean distance in percent of "
            f"the distance of the eyes; converged: below {CONVERGED} %. Evaluations: how often an image is sampled "
            "for a face.",
            "Cropping the window of the face is not counted.",
            "Calls: of the fitter, for the training set; used: results that did not fail; jumps: partials that "
            "change by more than half of their length if the step is halved.",
            made(document, "CPU, one thread, with other work running"),
        ),
    )
    tables = [main, _aim(document)]
    for name, title, scale, digits in (
        ("error", "Landmark error in percent, by the distance of the first guess", 1, 1),
        ("converged", "Basin of convergence: share of converged fits in percent, by that distance", 100, 0),
    ):
        parts = {distance: spreads(document, f"{name} {distance:g}") for distance in DISTANCES}
        lines = tuple((row, *(_entry(parts[d].get((row, "all")), scale, digits) for d in DISTANCES)) for row in rows)
        tables.append(Table(name, title, ("way to fit", *map(str, DISTANCES)), lines))
    return tables


def _aim(document: Document) -> Table:
    """Errors and evaluations of all methods, relative to those of the derivative-free fitter."""
    measures = (f"error {NEAR:g}", f"median {NEAR:g}", f"evaluations {NEAR:g}", f"milliseconds {NEAR:g}")
    results = [spreads(document, name) for name in measures]
    rows = []
    for row in names(document, "row"):
        rival, mine = (results[0].get((name, "all")) for name in (NEWUOA, row))
        if row not in (GUESS, NEWUOA) and rival and mine and rival.get("seeds") == mine.get("seeds"):
            shares = [100 * each[row, "all"]["mean"] / each[NEWUOA, "all"]["mean"] for each in results]
            holds = shares[0] <= 110 and shares[2] <= 1
            texts = [f"{share:.{digits}f}" for share, digits in zip(shares, (0, 0, 2, 2), strict=True)]
            rows.append((row, *texts, "yes" if holds else "no"))
    return Table(
        "aim",
        f"In percent of NEWUOA's, from a first guess that is wrong by {NEAR:g}",
        ("way to fit", "landmark error", "median", "evaluations", "time", "≤ 110 and ≤ 1"),
        tuple(rows),
    )


def _entry(value: Spread | None, scale: float | int, digits: int) -> str:
    return NOTHING if value is None else entry(value, scale, digits)


def _figure(document: Document) -> bytes:
    """Error and share of converged fits over the distance of the first guess."""
    panels = []
    for name, title, scale in (("error", "landmark error, %", 1.0), ("converged", "converged fits, %", 100.0)):
        parts = [spreads(document, f"{name} {distance:g}") for distance in DISTANCES]
        lines = []
        for row in names(document, "row"):
            values = [part[row, "all"] for part in parts]
            stds = [scale * (value["std"] or 0.0) for value in values]
            lines.append(Line(row, list(DISTANCES), [scale * value["mean"] for value in values], stds))
        panels.append((title, lines))
    return line_figure(panels, x_label="distance of the first guess, half widths of a face", y_label="")


_ABOUT = "an active appearance model, fitted by a fixed Jacobian, without derivatives, and by a student of that"
APPEARANCE = Experiment(_ABOUT, _cells, _measure, _tables, _figure)
