"""Options learned from single paths: values alone against values and derivatives, at equal numbers of paths."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.jacobian import jacobian
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, Spread
from jacmatch.surrogates import DataWarning
from jacmatch.surrogates.modules import fit_surrogate, new_student
from jacmatch_research.figures import Line, line_figure
from jacmatch_research.reproduce.equal_error import crossing, made, surrogate
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.systems.pricing import OPTIONS, Basket, WorstOf
from jacmatch_research.tables import Document, grid, names, seeds_of, spreads

VALUES, LONGER, LONGEST, DERIVATIVES = "values", "values, 4 × steps", "values, 16 × steps", "values + partials"
DERIVATIVES_LONGER = "values + partials, 4 × steps"
RIVALS, TRIED = (VALUES, LONGER, LONGEST), (DERIVATIVES, DERIVATIVES_LONGER)
METHODS: dict[str, Mapping[str, Any]] = {
    VALUES: {"slopes": "none", "longer": 1},
    LONGER: {"slopes": "none", "longer": 4},
    LONGEST: {"slopes": "none", "longer": 16},
    DERIVATIVES: {"slopes": "jacobian", "longer": 1},
    DERIVATIVES_LONGER: {"slopes": "jacobian", "longer": 4},
}
"""Three lengths of training without derivatives (the longest only with the most paths), and two with them."""
CHOSEN = {f"{VALUES}, length held out": RIVALS, f"{DERIVATIVES}, length held out": TRIED}
"""For each seed, the length with the lowest loss on the paths of the validation set."""
EARLY = f"{LONGEST}, stopped early"
HINDSIGHT = "best length in hindsight"

SECOND_ORDER = f"{DERIVATIVES}, L-BFGS"
_EVALUATIONS = {"smoke": (512, 20), "cpu": (4096, 300)}
"""Paths at which the second-order solver is compared, and evaluations of its last fit."""
PATHS = {"smoke": (512,), "cpu": (1024, 4096, 12_288, 16_384, 65_536)}
"""12,288 paths are less than a fifth of 65,536."""
_SHARED = {"hidden": (20, 20, 20, 20), "activation": "softplus", "batch_size": 1024, "lr": 0.02, "weight": 20.0}
_STEPS = {"smoke": 5, "cpu": 400}
_TEST = {"smoke": 200, "cpu": 2000}
_TEST_SEED = 2**20
_OF_PATHS = 10_000  # seeds of paths are those of their states and this
_HELD_OUT = 2**19  # seeds of states of the validation set are those of the cell and this
_LOOK = 50  # steps between two validations on them
_SCALES = {"price": 1e4, "delta": 100.0}


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    paths, evaluations = _EVALUATIONS[size]
    second: dict[str, Any] = {name: _SHARED[name] for name in ("hidden", "activation")}
    second |= {"paths": paths, "partials": True, "evaluations": evaluations}
    return [
        *_cells_of_adam(request, size),
        *(
            Cell(f"{option}: {SECOND_ORDER}", str(paths), seed, {**second, "option": option})
            for option in OPTIONS
            for seed in request.seed_numbers(5)
        ),
    ]


def _cells_of_adam(request: Request, size: str) -> list[Cell]:
    return [
        Cell(
            f"{option}: {method}",
            str(paths),
            seed,
            {
                **_SHARED,
                "option": option,
                "paths": paths,
                "slopes": how["slopes"],
                "steps": how["longer"] * _STEPS[size],
            },
        )
        for option in OPTIONS
        for paths in PATHS[size]
        for method, how in METHODS.items()
        for seed in request.seed_numbers(5)
        if method != LONGEST or paths == PATHS[size][-1]
    ]


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """RMSE of price and deltas at new states, loss on held-out paths, and the seconds of the training.

    One held-out path comes with four training paths. `early_` are the errors of the network as it was when its loss on
    the held-out paths was lowest.
    """
    options = cell.settings
    option = OPTIONS[options["option"]]
    x, y, gradients = _labeled(option, options["paths"], cell.seed)
    test = options["option"], _TEST["smoke" if request.smoke else "cpu"]
    if "evaluations" in options:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # the values are noisy
            student, training = surrogate((x, y), gradients, options, cell.seed)
        return {**_errors(*test, student), "train_seconds": training["cpu_seconds"]}
    each = float((gradients * x.std(0) / y.std(0)).square().sum((1, 2)).mean())
    weight = options["weight"] / each
    with torch.random.fork_rng([]):
        torch.manual_seed(cell.seed)
        student = new_student(x, y, tuple(options["hidden"]), options["activation"])
    held_out = _labeled(option, options["paths"] // 4, cell.seed + _HELD_OUT)
    loss = _Loss(held_out, weight if options["slopes"] == "jacobian" else 0.0, x.std(0), y.std(0))
    lowest, early = float("inf"), student.state_dict()

    def look(step: int, _: Mapping[str, float]) -> None:
        nonlocal lowest, early
        if step % _LOOK == 0 and (results := loss(student)) < lowest:
            lowest, early = results, {name: value.clone() for name, value in student.state_dict().items()}

    start = time.perf_counter()
    fit_surrogate(
        x,
        y,
        jacobian=gradients,
        partials=options["slopes"],
        weight=weight,
        student=student,
        steps=options["steps"],
        batch_size=options["batch_size"],
        lr=options["lr"],
        seed=cell.seed,
        device=request.device,
        on_step=look,
    )
    results: Measures = {"train_seconds": time.perf_counter() - start, "held_out": loss(student)}
    results |= _errors(*test, student)
    student.load_state_dict(early)
    stopped = _errors(*test, student)
    return results | {f"early_{name}": stopped[name] for name in ("price_rmse", "delta_rmse")}


Labeled = tuple[Tensor, Tensor, Tensor]
"""States, payoffs or prices, and their derivatives."""


def _labeled(option: Basket | WorstOf, paths: int, seed: int) -> Labeled:
    x = option.states(paths, seed)
    y, gradients = option.paths(x, seed + _OF_PATHS)
    return x.float(), y.float(), gradients.float()


@dataclass(frozen=True)
class _Loss:
    """The loss that a student is trained by, on other paths."""

    paths: Labeled
    weight: float
    inputs: Tensor
    outputs: Tensor

    def __call__(self, student: nn.Module) -> float:
        x, y, gradients = self.paths
        if not self.weight:
            with torch.no_grad():
                return float(((student(x) - y) / self.outputs).square().mean())
        predicted, predicted_jacobian = (each.detach() for each in jacobian(student, x))
        apart = ((predicted_jacobian - gradients) * self.inputs / self.outputs).square().sum((1, 2)).mean()
        return float(((predicted - y) / self.outputs).square().mean() + self.weight * apart)


@lru_cache(maxsize=4)
def _exact(option: str, count: int) -> Labeled:
    """Fresh states with their exact prices and deltas."""
    points = OPTIONS[option].states(count, _TEST_SEED)
    return points, *OPTIONS[option].exact(points)


def _errors(option: str, count: int, student: nn.Module) -> dict[str, float]:
    points, price, deltas = _exact(option, count)
    predicted, predicted_jacobian = (each.detach().double() for each in jacobian(student, points.float()))
    return {
        "price_rmse": float((predicted - price).square().mean().sqrt()),
        "delta_rmse": float((predicted_jacobian - deltas).square().mean().sqrt()),
        "price_worst": float((predicted - price).abs().max()),
        "price_std": float(price.std()),
        "delta_std": float(deltas.std(0).square().mean().sqrt()),
    }


def with_chosen(document: Document) -> Document:
    """The document with further rows: lengths of training selected on held-out paths, and early stopping."""
    by = {(cell["row"], cell["column"], cell["seed"]): cell for cell in document["cells"]}
    more = []
    for option in OPTIONS:
        for name, lengths in CHOSEN.items():
            for column in names(document, "column"):
                for seed in sorted({cell["seed"] for cell in document["cells"]}):
                    have = [by[key] for each in lengths if (key := (f"{option}: {each}", column, seed)) in by]
                    if have:
                        best = min(have, key=lambda cell: cell["measures"]["held_out"])
                        more.append({**best, "row": f"{option}: {name}"})
        for cell in document["cells"]:
            if cell["row"] == f"{option}: {LONGEST}":
                early = {name: cell["measures"][f"early_{name}"] for name in ("price_rmse", "delta_rmse")}
                more.append({**cell, "row": f"{option}: {EARLY}", "measures": cell["measures"] | early})
    return {**document, "cells": [*document["cells"], *more]}


def _tables(document: Document) -> list[Table]:
    columns, whole = names(document, "column"), with_chosen(document)
    stds = {name: spreads(document, f"{name}_std") for name in ("price", "delta")}
    of_option = {option: f"{option}: {DERIVATIVES}" for option in OPTIONS}
    scales = "; ".join(
        f"{option} {1e4 * stds['price'][row, columns[0]]['mean']:.0f} and "
        f"{100 * stds['delta'][row, columns[0]]['mean']:.1f}"
        for option, row in of_option.items()
        if (row, columns[0]) in stds["price"]
    )
    notes = (
        f"Errors at {_TEST[document['size']]} new states against exact prices, mean ± standard deviation over seeds "
        f"(of paths, weights and batches): {seeds_of(document)}. Unit: the spot price. Length held out: for each "
        "seed, the length of training with the lowest loss on validation paths, a quarter as many as the training "
        "paths.",
        f"Standard deviation of the exact prices (10⁻⁴) and of the deltas (10⁻²): {scales}.",
        made(document),
    )
    head = ("paths", *(f"{int(column):,}" for column in columns))
    return [
        Table("price", "RMSE of the price, 10⁻⁴", head, tuple(grid(whole, "price_rmse", scale=1e4)), notes),
        Table("delta", "RMSE of the deltas, 10⁻²", head, tuple(grid(whole, "delta_rmse", digits=2)), notes[:1]),
        Table(
            "paths",
            "Paths with partials that reach the error of values alone at the largest number of paths",
            ("option and error", "values alone", "error", "reached with", "share", "by interpolation"),
            tuple(
                line for option in OPTIONS for error in ("price", "delta") for line in _reached(whole, option, error)
            ),
            (
                "With partials the length is always the held-out one. Hindsight: the length with the lowest mean "
                "error, which cannot be known without exact prices. By interpolation: on a straight line through the "
                "logarithms.",
            ),
        ),
        Table(
            "seconds",
            "Seconds of training",
            head,
            tuple(grid(document, "train_seconds", scale=1, digits=1)),
            ("One thread, with other work on the machine: neither the numbers nor their ratios are exact.",),
        ),
    ]


def _reached(document: Document, option: str, error: str) -> list[tuple[str, ...]]:
    """Return, for each method without derivatives, the number of paths with derivatives that reach its lowest error."""
    results = spreads(document, f"{error}_rmse")
    columns = sorted(names(document, "column"), key=int)
    chosen, tried = CHOSEN
    at_most = {name: results.get((f"{option}: {name}", columns[-1])) for name in (chosen, EARLY, *RIVALS)}
    bounds = {name: value["mean"] for name, value in at_most.items() if value is not None}
    rivals = {"length held out": bounds.get(chosen), "stopped early": bounds.get(EARLY)}
    rivals[HINDSIGHT] = min((bounds[name] for name in RIVALS if name in bounds), default=None)
    row = f"{option}: {tried}"
    known = [(int(column), results[row, column]["mean"]) for column in columns if (row, column) in results]
    return [(f"{option}: {error}", name, *_against(bound, known, _SCALES[error])) for name, bound in rivals.items()]


def _against(bound: float | None, known: list[tuple[int, float]], scale: float) -> tuple[str, ...]:
    """Return the bound, the smallest number of paths that reaches it, its share of the largest, and the crossing."""
    if bound is None or not known:
        return (NOTHING,) * 4
    most = known[-1][0]
    good = [paths for paths, mean in known if mean <= bound]
    reached = (f"{good[0]:,}", f"{100 * good[0] / most:.1f} %") if good else ("none", NOTHING)
    where = crossing(known, bound)
    between = NOTHING if where is None else f"{where:,.0f} ({100 * where / most:.1f} %)"
    return f"{scale * bound:.2f}", *reached, between


def _figure(document: Document) -> bytes:
    """Errors over the number of paths: a panel for each option and error."""
    panels, document = [], with_chosen(document)
    for option in OPTIONS:
        for error, scale, unit in (("price", 1e4, "10⁻⁴"), ("delta", 100.0, "10⁻²")):
            results = spreads(document, f"{error}_rmse")
            lines = [_line(results, f"{option}: {method}", method, scale) for method in (*METHODS, *CHOSEN)]
            panels.append((f"{option}\n{error}, {unit}", [line for line in lines if line.x]))
    return line_figure(panels, x_label="paths", y_label="RMSE", log_x=True, log_y=True)


def _line(results: Mapping[tuple[str, str], Spread], row: str, label: str, scale: float) -> Line:
    have = sorted((int(column), value) for (name, column), value in results.items() if name == row)
    means = [scale * value["mean"] for _, value in have]
    return Line(label, [float(paths) for paths, _ in have], means, [scale * (v["std"] or 0.0) for _, v in have])


_ABOUT = "options from noisy paths and their pathwise derivatives: errors of price and delta against exact ones"
PRICING = Experiment(_ABOUT, _cells, _measure, _tables, _figure)
