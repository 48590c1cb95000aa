"""The effect of settings of the job `surrogate`: activation, weight and points, with and without derivatives."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from jacmatch.jobs.surrogate import points as sampling
from jacmatch.jobs.surrogate.examples import EXAMPLES
from jacmatch.jobs.surrogate.functions import Function, open_function
from jacmatch.jobs.surrogate.points import Samples, errors, query, sample_actively
from jacmatch.objectives import GradientShare
from jacmatch.report import Table
from jacmatch.report.figures import line_figure
from jacmatch.report.tables import entry
from jacmatch.surrogates.modules import Weight, fit_surrogate, new_student, regression
from jacmatch_research.reproduce.equal_error import DERIVATIVES, REACHED_HEAD, VALUES, curves, made, reached
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.tables import Document, grid, names, seeds_of, spreads

LONGER, DERIVATIVES_LONGER = "values, 4 × steps", "values + partials, 4 × steps"
METHODS: dict[str, Mapping[str, Any]] = {
    VALUES: {"slopes": "none", "longer": 1},
    LONGER: {"slopes": "none", "longer": 4},
    DERIVATIVES: {"slopes": "jacobian", "longer": 1},
    DERIVATIVES_LONGER: {"slopes": "jacobian", "longer": 4},
}
STANDARD = "softplus, Sobol, weight by scale"
_DEFAULT = {"activation": "softplus", "sampling": "sobol", "weight": 1.0, "share": None}
ACTIVATIONS = ("silu", "tanh", "gelu", "relu")
WEIGHTS = {f"{factor:g} × the scale": {"weight": factor} for factor in (0.01, 0.1, 10.0, 100.0)}
SHARES = {f"share {share:g}": {"share": share} for share in (0.1, 0.3, 0.5, 0.7, 0.9)}
SAMPLINGS = ("box", "latin-hypercube", "active")
SAMPLES = {"smoke": (12,), "cpu": (32, 64, 128, 256)}
BESIDE = {"smoke": (12,), "cpu": (64, 256)}
"""Numbers of points at which other settings than the standard ones are measured."""
_SHARED = {"hidden": (64, 64), "batch_size": 128, "lr": 3e-3, "rounds": 3}
_STEPS = {"smoke": 5, "cpu": 1000}
_TEST, _TEST_SEED = 1000, 2**20


def _settings(size: str) -> list[tuple[str, dict[str, Any], tuple[str, ...], tuple[int, ...]]]:
    """Name, settings, methods and numbers of points of each line; in smoke size one of each kind."""
    both, beside, some = (VALUES, DERIVATIVES), BESIDE[size], slice(1) if size == "smoke" else slice(None)
    return [
        (STANDARD, {}, tuple(METHODS), SAMPLES[size]),
        *((name, {"activation": name}, both, beside) for name in ACTIVATIONS[some]),
        *((name, how, (DERIVATIVES,), beside) for name, how in list(WEIGHTS.items())[some]),
        *((name, how, (DERIVATIVES,), beside) for name, how in list(SHARES.items())[some]),
        *((name, {"sampling": name}, both, beside) for name in SAMPLINGS[2 if size == "smoke" else 0 :]),
    ]


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    return [
        Cell(
            f"{function}: {name}: {method}",
            str(samples),
            seed,
            {
                **_SHARED,
                **_DEFAULT,
                **how,
                "function": function,
                "samples": samples,
                "slopes": METHODS[method]["slopes"],
                "steps": METHODS[method]["longer"] * _STEPS[size],
            },
        )
        for function in list(EXAMPLES)[: 1 if request.smoke else None]
        for name, how, methods, numbers in _settings(size)
        for samples in numbers
        for method in methods
        for seed in request.seed_numbers(5)
    ]


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Errors of values and derivatives at fresh points, in units; evaluations, and the seconds of the training."""
    options = cell.settings
    call = EXAMPLES[options["function"]]
    corners = sampling.box(call.low, call.high, None)  # type: ignore[attr-defined]
    units = (corners[1] - corners[0]) / 12**0.5
    test_x = sampling.inside(sampling.cube("box", _TEST, len(units), _TEST_SEED), corners)
    function = open_function(options["function"], call, test_x[:4], units)
    data = _points(cell, function, corners)
    start = time.perf_counter()
    student = _trained(options, data, units, cell.seed, options["steps"], request.device)
    seconds = time.perf_counter() - start
    test = query(function, test_x, jacobians=True)
    results = errors(student, test, units, test.y.std(0))
    return {
        "values": results["values"],
        "slopes": results["slopes"],
        "points_asked": float(data.calls),
        "train_seconds": seconds,
    }


def _points(cell: Cell, function: Function, corners: Tensor) -> Samples:
    """The training points of a cell and what the function says there."""
    options, units = cell.settings, function.units

    def draw(number: int, seed: int) -> Tensor:
        return sampling.inside(sampling.cube(options["sampling"], number, len(units), seed), corners)

    def answer(x: Tensor) -> Samples:
        return query(function, x, jacobians=options["slopes"] != "none")

    def learn(data: Samples) -> nn.Module:
        return _trained(options, data, units, cell.seed, max(1, options["steps"] // 2), "cpu")

    first = draw(options["samples"], cell.seed)
    if options["sampling"] != "active":
        return answer(first)
    return sample_actively(
        first,
        draw,
        answer,
        learn,
        (units, None),
        options["samples"],
        rounds=options["rounds"],
        seed=2**16 * (cell.seed + 1),
    )


def _trained(options: Mapping[str, Any], data: Samples, units: Tensor, seed: int, steps: int, device: str) -> nn.Module:
    """A student of these points."""
    x, y = data.x.float(), data.y.float()
    j = None if data.j is None else data.j.float()
    known: dict[str, Any] = {"jacobian": j, "partials": options["slopes"], "x_scale": units.float(), "seed": seed}
    weight: Weight = "scale" if options["share"] is None else GradientShare(options["share"])
    if options["weight"] != 1:
        mean = regression(new_student(x, y, (1,), "tanh"), x, y, **known)
        weight = options["weight"] * mean.loss_weights.weights["jacobians"]
    return fit_surrogate(
        x,
        y,
        **known,
        weight=weight,
        hidden=tuple(options["hidden"]),
        activation=options["activation"],
        steps=steps,
        batch_size=options["batch_size"],
        lr=options["lr"],
        device=device,
    ).cpu()


def _lines_of(document: Document, function: str) -> Document:
    """The cells of a function with the standard settings, whose rows are the methods."""
    start = f"{function}: {STANDARD}: "
    cells = [{**cell, "row": cell["row"][len(start) :]} for cell in document["cells"] if cell["row"].startswith(start)]
    return {**document, "cells": cells}


def _saved(document: Document) -> list[tuple[str, ...]]:
    """How many points with derivatives are as good as values alone at the most points, by lengths of training."""
    both = [("values", "values, %", 100, 1), ("slopes", "partials, %", 100, 1)]
    most = f"n = {max(map(int, names(document, 'column'))):,}"
    rows = []
    for function in _functions(document):
        for rival, tried in ((VALUES, DERIVATIVES), (LONGER, DERIVATIVES), (LONGER, DERIVATIVES_LONGER)):
            called = {rival: VALUES, tried: DERIVATIVES}
            cells = [
                {**cell, "row": called[cell["row"]]}
                for cell in _lines_of(document, function)["cells"]
                if cell["row"] in called
            ]
            rows += [
                (f"{function}: {first}; {rival} ← {tried}", *rest)
                for first, *rest in reached({**document, "cells": cells}, both)
                if first.endswith(most)
            ]
    return rows


def _functions(document: Document) -> list[str]:
    return list(dict.fromkeys(row.partition(": ")[0] for row in names(document, "row")))


def _tables(document: Document) -> list[Table]:
    notes = (
        f"RMSE at {_TEST} fresh points of the box, in % of the unit: of the standard deviation of the values, and for "
        "partials of that over the standard deviation of the input. Mean ± standard deviation over seeds (of points, "
        f"weights and batches): {seeds_of(document)}.",
        made(document),
    )
    standard = [f"{function}: {STANDARD}: {method}" for function in _functions(document) for method in METHODS]
    columns = sorted(names(document, "column"), key=int)
    head = ("points", *columns)
    return [
        Table("values", "Error of the values", head, tuple(grid(document, "values", rows=standard)), notes),
        Table("partials", "Error of the partials", head, tuple(grid(document, "slopes", rows=standard)), notes[:1]),
        Table(
            "samples",
            "Points with partials that are as good as values alone",
            REACHED_HEAD,
            tuple(_saved(document)),
            (
                "Error: that of the method before ←. Reached with: the smallest number of points with which the "
                "method after ← has at most this error. A step with partials takes two to three times the time.",
            ),
        ),
        _beside(document, "activation", "Activations", (STANDARD, *ACTIVATIONS), notes[:1]),
        _beside(document, "weight", "Weight of the partials", (STANDARD, *WEIGHTS, *SHARES), notes[:1]),
        _beside(document, "sampling", "Where the function is evaluated", (STANDARD, *SAMPLINGS), notes[:1]),
    ]


def _beside(document: Document, name: str, title: str, settings: tuple[str, ...], notes: tuple[str, ...]) -> Table:
    """Both errors of other settings beside the standard ones, at the numbers of points that all have."""
    results = {measure: spreads(document, measure) for measure in ("values", "slopes")}
    sizes = {size: [str(n) for n in numbers] for size, numbers in BESIDE.items()}
    columns = [column for column in names(document, "column") if column in sizes[document["size"]]]
    methods = [DERIVATIVES] if name == "weight" else [VALUES, DERIVATIVES]
    head = [f"{measure}, n = {column}" for column in columns for measure in ("values", "partials")]
    rows = []
    for function in _functions(document):
        for setting in settings:
            for method in methods:
                row = f"{function}: {setting}: {method}"
                if (row, columns[0]) in results["values"]:
                    cells = (results[m].get((row, column)) for column in columns for m in ("values", "slopes"))
                    rows.append((row, *(entry(cell) for cell in cells)))
    if name == "sampling":
        options = spreads(document, "points_asked")
        rows = [(row, *rest, *(_count(options.get((row, column))) for column in columns)) for row, *rest in rows]
        head += [f"evaluations, n = {column}" for column in columns]
    return Table(name, title, ("function and setting", *head), tuple(rows), notes)


def _count(value: Mapping[str, Any] | None) -> str:
    return entry(value, 1, 0).partition(" ")[0]


def _figure(document: Document) -> bytes:
    """Both errors over the number of points, for each function."""
    panels = [
        (f"{function}, {label}", curves(_lines_of(document, function), measure, 100, tuple(METHODS)))
        for function in _functions(document)
        for measure, label in (("values", "values"), ("slopes", "partials"))
    ]
    return line_figure(panels, x_label="points", y_label="RMSE, % of the unit", log_x=True, log_y=True)


_ABOUT = "what activation, weight and choice of points do to a surrogate, with and without partials"
SURROGATE_TABLE = Experiment(_ABOUT, _cells, _measure, _tables, _figure)
