"""Effects of the settings of `surrogate`: model, activation, weight and points, with and without derivatives."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from jacmatch.jobs import Surrogate
from jacmatch.jobs.surrogate import points as sampling
from jacmatch.jobs.surrogate.functions import EXAMPLES
from jacmatch.jobs.surrogate.points import Samples, errors, query, sample_actively
from jacmatch.jobs.surrogate.source import Source, open_source
from jacmatch.report import Table
from jacmatch.report.tables import entry
from jacmatch.surrogates.gaussian_process import select_process
from jacmatch.surrogates.modules import fit_surrogate, to_process_module
from jacmatch_research.figures import line_figure
from jacmatch_research.reproduce.equal_error import DERIVATIVES, REACHED_HEAD, VALUES, curves, made, reached
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.tables import Document, grid, names, seeds_of, spreads

METHODS = (VALUES, DERIVATIVES)
STANDARD = "default"
MODELS = {
    "model network": {"model": "network"},
    "model gp": {"model": "gp"},
    "Adam, 1,000 steps": {"model": "network", "solver": "adam", "activation": "softplus"},
}
ACTIVATIONS = {
    f"network, {name}": {"model": "network", "activation": name} for name in ("silu", "tanh", "softplus", "sine")
}
NETWORK = "model network"
WEIGHTS = {
    f"network, {factor:g} × the weight": {"model": "network", "weight": factor} for factor in (0.01, 0.1, 10.0, 100.0)
}
SAMPLINGS = {name: {"sampling": name} for name in ("box", "latin-hypercube", "active")}
_DEFAULT = {"model": "auto", "solver": "lbfgs", "activation": "auto", "sampling": "sobol", "weight": 1.0}
SAMPLES = {"smoke": (12,), "cpu": (32, 64, 128, 256)}
BESIDE = {"smoke": (12,), "cpu": (64,)}
"""Numbers of points at which settings other than the default are measured."""
_STEPS = {"smoke": 5, "cpu": 1000}
_TEST, _TEST_SEED = 1000, 2**20


def _settings(size: str) -> list[tuple[str, dict[str, Any], tuple[str, ...], tuple[int, ...]]]:
    """Name, settings, methods and numbers of points of each line; in smoke size one of each kind."""
    beside, some = BESIDE[size], slice(1) if size == "smoke" else slice(None)
    last = list(SAMPLINGS.items())[2 if size == "smoke" else 0 :]
    return [
        (STANDARD, {}, METHODS, SAMPLES[size]),
        *((name, how, METHODS, beside) for name, how in list(MODELS.items())[some]),
        *((name, how, (DERIVATIVES,), beside) for name, how in [*list((ACTIVATIONS | WEIGHTS).items())[some], *last]),
    ]


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    return [
        Cell(
            f"{function}: {name}: {method}",
            str(samples),
            seed,
            {
                **_DEFAULT,
                **how,
                "function": function,
                "samples": samples,
                "partials": method == DERIVATIVES,
                "steps": _STEPS[size],
                "smoke": request.smoke,
            },
        )
        for seed in request.seed_numbers(3)
        for function in list(EXAMPLES)[: 1 if request.smoke else None]
        for name, how, methods, numbers in _settings(size)
        for samples in numbers
        for method in methods
    ]


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Errors of values and derivatives at new points, in units; evaluations, and processor seconds of the fit."""
    options = cell.settings
    taken = {name: options[name] for name in ("model", "solver", "activation", "sampling", "steps", "smoke")}
    job = Surrogate(teacher=options["function"], samples=(options["samples"],), **taken)
    source = open_source(job)
    assert source.function is not None
    test_x = sampling.inside(sampling.cube("box", _TEST, source.region.shape[1], _TEST_SEED), source.region)
    data = _points(cell, job, source)
    start = time.process_time()
    student = _fitted(job, source, data, cell)
    seconds = time.process_time() - start
    test = query(source.function, test_x, jacobians=True)
    results = errors(student, test, source.units, test.y.std(0))
    return {
        "values": results["values"],
        "slopes": results["slopes"],
        "points_asked": float(data.calls),
        "train_seconds": seconds,
    }


def _points(cell: Cell, job: Surrogate, source: Source) -> Samples:
    """The training points of a cell, with partials if it learns them."""
    options = cell.settings

    def draw(number: int, seed: int) -> Tensor:
        return sampling.inside(sampling.cube(job.sampling, number, source.region.shape[1], seed), source.region)

    def answer(x: Tensor) -> Samples:
        assert source.function is not None
        return query(source.function, x, jacobians=options["partials"])

    def learn(data: Samples) -> nn.Module:
        return _fitted(job, source, data, cell)

    first = draw(options["samples"], cell.seed)
    if job.sampling != "active":
        return answer(first)
    seed = 2**16 * (cell.seed + 1)
    units = (source.units, None)
    return sample_actively(first, draw, answer, learn, units, options["samples"], rounds=job.rounds, seed=seed)


def _fitted(job: Surrogate, source: Source, data: Samples, cell: Cell) -> nn.Module:
    """Return the model that the job fits to these points."""
    options = cell.settings
    method = "slopes" if options["partials"] else "values"
    if job.solver == "adam":
        x, y, j = data.x.float(), data.y.float(), None if data.j is None else data.j.float()
        how: dict[str, Any] = {"jacobian": j, "partials": "none" if j is None else "jacobian"}
        how |= {"x_scale": source.units.float(), "activation": job.activation, "hidden": job.hidden}
        return fit_surrogate(x, y, **how, steps=job.steps, batch_size=job.batch_size, lr=job.lr, seed=cell.seed).cpu()
    if job.model == "gp":
        standardized, scaler = job.standardized(source, data, method)
        process, _ = select_process(standardized, cell.seed, scaler.zero)
        return to_process_module(process, scaler, tuple(data.x.shape[1:]))
    if options["weight"] != 1:
        weights = job.standardized(source, data, method)[0].t_weights
        assert weights is not None
        job = replace(job, jacobian_weight=options["weight"] * float(weights.sum()) / len(weights))
    return job.network_of(source, data, method, cell.seed)[0].cpu().eval()


def _lines_of(document: Document, function: str) -> Document:
    """The cells of a function with the standard settings, whose rows are the methods."""
    start = f"{function}: {STANDARD}: "
    cells = [{**cell, "row": cell["row"][len(start) :]} for cell in document["cells"] if cell["row"].startswith(start)]
    return {**document, "cells": cells}


def _saved(document: Document) -> list[tuple[str, ...]]:
    """Return the number of points with derivatives that are as good as values alone."""
    both = [("values", "values, %", 100, 1), ("slopes", "partials, %", 100, 1)]
    return [
        (f"{function}: {first}", *rest)
        for function in _functions(document)
        for first, *rest in reached(_lines_of(document, function), both)
    ]


def _functions(document: Document) -> list[str]:
    return list(dict.fromkeys(row.partition(": ")[0] for row in names(document, "row")))


def _tables(document: Document) -> list[Table]:
    notes = (
        f"RMSE at {_TEST} new points of the box, in % of the unit: the standard deviation of the values, which for "
        "partials is divided by the standard deviation of the input. Mean ± standard deviation over seeds (of points "
        f"and weights): {seeds_of(document)}.",
        made(document),
    )
    standard = [f"{function}: {STANDARD}: {method}" for function in _functions(document) for method in METHODS]
    columns = sorted(names(document, "column"), key=int)
    head = ("points", *columns)
    of_saved = "An error without partials, and the number of points with partials that reach it."
    return [
        Table("values", "Error of the values", head, tuple(grid(document, "values", rows=standard, digits=2)), notes),
        Table(
            "partials",
            "Error of the partials",
            head,
            tuple(grid(document, "slopes", rows=standard, digits=2)),
            notes[:1],
        ),
        Table(
            "samples",
            "Points with partials that are as good as values alone",
            REACHED_HEAD,
            tuple(_saved(document)),
            (of_saved,),
        ),
        _beside(document, "model", "Models", (STANDARD, *MODELS), notes[:1]),
        _beside(document, "activation", "Activations of a network", (NETWORK, *ACTIVATIONS), notes[:1]),
        _beside(document, "weight", "Weight of the partials, for a network", (NETWORK, *WEIGHTS), notes[:1]),
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
                    rows.append((row, *(entry(cell, digits=2) for cell in cells)))
    if name == "sampling":
        options = spreads(document, "points_asked")
        rows = [(row, *rest, *(_count(options.get((row, column))) for column in columns)) for row, *rest in rows]
        head += [f"evaluations, n = {column}" for column in columns]
    if name == "model":
        seconds = spreads(document, "train_seconds")
        rows = [(row, *rest, *(entry(seconds.get((row, column)), 1) for column in columns)) for row, *rest in rows]
        head += [f"processor s, n = {column}" for column in columns]
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


_ABOUT = "effects of model, activation, weight and choice of points on a surrogate, with and without partials"
SURROGATE_TABLE = Experiment(_ABOUT, _cells, _measure, _tables, _figure)
