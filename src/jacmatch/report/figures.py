"""The style of reports, one color for each method, and figures as SVG and PNG: curves, Jacobians, figures in files.

Every figure shows means over seeds.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PALETTE = {
    "grey": ("#4d5663", "#aab3c0"),
    "orange": ("#ad5200", "#f0a04b"),
    "blue": ("#0067ad", "#62b4f5"),
    "green": ("#00815e", "#35c79a"),
    "purple": ("#a8447d", "#e59ac6"),
    "olive": ("#7a6a00", "#d6c451"),
}
"""Colors after Okabe and Ito, which color-blind readers distinguish: on a light and on a dark background. Each has a
contrast of at least 4.5 to its background."""
METHODS = {
    "grey": ("labels", "labels only", "cross-entropy", "first guess", "student: not taught", "λ = 0", "penalty λ = 0"),
    "orange": (
        *("outputs", "labels + outputs", "lwf", "LwF: labels + outputs", "plain KL"),
        *("values", "values alone", "student: values", "energies"),
    ),
    "blue": (
        *("jacobians", "labels + outputs + Jacobians", "lwf+jacobians", "LwF + Jacobians", "default"),
        *(
            "slopes",
            "values + slopes",
            "values + derivatives",
            "values + partials",
            "values + Jacobians",
            "student: values + slopes",
        ),
    ),
    "green": ("lwf+attention", "LwF + attention"),
    "purple": ("lwf+attention+jacobians", "LwF + attention + Jacobians"),
    "olive": ("oracle", "teacher fine-tuned (oracle)"),
}
"""The color of each method, in every report and figure: gray learns from labels alone, orange from the teacher's
outputs or values too, blue from its derivatives too. A variant after a comma (`values, 4 × steps`) has the same color
and another dash. Other names get the unused colors."""
DASHES = ("2 2", "7 3", "", "9 3 2 3", "4 2", "12 3", "6 2 2 2 2 2", "1 3", "14 2 2 2", "3 5")
"""The first six belong to the colors, in their order: neither color nor dash alone distinguishes two methods."""


@dataclass(frozen=True)
class Style:
    """How a line of a method is drawn."""

    color: str  # A name of `PALETTE`
    dash: str  # lengths of strokes and gaps as in SVG, empty for a solid line


def styles(names: Sequence[str]) -> list[Style]:
    """Return the styles of methods that are shown together."""
    known = {name: color for color, methods in METHODS.items() for name in methods}
    colors = [known.get(name) or known.get(name.partition(", ")[0]) for name in names]
    free = [color for color in PALETTE if color not in colors] or list(PALETTE)
    unknown = 0
    dashes: list[str] = []
    chosen = []
    for color in colors:
        if color is None:
            color, unknown = free[unknown % len(free)], unknown + 1
        dash = DASHES[list(PALETTE).index(color)]
        if dash in dashes:
            dash = next((other for other in reversed(DASHES) if other not in dashes), dash)
        dashes.append(dash)
        chosen.append(Style(color, dash))
    return chosen


_TEXT = "#010101"  # stands for the text color of the page until the picture is in it
_STANDS_FOR = {f"#0102{number:02x}": name for number, name in enumerate(PALETTE)}
_POINTS = 300  # most points drawn of one curve
_PIXELS = 96  # largest side of an image in pixels


def curves(series: Mapping[str, Sequence[Sequence[dict[str, Any]]]], measure: str, *, width: float = 10.0) -> str:
    """Return validation curves as SVG: the mean over seeds of each method, and a band from minimum to maximum.

    Colors are those of the page: `currentColor` and the variables of `style.PALETTE`. Method names are not drawn.
    """
    from matplotlib.figure import Figure  # takes half a second, so not before something is drawn
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, 4.0), layout="constrained")
    axes = figure.add_subplot()
    scale = 100 if measure == "accuracy" else 1
    names = {name: color for color, name in _STANDS_FOR.items()}
    for style, seeds in zip(styles(list(series)), series.values(), strict=True):
        steps, values = _by_step(seeds, f"validation_{measure}")
        if not len(steps):
            continue
        color = names[style.color]
        marker = "o" if len(steps) == 1 else None  # a line of one point is not visible
        axes.plot(steps, scale * values.mean(0), color=color, linestyle=dashes(style), linewidth=2, marker=marker)
        axes.fill_between(steps, scale * values.min(0), scale * values.max(0), color=color, alpha=0.13, linewidth=0)
    axes.set_xlabel("optimizer step", color=_TEXT)
    axes.set_ylabel("validation accuracy %" if measure == "accuracy" else "validation RMSE", color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(4, int(width) - 2), integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(color=_TEXT, labelcolor=_TEXT, length=0)
    axes.grid(color=_TEXT, alpha=0.15, linewidth=0.8)
    for side in axes.spines.values():
        side.set_visible(False)
    return _inline(figure)


def dashes(style: Style) -> Any:
    """Return the dash of a style as matplotlib takes it."""
    return (0, tuple(float(part) / 2 for part in style.dash.split())) if style.dash else "solid"


def _by_step(seeds: Sequence[Sequence[dict[str, Any]]], key: str) -> tuple[Any, Any]:
    """The steps at which every seed has a value, at most `_POINTS` of them, and the values (seed, step)."""
    points = [{row["step"]: row[key] for row in rows if row.get(key) is not None} for rows in seeds]
    steps = sorted(set.intersection(*(set(point) for point in points))) if points else []
    seen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int))
    steps = [steps[index] for index in seen]
    return np.array(steps), np.array([[point[step] for step in steps] for point in points])


def _inline(figure: Any) -> str:
    """The figure as SVG within a page, in the font and the colors of the page."""
    from matplotlib import rc_context

    text = io.StringIO()
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
    for color, name in _STANDS_FOR.items():
        picture = picture.replace(color, f"var(--{name})")
    return picture.replace(_TEXT, "currentColor")


def picture_row(images: Any, captions: Sequence[str]) -> bytes:
    """Return a PNG of images (N, 1 or 3, H, W) with values in [0, 1] in rows of five, each below its caption."""
    from matplotlib.figure import Figure

    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2 * columns, 2.4 * rows), layout="constrained")
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        shown = np.clip(np.moveaxis(np.asarray(pixels), 0, -1), 0, 1)
        axes.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
        axes.set_title(caption, fontsize=8)
        axes.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()


def image(pixels: Any) -> str:
    """Return an image (1 or 3, H, W) with values in [0, 1] as a `data:` address of a PNG."""
    grid = np.clip(np.moveaxis(np.asarray(pixels, dtype=np.float64), 0, -1), 0, 1)
    return _png(np.repeat(grid, 3, axis=2) if grid.shape[2] == 1 else grid[..., :3])


def signed(jacobian: Any) -> str:
    """Return a row of a Jacobian (C, H, W), summed over channels, as a `data:` address of a PNG.

    Zero is white. The largest magnitude is full red if positive, full blue if negative.
    """
    from matplotlib import colormaps

    flat = np.asarray(jacobian, dtype=np.float64).sum(0)
    largest = float(np.abs(flat).max()) or 1.0
    return _png(colormaps["RdBu_r"](0.5 + 0.5 * flat / largest)[..., :3])


def _png(colors: Any) -> str:
    from matplotlib.image import imsave

    every = -(-max(colors.shape[:2]) // _PIXELS)
    file = io.BytesIO()
    pixels = np.ascontiguousarray((255 * colors[::every, ::every]).round().astype(np.uint8))
    no_version: dict[str, Any] = {"Software": None}  # so that equal pixels give equal bytes
    imsave(file, pixels, format="png", metadata=no_version)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: 200, not 2·10²."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(Plain(minor_thresholds=(1.0, 0.4)))


def svg(figure: Any) -> bytes:
    """Return a figure as the bytes of an SVG file; the same figure gives the same bytes."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "jacmatch", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()
