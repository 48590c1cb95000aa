"""The tables and the figure of a surrogate's result."""

from collections.abc import Mapping
from typing import Any

from jacmatch.report import Table
from jacmatch.report.figures import Line, line_figure
from jacmatch.report.tables import NOTHING, speed

NAMES = {"values": "values", "slopes": "partials"}
LABELS = {"values": "values", "slopes": "values + partials"}
Result = Mapping[str, Any]


def tables(result: Result) -> list[Table]:
    """Return the errors by number of training points, and the cost of function and student."""
    return [_errors(result), _costs(result)]


def figure(result: Result, *, small: bool = False) -> bytes:
    """Return both errors over the number of training points as an SVG file, wide or for a page of 400 pixels."""
    panels = []
    for measure, title in (("values", "values"), ("slopes", "partials")):
        lines = []
        for method in result["methods"]:
            errors = [(row["samples"], row["errors"][measure]) for row in result["curves"] if row["method"] == method]
            points = [(float(n), error) for n, error in errors if error is not None and error["mean"] > 0]
            if points:
                means, stds = ([error[key] for _, error in points] for key in ("mean", "std"))
                lines.append(Line(LABELS[method], [n for n, _ in points], means, _bands(means, stds)))
        if lines:
            panels.append((f"RMSE of {title} in units", lines))
    return line_figure(panels, x_label="training points", y_label="RMSE in units", log_x=True, log_y=True, small=small)


def _bands(means: list[float], stds: list[float | None]) -> list[float | None]:
    """A band that goes below zero cannot be drawn on a logarithmic axis."""
    return [None if std is None else min(std, 0.9 * mean) for mean, std in zip(means, stds, strict=True)]


def reached(result: Result) -> str | None:
    """Return the number of points with which partials reach the error of values alone with the most points."""
    if set(result["methods"]) != {"values", "slopes"}:
        return None
    means = {(row["method"], row["samples"]): row["errors"]["values"]["mean"] for row in result["curves"]}
    most = max(samples for _, samples in means)
    for samples in sorted({samples for _, samples in means}):
        if means["slopes", samples] <= means["values", most]:
            return f"Values + partials reach the RMSE of values alone at {most} points with {samples}."
    return f"Values + partials nowhere reach the RMSE of values alone at {most} points."


def _errors(result: Result) -> Table:
    head = ["training points"]
    for what in ("values", "slopes"):
        head += [f"{NAMES[what]}, from {LABELS[method]}" for method in result["methods"]]
    sizes = dict.fromkeys(row["samples"] for row in result["curves"])
    errors = {(row["samples"], row["method"]): row["errors"] for row in result["curves"]}
    rows = []
    for size in sizes:
        cells = [
            _plus_minus(errors[size, method][what]) for what in ("values", "slopes") for method in result["methods"]
        ]
        rows.append((str(size), *cells))
    notes = [
        "In units: of each output, and of output over input for partials. "
        f"{result['test_points']} held-out points, {result['seeds']} seed(s), {result['seconds']:.0f} s.",
        *filter(None, [reached(result)]),
        *result["notes"],
    ]
    return Table(
        "errors",
        f"Held-out error of surrogates of {result['settings']['teacher']}",
        tuple(head),
        tuple(rows),
        tuple(notes),
    )


def _costs(result: Result) -> Table:
    costs = result["costs"]
    rows = [
        ("evaluations for training, a seed", f"{costs['training_calls']:,}"),
        ("seconds spent in the function for that", f"{costs['training_seconds']:.3g}"),
        ("evaluations for the held-out points", f"{costs['test_calls']:,}"),
        *([("evaluations for the slices", f"{costs['slice_calls']:,}")] if costs.get("slice_calls") else []),
        ("seconds of a training", f"{costs['fit_seconds']:.3g}"),
    ]
    for name, what in (("batch", "a batch of the held-out points"), ("single", "a single point")):
        timed = costs["speed"].get(name)
        if timed is not None:
            duration = NOTHING if timed["teacher"] is None else f"{1e6 * timed['teacher']:.3g}"
            name, ratio = ("speed-up", NOTHING) if timed["speed_up"] is None else speed(timed["speed_up"])
            rows.append((f"µs a point, {what}: function", duration))
            rows.append((f"µs a point, {what}: student", f"{1e6 * timed['student']:.3g}"))
            rows.append((f"{name}, {what}", ratio))
    exported = result["export"]
    rows.append(("safetensors: largest difference, in units", f"{exported['safetensors']['largest_difference']:.2g}"))
    onnx = exported["onnx"]
    exported_onnx = (
        f"{onnx['largest_difference']:.2g} ({onnx['checked_by']})" if onnx["file"] else f"none: {onnx['why']}"
    )
    rows.append(("ONNX: largest difference, in units", exported_onnx))
    return Table("costs", "What it cost", ("", "measured"), tuple(rows))


def _plus_minus(error: Mapping[str, Any] | None) -> str:
    if error is None:
        return NOTHING
    mean = f"{error['mean']:.3g}"
    return mean if error["std"] is None else f"{mean} ± {error['std']:.2g}"
