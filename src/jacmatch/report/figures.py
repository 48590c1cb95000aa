"""Learning curves and the picture sheet, as SVG and PNG for a page that loads nothing."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito: safe for colour blindness


def curves(series: Mapping[str, Sequence[Sequence[dict[str, Any]]]], measure: str) -> str:
    """Validation curves as an SVG picture: a line for each method, mean over seeds, with a band from least to largest.

    Args:
        series: For each method the metrics of its seeds.
        measure: `accuracy` or `rmse`.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for colour, (label, seeds) in zip(COLOURS, series.items(), strict=False):
        key = f"validation_{measure}"
        points = [{row["step"]: row[key] for row in rows if key in row} for rows in seeds]
        steps = sorted(set.intersection(*(set(point) for point in points))) if points else []
        if not steps:
            continue
        values = np.array([[point[step] for step in steps] for point in points])
        axes.plot(steps, values.mean(0), color=colour, label=label, marker="o", markersize=3)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"validation {measure}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "jacmatch"}):  # the same curves, the same bytes
        figure.savefig(text, format="svg", metadata={"Date": None})
    picture = text.getvalue()
    return picture[picture.index("<svg") :]


def sheet(arrays: Mapping[str, Any]) -> str:
    """The picture sheet as a PNG in base64: image, the teacher's Jacobian of its top class, the students' beside it.

    Every Jacobian has its own scale, symmetric about zero: red raises the logit, blue lowers it. The cosine with the
    teacher's stands under each.
    """
    images, teacher, students = arrays["images"], arrays["teacher"], arrays["students"]
    methods, cosines = [str(method) for method in arrays["methods"]], arrays["cosines"]
    rows, columns = len(images), 2 + len(methods)
    figure = Figure(figsize=(1.55 * columns, 1.75 * rows + 0.3), layout="constrained")
    grid = np.array(figure.subplots(rows, columns, squeeze=False))
    for row in range(rows):
        _image(grid[row, 0], images[row])
        grid[row, 0].set_xlabel(f"class {arrays['labels'][row]}", fontsize=8)
        _signed(grid[row, 1], teacher[row])
        for column in range(len(methods)):
            _signed(grid[row, 2 + column], students[column, row])
            grid[row, 2 + column].set_xlabel(f"cos {cosines[column, row]:.2f}", fontsize=8)
    for axes, head in zip(grid[0], ["image", "teacher", *methods], strict=True):
        axes.set_title(head.replace(" + ", "\n+ "), fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _image(axes: Axes, image: Any) -> None:
    picture = np.moveaxis(image, 0, -1)
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else np.clip(picture, 0, 1), cmap="gray")
    axes.set(xticks=[], yticks=[])


def _signed(axes: Axes, jacobian: Any) -> None:
    flat = jacobian.sum(0)
    largest = float(np.abs(flat).max()) or 1.0
    axes.imshow(flat, cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes.set(xticks=[], yticks=[])
