"""Surrogates over numbers of samples: the methods that the systems share, and how many samples an error takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from jacmatch.recipes.reproduce.pricing import crossing
from jacmatch.report import Document
from jacmatch.report.experiments import NOTHING, entry, names, spreads
from jacmatch.report.lines import Line

VALUES, LONGER, SLOPES = "values", "values, 4 × steps", "values + slopes"
METHODS: dict[str, Mapping[str, Any]] = {
    VALUES: {"slopes": "none", "longer": 1},
    LONGER: {"slopes": "none", "longer": 4},
    SLOPES: {"slopes": "rows", "longer": 1},
}
"""A step with two sampled rows of the Jacobian costs about three to four without; the rival is the better of the two
lengths of training."""

Measure = tuple[str, str, float | int]
"""Name of a measure, its heading, and the factor of its numbers."""


def columns_of(document: Document, row: str) -> list[str]:
    """The numbers of samples that a row has, from few to many."""
    return sorted({cell["column"] for cell in document["cells"] if cell["row"] == row}, key=int)


def reached(document: Document, measures: Sequence[Measure]) -> list[tuple[str, ...]]:
    """For each measure and number of samples without slopes: the error, and the samples with slopes that reach it.

    The error without slopes is the smaller of the means of `VALUES` and `LONGER`. Between two columns the number is
    that of a straight line through logarithms.
    """
    rows: list[tuple[str, ...]] = []
    for name, heading, scale in measures:
        found = spreads(document, name)
        curve = [
            (int(column), found[SLOPES, column]["mean"])
            for column in columns_of(document, SLOPES)
            if (SLOPES, column) in found
        ]
        for column in columns_of(document, VALUES):
            rivals = [found[row, column]["mean"] for row in (VALUES, LONGER) if (row, column) in found]
            if not rivals or not curve:
                continue
            bound = min(rivals)
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


REACHED_HEAD = ("error and samples without slopes", "error", "reached with", "share", "between columns")


def by_measure(
    document: Document, measures: Sequence[tuple[str, str, float | int, int]], rows: Sequence[str] = tuple(METHODS)
) -> list[tuple[str, ...]]:
    """A line for each number of samples and row: mean ± standard deviation of each (name, heading, factor, digits)."""
    found = {name: spreads(document, name) for name, *_ in measures}
    return [
        (
            f"n = {int(column):,}: {row}",
            *(entry(found[name].get((row, column)), scale, digits) for name, _, scale, digits in measures),
        )
        for column in sorted(names(document, "column"), key=int)
        for row in rows
        if column in columns_of(document, row)
    ]


def curves(document: Document, measure: str, scale: float | int, rows: Sequence[str] = tuple(METHODS)) -> list[Line]:
    """A line for each row over the numbers of samples, above 0, for a logarithmic axis."""
    lines = []
    found = spreads(document, measure)
    for row in rows:
        points = [(int(column), found.get((row, column))) for column in columns_of(document, row)]
        have = [(samples, value) for samples, value in points if value is not None and value["mean"] > 0]
        if have:
            means = [scale * value["mean"] for _, value in have]
            stds = [scale * (value["std"] or 0.0) for _, value in have]
            lines.append(Line(row, [float(samples) for samples, _ in have], means, stds))
    return lines
