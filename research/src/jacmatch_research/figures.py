"""Figures of experiments: lines over the columns of a table, and dots with bars."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jacmatch.report.figures import PALETTE, dashes, plain_numbers, styles, svg

_BANDS, _LINES = 3, 5  # most lines of a panel with bands, and in one panel without direct labels
_PALE = "#c4c9cf"


@dataclass(frozen=True)
class Line:
    """One line of a figure."""

    label: str  # name of the method, as in the legend
    x: Sequence[float]  # abscissae
    mean: Sequence[float]  # mean of each point
    std: Sequence[float | None] | None = None  # standard deviation of each point; None without error bars


def line_figure(
    panels: Sequence[tuple[str, Sequence[Line]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    columns: Sequence[str] = (),
    small: bool = False,
) -> bytes:
    """Return an SVG file with a panel for each title and its lines; bands and bars are ± one standard deviation.

    Up to three lines of a panel have bands, more have error bars. With more than five lines, the names are at the ends
    of the lines. A single panel then becomes one panel per line, with the other lines in gray.
    """
    from matplotlib.figure import Figure

    crowded = max((len(lines) for _, lines in panels), default=0) > _LINES
    multiples = crowded and len(panels) == 1
    shown = [(line.label, panels[0][1]) for line in panels[0][1]] if multiples else list(panels)
    across = max(1, min(len(shown), (2 if small else 3) if multiples else 1 if small or crowded else 2))
    down = -(-max(len(shown), 1) // across)
    size = (2.2 if small else 3.1, 2.2) if multiples else (4.4 if small else 8.4 if crowded else 4.9, 3.7)
    figure = Figure(figsize=(size[0] * across, size[1] * down + 0.5), layout="constrained")
    grid: Any = figure.subplots(down, across, squeeze=False, sharex=multiples, sharey=multiples)
    for index, axes in enumerate(grid.flat):
        if index >= len(shown):
            axes.set_visible(False)
            continue
        title, lines = shown[index]
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        _draw(axes, lines, title if multiples else None)
        axes.set_title(textwrap.fill(title, 30) if multiples else title, fontsize=10 if multiples else 11)
        _scales(axes, log_x, log_y, columns)
        if log_x and len(abscissae := {x for line in lines for x in line.x}) == 1:
            # error bars at a single abscissa leave limits that rounding cannot tell apart
            axes.set_xlim(0.5 * min(abscissae), 2 * max(abscissae))
        if index + across >= len(shown):
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)
        if index % across == 0:
            axes.set_ylabel(y_label)
        if crowded and not multiples:
            _name_ends(axes, lines)
    if multiples and panels[0][0]:
        figure.suptitle(panels[0][0], fontsize=11)
    if not crowded and panels:
        handles, labels = grid[0][0].get_legend_handles_labels()
        ncols = 1 if small else 2 if across < 2 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, fontsize=9, frameon=False)
    return svg(figure)


def _draw(axes: Any, lines: Sequence[Line], only: str | None) -> None:
    """Draw lines in their colors and dashes; with `only`, the line of that label, and the others in gray."""
    for style, line in zip(styles([line.label for line in lines]), lines, strict=True):
        if only is not None and line.label != only:
            axes.plot(line.x, line.mean, color=_PALE, linewidth=0.9, zorder=1)
            continue
        color = PALETTE[style.color][0]
        drawn = {"color": color, "linestyle": dashes(style), "linewidth": 1.8, "marker": "o", "ms": 3.5}
        deviations = None if line.std is None else [std or 0.0 for std in line.std]
        if deviations is None or (only is None and len(lines) <= _BANDS):
            axes.plot(line.x, line.mean, label=line.label, **drawn)
        if deviations is not None and only is None and len(lines) <= _BANDS:
            low, high = (np.add(line.mean, np.multiply(sign, deviations)) for sign in (-1, 1))
            axes.fill_between(line.x, low, high, color=color, alpha=0.12, linewidth=0)
        elif deviations is not None:
            axes.errorbar(line.x, line.mean, deviations, label=line.label, elinewidth=1, capsize=2, **drawn)
    axes.grid(alpha=0.25, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _scales(axes: Any, log_x: bool, log_y: bool, columns: Sequence[str]) -> None:
    """Label a logarithmic axis with plain numbers, and an axis of columns with their names."""
    for axis in [axes.xaxis] * log_x + [axes.yaxis] * log_y:
        plain_numbers(axis)
    if columns:
        axes.set_xticks(range(len(columns)), columns)
        axes.minorticks_off()


def _name_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Write the name of each line beside its right end, with a gap between the names."""
    axes.get_ylim()  # computes the limits, which the transform needs
    to_share = axes.transData + axes.transAxes.inverted()  # from data to shares of the panel
    ends = []
    for style, line in zip(styles([line.label for line in lines]), lines, strict=True):
        ends.append((float(to_share.transform((line.x[-1], line.mean[-1]))[1]), line, PALETTE[style.color][0]))
    ends.sort(key=lambda end: end[0])
    gap, heights = 0.075, list[float]()
    for height, _, _ in ends:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    over = max(0.0, heights[-1] - 1.0)
    for height, (_, line, color) in zip(heights, ends, strict=True):
        axes.annotate(
            line.label,
            (line.x[-1], line.mean[-1]),
            (1.04, height - over),
            textcoords="axes fraction",
            fontsize=9,
            color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 3, "relpos": (0.0, 0.5)},
        )


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

    figure = Figure(figsize=(8.0, 1.4 + 0.27 * len(rows)), layout="constrained")
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
    figure.suptitle(title, fontsize=11)  # not of the axes, which are narrow beside long labels
    axes.grid(axis="x", alpha=0.25, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return svg(figure)
