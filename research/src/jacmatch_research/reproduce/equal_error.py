"""Surrogates over numbers of samples: the methods that the systems share, and how many samples an error takes."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.report.figures import Line
from jacmatch.report.tables import NOTHING, entry
from jacmatch.surrogates.modules import deviation, fit_surrogate
from jacmatch_research.tables import Document, names, spreads

VALUES, DERIVATIVES = "values", "values + partials"
METHODS = {VALUES: "none", DERIVATIVES: "rows"}
"""Rows, and the `slopes` of `fit_surrogate`."""

Measure = tuple[str, str, float | int]
"""Name of a measure, its heading, and the factor of its numbers."""


Points = tuple[Float[Tensor, "sample input"], Float[Tensor, "sample out"]]
"""Inputs and values."""


def best_of_lengths(
    points: Points,
    jacobian: Float[Tensor, "sample out input"],
    validation: Points,
    settings: Mapping[str, Any],
    seed: int,
    device: str = "cpu",
) -> tuple[nn.Module, dict[str, float]]:
    """Train a network for each of the `lengths`; return the one with the smallest error at the validation points.

    Args:
        points: To learn from.
        jacobian: Derivatives at these points.
        validation: Points that choose the length, the same for both methods.
        settings: Those of a cell: `lengths`, and what `fit_surrogate` takes.
        seed: Of weights, batches and rows.
        device: Where to train.

    Returns:
        The network, and measures: its steps, its error at the held points in units of the values' standard deviation,
        and the seconds of all lengths.
    """
    results: list[tuple[float, int, nn.Module]] = []
    start = time.perf_counter()
    for steps in settings["lengths"]:
        network = fit_surrogate(
            *points,
            jacobian=jacobian,
            partials=settings["slopes"],
            probes=settings["probes"],
            weight=settings["weight"],
            hidden=tuple(settings["hidden"]),
            activation=settings["activation"],
            steps=steps,
            batch_size=settings["batch_size"],
            lr=settings["lr"],
            seed=seed,
            device=device,
        ).cpu()
        with torch.no_grad():
            wrong = (network(validation[0]) - validation[1]) / deviation(validation[1])
        results.append((float(wrong.square().mean().sqrt()), steps, network))
    seconds = time.perf_counter() - start
    error, steps, network = min(results, key=lambda each: each[0])
    return network, {"steps": float(steps), "held_error": error, "train_seconds": seconds}


def columns_of(document: Document, row: str) -> list[str]:
    """The numbers of samples that a row has, from few to many."""
    return sorted({cell["column"] for cell in document["cells"] if cell["row"] == row}, key=int)


def crossing(curve: list[tuple[int, float]], bound: float) -> float | None:
    """Where a falling curve crosses a bound, on straight lines through logarithms; None if it is never above or below.

    Example:
        >>> round(crossing([(100, 0.1), (10_000, 0.01)], 0.05))
        400
    """
    for (fewer, high), (more, low) in itertools.pairwise(curve):
        if high > bound >= low:
            share = math.log(high / bound) / math.log(high / low)
            return float(fewer * (more / fewer) ** share)
    return None


def reached(document: Document, measures: Sequence[Measure]) -> list[tuple[str, ...]]:
    """For each measure and sample count without derivatives: the error, and the samples with derivatives that reach it.

    Between two columns the number is that of a straight line through logarithms.
    """
    rows: list[tuple[str, ...]] = []
    for name, heading, scale in measures:
        results = spreads(document, name)
        curve = [
            (int(column), results[DERIVATIVES, column]["mean"])
            for column in columns_of(document, DERIVATIVES)
            if (DERIVATIVES, column) in results
        ]
        for column in columns_of(document, VALUES):
            if (VALUES, column) not in results or not curve:
                continue
            bound = results[VALUES, column]["mean"]
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


REACHED_HEAD = ("error and samples without partials", "error", "reached with", "share", "between columns")


def by_measure(
    document: Document, measures: Sequence[tuple[str, str, float | int, int]], rows: Sequence[str] = tuple(METHODS)
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


def curves(document: Document, measure: str, scale: float | int, rows: Sequence[str] = tuple(METHODS)) -> list[Line]:
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
