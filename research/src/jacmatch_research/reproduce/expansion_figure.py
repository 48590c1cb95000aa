"""Small multiples of expansion errors against σ, with the orders as guides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacmatch.report.figures import svg

COLOURS = ("#ad5200", "#0067ad", "#00815e", "#a8447d", "#4d5663")
MARKERS = ("o", "s", "^", "D", "v")
_LEFT, _RIGHT, _LOW, _HIGH = 1e-6, 2.5, 5e-12, 6.0
_GUIDES = {1: "σ", 2: "σ² (the term)", 3: "σ³", 4: "σ⁴"}
_SPACE = 0.72  # decades between two labels


@dataclass(frozen=True)
class Expansion:
    """A panel with the titles of its row and column, and the points (σ, error) of each label in descending order of σ.

    A label without an expansion error has no points.
    """

    row: str
    column: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def expansion_figure(panels: Sequence[Expansion]) -> bytes:
    """An SVG file with a panel for each row and column of titles; each line has its name at its left end."""
    rows = list(dict.fromkeys(panel.row for panel in panels))
    columns = list(dict.fromkeys(panel.column for panel in panels))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(columns) + 0.4, 3.2 * len(rows) + 0.4), layout="constrained")
    grid: Any = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for panel in panels:
        axes = grid[rows.index(panel.row)][columns.index(panel.column)]
        _draw(axes, panel)
        if panel.row == rows[0]:
            axes.set_title(panel.column, fontsize=10.5)
        if panel.row == rows[-1]:
            axes.set_xlabel("σ of the noise")
        if panel.column == columns[0]:
            axes.set_ylabel(f"{panel.row}\n|remainder| ÷ coefficient of σ²", fontsize=9.5)
    return svg(figure)


def _draw(axes: Any, panel: Expansion) -> None:
    axes.set(xscale="log", yscale="log", xlim=(_LEFT, _RIGHT), ylim=(_LOW, _HIGH))
    axes.set_xticks([0.01, 0.1], ["0.01", "0.1"])
    axes.minorticks_off()
    axes.tick_params(labelsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for order in (1, 2, 3, 4):
        ends = (0.0055, 0.115)
        term = order == 2
        color, width = ("#5b626c", 1.6) if term else ("#c4c9cf", 1.0)
        axes.plot(ends, [end**order for end in ends], color=color, linewidth=width, linestyle=(0, (4, 2)), zorder=0)
        axes.text(0.122, 0.115**order, _GUIDES[order], fontsize=8, color="#5b626c", va="center")
    ends_of = {}
    for index, (name, points) in enumerate(panel.lines.items()):
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=COLOURS[index], marker=MARKERS[index], markersize=3.5, linewidth=1.5)
            ends_of[name] = (index, points[-1])
    _label(axes, ends_of)
    exact = [name for name, points in panel.lines.items() if not points]
    if exact:
        text = "\n".join(["exact:", *exact])
        axes.text(0.03, 0.97, text, fontsize=8, color="#1b1e23", transform=axes.transAxes, va="top", linespacing=1.3)


def _label(axes: Any, ends: Mapping[str, tuple[int, tuple[float, float]]]) -> None:
    """Names at the left ends of their lines, moved apart so that none covers another."""
    highest = float("inf")
    for name, (index, (x, y)) in sorted(ends.items(), key=lambda item: -item[1][1][1]):
        height = min(y, highest / 10**_SPACE)
        axes.annotate(
            name,
            (x, y),
            (0.0042, height),
            fontsize=8,
            color=COLOURS[index],
            ha="right",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS[index],
                "linewidth": 0.6,
                "shrinkB": 3,
                "relpos": (1.0, 0.5),
            },
        )
        highest = height
