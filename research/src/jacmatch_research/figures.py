"""Figures of experiments: lines over the columns of a table, and dots with bars."""

from collections.abc import Mapping, Sequence
from typing import Any

from jacmatch.report.figures import PALETTE, Line, svg


def by_columns(
    results: Mapping[tuple[str, str], Mapping[str, Any]], rows: Sequence[str], columns: Sequence[str]
) -> list[Line]:
    """A line for each row over the columns 0, 1, 2, …, in percent; columns that a row does not have are left out."""
    lines = []
    for row in rows:
        have = [(position, results[row, column]) for position, column in enumerate(columns) if (row, column) in results]
        means = [100 * value["mean"] for _, value in have]
        stds = [100 * (value["std"] or 0.0) for _, value in have]
        lines.append(Line(row, [float(position) for position, _ in have], means, stds))
    return lines


def dot_figure(rows: Sequence[tuple[str, float, float | None]], *, title: str, x_label: str) -> bytes:
    """An SVG file with a dot for each row, the first on top, and a bar of one standard deviation to either side.

    Rows are label, mean and standard deviation.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.4 + 0.27 * len(rows)), layout="constrained")
    axes: Any = figure.subplots()
    positions = list(range(len(rows), 0, -1))
    means = [mean for _, mean, _ in rows]
    axes.errorbar(
        means,
        positions,
        xerr=[std or 0.0 for _, _, std in rows],
        fmt="o",
        color=PALETTE["blue"][0],
        ecolor=PALETTE["grey"][0],
        capsize=2,
    )
    axes.set_yticks(positions, [label for label, _, _ in rows], fontsize=9)
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", alpha=0.25, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return svg(figure)
