"""Learning curves as SVG and pixels as PNG, for a page that loads nothing. Words stay with the page."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DASHES = ("", "7 3", "2 2", "9 3 2 3", "4 2", "12 3")
"""One for each colour: neither colour nor dash alone tells two methods apart."""
_TEXT, _LINES = "#010101", ("#010201", "#010202", "#010203", "#010204", "#010205", "#010206")  # replaced by the page's
_POINTS = 300  # drawn of one curve
_PIXELS = 96  # on a side of a picture


def curves(series: Mapping[str, Sequence[Sequence[dict[str, Any]]]], measure: str, *, width: float = 10.0) -> str:
    """Validation curves as SVG: a line for each method, mean over seeds, with a band from least to largest.

    Colours are the page's: `currentColor` and the variables `--s1`, `--s2`, … in the order of the methods. Method names
    are not drawn.

    Args:
        series: For each method the metrics of its seeds. Of a step logged twice the later row counts.
        measure: `accuracy` or `rmse`.
        width: In inches; a letter is as large in a narrow picture as in a wide one.
    """
    from matplotlib.figure import Figure  # takes half a second, so not before something is drawn
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, 4.0), layout="constrained")
    axes = figure.add_subplot()
    scale = 100 if measure == "accuracy" else 1
    for index, seeds in enumerate(series.values()):
        steps, values = _by_step(seeds, f"validation_{measure}")
        if not len(steps):
            continue
        colour, dash = _LINES[index % len(_LINES)], DASHES[index % len(DASHES)]
        style: Any = (0, tuple(float(part) / 2 for part in dash.split())) if dash else "solid"
        axes.plot(steps, scale * values.mean(0), color=colour, linestyle=style, linewidth=2)
        axes.fill_between(steps, scale * values.min(0), scale * values.max(0), color=colour, alpha=0.13, linewidth=0)
    axes.set_xlabel("optimiser step", color=_TEXT)
    axes.set_ylabel("validation accuracy %" if measure == "accuracy" else "validation RMSE", color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(4, int(width) - 2), integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(color=_TEXT, labelcolor=_TEXT, length=0)
    axes.grid(color=_TEXT, alpha=0.15, linewidth=0.8)
    for side in axes.spines.values():
        side.set_visible(False)
    return _svg(figure)


def _by_step(seeds: Sequence[Sequence[dict[str, Any]]], key: str) -> tuple[Any, Any]:
    """The steps at which every seed has a value, thinned out to what can be seen, and the values (seed, step)."""
    points = [{row["step"]: row[key] for row in rows if row.get(key) is not None} for rows in seeds]
    steps = sorted(set.intersection(*(set(point) for point in points))) if points else []
    seen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int))
    steps = [steps[index] for index in seen]
    return np.array(steps), np.array([[point[step] for step in steps] for point in points])


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    # The same curves, the same bytes; letters stay letters, in the font of the page.
    with rc_context({"svg.hashsalt": "jacmatch", "svg.fonttype": "none", "font.size": 12}):
        figure.set_facecolor("none")
        for axes in figure.axes:
            axes.set_facecolor("none")
            for label in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
                label.set_fontsize(12)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    picture = text.getvalue()
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", picture, flags=re.DOTALL)
    picture = re.sub(r' (?:width|height)="[\d.]+pt"', "", picture, count=2)
    picture = re.sub(r"font: (?:[a-z\d]+ )*([\d.]+px) [^;\"]*", r"font-size: \1", picture)
    picture = re.sub(r"font-family: [^;\"]*;? ?", "", picture)
    for index, colour in enumerate(_LINES, 1):
        picture = picture.replace(colour, f"var(--s{index})")
    return picture.replace(_TEXT, "currentColor")


def image(pixels: Any) -> str:
    """A picture (1 or 3, H, W) with values in [0, 1] as a `data:` address of a PNG."""
    grid = np.clip(np.moveaxis(np.asarray(pixels, dtype=np.float64), 0, -1), 0, 1)
    return _png(np.repeat(grid, 3, axis=2) if grid.shape[2] == 1 else grid[..., :3])


def signed(jacobian: Any) -> str:
    """A Jacobian row (C, H, W), summed over channels, as a `data:` address of a PNG.

    Zero is white, and the largest magnitude, of either sign, is full red (positive) or full blue (negative).
    """
    from matplotlib import colormaps

    flat = np.asarray(jacobian, dtype=np.float64).sum(0)
    largest = float(np.abs(flat).max()) or 1.0
    return _png(colormaps["RdBu_r"](0.5 + 0.5 * flat / largest)[..., :3])


def _png(colours: Any) -> str:
    from matplotlib.image import imsave

    every = -(-max(colours.shape[:2]) // _PIXELS)
    file = io.BytesIO()
    pixels = np.ascontiguousarray((255 * colours[::every, ::every]).round().astype(np.uint8))
    nothing: dict[str, Any] = {"Software": None}  # the same pixels, the same bytes, whatever the version
    imsave(file, pixels, format="png", metadata=nothing)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
