"""Figures as SVG files that stand alone: means over seeds, with bands or bars of one standard deviation."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = ("#4d5663", "#ad5200", "#00815e", "#0067ad", "#a8447d", "#7a6a00", "#c0392b", "#2e3a87", "#5f9ea0", "#b8860b")
STYLES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (7, 3)),
    (0, (4, 1, 1, 1)),
    (0, (2, 3)),
)
"""Neither colour nor dash alone tells two lines apart."""


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        label: As in the legend.
        x: Abscissae.
        mean: Of each point.
        std: Of each point, None without a band.
    """

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    std: Sequence[float | None] | None = None


def draw(axes: Any, lines: Sequence[Line]) -> None:
    """Draws lines with their bands into axes, each with colour and dash of its own."""
    for index, line in enumerate(lines):
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
        axes.plot(line.x, line.mean, color=colour, linestyle=style, linewidth=1.8, marker="o", ms=3.5, label=line.label)
        if line.std is not None:
            low = [mean - (std or 0.0) for mean, std in zip(line.mean, line.std, strict=True)]
            high = [mean + (std or 0.0) for mean, std in zip(line.mean, line.std, strict=True)]
            axes.fill_between(line.x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.grid(alpha=0.25, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def line_figure(
    panels: Sequence[tuple[str, Sequence[Line]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    columns: Sequence[str] = (),
) -> bytes:
    """An SVG file with a panel beside the other for each title and its lines, and one legend below.

    Args:
        panels: Title and lines of each.
        x_label: Of every panel.
        y_label: Of the first panel.
        log_x: Whether the abscissa is logarithmic.
        log_y: Whether the ordinate is.
        columns: Labels of the abscissae 0, 1, 2, …; the numbers themselves if left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * max(len(panels), 1) + 1.8, 4.8), layout="constrained")
    grid: Any = figure.subplots(1, max(len(panels), 1), squeeze=False)
    for axes, (title, lines) in zip(grid[0], panels, strict=True):
        draw(axes, lines)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(x_label)
        if log_x:
            axes.set_xscale("log")
            _plain(axes.xaxis)
        if log_y:
            axes.set_yscale("log")
            _plain(axes.yaxis)
        if columns:
            axes.set_xticks(range(len(columns)), columns)
            axes.minorticks_off()
    grid[0][0].set_ylabel(y_label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    across = 2 if len(panels) < 2 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=across, fontsize=9, frameon=False)
    return svg(figure)


def _plain(axis: Any) -> None:
    """Numbers at a logarithmic axis as they are said, 200 and not 2·10²."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.4)))


def svg(figure: Any) -> bytes:
    """A figure as the bytes of an SVG file; the same figure, the same bytes."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "jacmatch", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()
