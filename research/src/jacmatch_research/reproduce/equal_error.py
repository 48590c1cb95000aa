"""Surrogates over numbers of samples: the methods that the systems share, and the samples that an error needs."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, entry
from jacmatch.surrogates import JacobianRegressor
from jacmatch.surrogates.modules import fit_surrogate, to_module
from jacmatch_research.figures import Line
from jacmatch_research.tables import Document, names, spreads

VALUES, DERIVATIVES = "values", "values + partials"
METHODS = (VALUES, DERIVATIVES)
ADAM = "values + partials, Adam"
"""The rows: both methods with the second-order solver and, in one column of each system, the second one with Adam."""

Measure = tuple[str, str, float | int, int]
"""Name of a measure, its heading, the factor of its numbers, and digits."""

Points = tuple[Float[Tensor, "sample input"], Float[Tensor, "sample out"]]
"""Inputs and values."""


def surrogate(
    points: Points,
    jacobian: Float[Tensor, "sample out input"],
    settings: Mapping[str, Any],
    seed: int,
    *,
    weights: Float[Tensor, "sample"] | None = None,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a network; return it with the processor seconds that it took.

    Args:
        points: Training samples.
        jacobian: Partials at these points.
        settings: Those of a cell: `partials` (whether to learn from them), `evaluations` of the second-order solver,
            or `steps` of Adam with `lr`, `weight`, `probes` and `batch_size`; `hidden` and `activation`.
        seed: Seed of the weights, the held-out samples, the batches and the rows.
        weights: Weight of each sample, for the second-order solver.
        device: Where Adam trains.
    """
    x, y = points
    layers: dict[str, Any] = {"hidden": tuple(settings["hidden"]), "activation": settings["activation"]}
    start = time.process_time()
    if "steps" in settings:
        how = {name: settings[name] for name in ("steps", "lr", "weight", "probes", "batch_size")}
        compared = "rows" if settings["partials"] else "none"
        network = fit_surrogate(
            x.float(),
            y.float(),
            jacobian=jacobian.float(),
            partials=compared,
            **layers,
            **how,
            seed=seed,
            device=device,
        ).cpu()
        return network, {"evaluations": float(settings["steps"]), "cpu_seconds": time.process_time() - start}
    model = JacobianRegressor(
        "network", "lbfgs", **layers, starts=1, max_evaluations=settings["evaluations"], random_state=seed
    )
    known = jacobian.numpy() if settings["partials"] else None
    model.fit(x.numpy(), y.numpy(), jacobian=known, sample_weight=None if weights is None else weights.numpy())
    seconds, (fit,) = time.process_time() - start, model.fits_
    module = to_module(fit.net, fit.theta, model.scaler_)
    return module, {"evaluations": float(fit.evaluations), "weight_decay": fit.decay, "cpu_seconds": seconds}


def columns_of(document: Document, row: str) -> list[str]:
    """The numbers of samples that a row has, from few to many."""
    return sorted({cell["column"] for cell in document["cells"] if cell["row"] == row}, key=int)


def crossing(curve: list[tuple[int, float]], bound: float) -> float | None:
    """Where a falling curve crosses a bound, by linear interpolation of logarithms; None if it does not cross.

    Example:
        >>> round(crossing([(100, 0.1), (10_000, 0.01)], 0.05))
        400
    """
    for (fewer, high), (more, low) in itertools.pairwise(curve):
        if high > bound >= low:
            share = math.log(high / bound) / math.log(high / low)
            return float(fewer * (more / fewer) ** share)
    return None


def reached(
    document: Document, measures: Sequence[Measure], values: str = VALUES, derivatives: str = DERIVATIVES
) -> list[tuple[str, ...]]:
    """For each measure and sample count without derivatives: the error, and the count with derivatives for it.

    Between two columns the number is interpolated linearly in logarithms. `values` is the row without derivatives.
    """
    rows: list[tuple[str, ...]] = []
    for name, heading, scale, *_ in measures:
        results = spreads(document, name)
        curve = [
            (int(column), results[derivatives, column]["mean"])
            for column in columns_of(document, derivatives)
            if (derivatives, column) in results
        ]
        for column in columns_of(document, values):
            if (values, column) not in results or not curve:
                continue
            bound = results[values, column]["mean"]
            good = [samples for samples, mean in curve if mean <= bound]
            between = crossing(curve, bound)
            rows.append(
                (
                    f"{heading}, n = {int(column):,}",
                    f"{scale * bound:.3g}",
                    f"{good[0]:,}" if good else "none",
                    f"{100 * good[0] / int(column):.0f} %" if good else NOTHING,
                    NOTHING if between is None else f"{between:,.0f} ({100 * between / int(column):.0f} %)",
                )
            )
    return rows


REACHED_HEAD = ("error and samples without partials", "error", "reached with", "share", "by interpolation")


def saved(document: Document, what: str, measures: Sequence[Measure], compared: Mapping[str, tuple[str, str]]) -> Table:
    """The table of `reached`; `compared` has the rows without and with derivatives for each label."""
    lines: list[tuple[str, ...]] = []
    for called, rows in compared.items():
        lines += reached(document, [(name, called.format(head), scale, n) for name, head, scale, n in measures], *rows)
    return Table("samples", f"{what} with partials that are as good as values alone", REACHED_HEAD, tuple(lines))


def measured(
    document: Document,
    name: str,
    title: str,
    measures: Sequence[Measure],
    rows: Sequence[str],
    notes: tuple[str, ...],
    *,
    first: str = "samples",
    more: Sequence[tuple[str, ...]] = (),
) -> Table:
    """The table of `by_measure`, with further lines."""
    head = (first, *(heading for _, heading, *_ in measures))
    return Table(name, title, head, (*by_measure(document, measures, rows), *more), notes)


def made(document: Document, where: str = "CPU, one thread") -> str:
    """Where a document was measured, as a sentence."""
    versions = document["environment"]
    return f"{where}, torch {versions['torch']}, jacmatch {versions['jacmatch']}."


def by_measure(
    document: Document, measures: Sequence[Measure], rows: Sequence[str] = (*METHODS, ADAM)
) -> list[tuple[str, ...]]:
    """A line for each number of samples and row: mean ± standard deviation of each (name, heading, factor, digits)."""
    results = {name: spreads(document, name) for name, *_ in measures}
    return [
        (
            f"n = {int(column):,}: {row}",
            *(entry(results[name].get((row, column)), scale, digits) for name, _, scale, digits in measures),
        )
        for column in sorted(names(document, "column"), key=int)
        for row in rows
        if column in columns_of(document, row)
    ]


def curves(document: Document, measure: str, scale: float | int, rows: Sequence[str] = METHODS) -> list[Line]:
    """A line for each row over the numbers of samples, above 0, for a logarithmic axis."""
    lines = []
    results = spreads(document, measure)
    for row in rows:
        points = [(int(column), results.get((row, column))) for column in columns_of(document, row)]
        have = [(samples, value) for samples, value in points if value is not None and value["mean"] > 0]
        if have:
            means = [scale * value["mean"] for _, value in have]
            stds = [scale * (value["std"] or 0.0) for _, value in have]
            lines.append(Line(row, [float(samples) for samples, _ in have], means, stds))
    return lines
