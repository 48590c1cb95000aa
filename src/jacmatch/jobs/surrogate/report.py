"""The report of a surrogate: errors and costs, predictions, residuals, sensitivities, and slices."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jobs.surrogate.functions import Function
from jacmatch.jobs.surrogate.points import Samples, predictions
from jacmatch.report import Table
from jacmatch.report.figures import PALETTE, dashes, plain_numbers, styles, svg
from jacmatch.report.tables import NOTHING, speed

NAMES = {"values": "values", "slopes": "partials"}
LABELS = {"values": "values", "slopes": "values + partials"}
Result = Mapping[str, Any]
_SLICES, _BARS, _LISTED = 3, 8, 20  # most slices, bars of inputs, outputs in the table
_DENSE, _KNOWN, _TANGENT = 60, 5, 0.06  # points of a curve, known points, half a tangent as a share of the range
_DOTS = 500  # most points drawn
_BLUE, _ORANGE, _GREY = (PALETTE[name][0] for name in ("blue", "orange", "grey"))


class Pictures:
    """Data of the pictures of a network at held-out points.

    `r2` of each output is None where it never varies; `size` is the mean |∂yₖ/∂xᵢ| times the range of xᵢ, and `signs`
    the mean ∂yₖ/∂xᵢ, (K, D). `slices` have the number of the input, the curve, and known points with tangents.
    """

    def __init__(
        self, student: nn.Module, test: Samples, region: Float[Tensor, "corner *input"], function: Function | None
    ) -> None:
        """Evaluate the network, and the function, if there is one, along the slices; its calls are counted."""
        y, j = predictions(student, test.x, jacobians=True)
        assert j is not None
        self.true, self.predicted = test.y, y
        total = (test.y - test.y.mean(0)).square().sum(0)
        order = total.argsort(descending=True) if len(total) > _LISTED else torch.arange(len(total))
        self.listed: list[int] = order[:_LISTED].tolist()  # of a field, the entries that vary most
        k = self.listed[0]
        shares = zip((test.y - y).square().sum(0).tolist(), total.tolist(), strict=True)
        self.r2 = [1 - left / all_ if all_ > 0 else None for left, all_ in shares]
        low, high = region.amin(0).flatten().double(), region.amax(0).flatten().double()
        self.size, self.signs = j.flatten(2).abs().mean(0) * (high - low), j.flatten(2).mean(0)
        self.slices = []
        for number in self.size[k].argsort(descending=True)[:_SLICES].tolist():
            dense, some = (_line(low, high, number, count) for count in (_DENSE, _KNOWN))
            curve, _ = predictions(student, dense.reshape(-1, *test.x.shape[1:]), jacobians=False)
            known = None
            with contextlib.suppress(InputError):  # where the function is not defined
                if function is not None:
                    known = some[:, number], function.values(some)[:, k], function.jacobian(some)[:, k, number]
            self.slices.append((number, dense[:, number], curve[:, k], known))

    def draw(self, *, small: bool = False) -> bytes:
        """Return the pictures of the first listed output as an SVG file, wide or for a page of 400 pixels."""
        from matplotlib.figure import Figure

        count, across = 3 + len(self.slices), 1 if small else 3
        down = -(-count // across)
        figure = Figure(figsize=((4.2 if small else 3.5) * across, 3.0 * down), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12)  # type: ignore[union-attr, call-arg]
        panels: list[Any] = list(figure.subplots(down, across, squeeze=False).flat)
        k = self.listed[0]
        true, predicted = self.true[:_DOTS, k].tolist(), self.predicted[:_DOTS, k].tolist()
        ends = [min(true + predicted), max(true + predicted)]
        dots: dict[str, Any] = {"s": 9, "color": _BLUE, "alpha": 0.6, "linewidth": 0}
        panels[0].plot(ends, ends, color=_GREY, linewidth=1)
        panels[0].scatter(true, predicted, **dots)
        share = self.r2[k]
        r2 = NOTHING if share is None else _share(share)
        panels[0].set(title=f"Output {k}, held out, R² = {r2}", xlabel="true value", ylabel="prediction")
        panels[1].axhline(0, color=_GREY, linewidth=1)
        panels[1].scatter(predicted, [p - t for p, t in zip(predicted, true, strict=True)], **dots)
        panels[1].set(title="Residuals", xlabel="prediction", ylabel="prediction − true value")
        self._bars(panels[2])
        reach = [*ends, *(bound(each[2]).item() for each in self.slices for bound in (torch.min, torch.max))]
        margin = 0.05 * (max(reach) - min(reach)) or 1.0
        for axes, (number, x, y, known) in zip(panels[3:], self.slices, strict=False):
            axes.plot(x.tolist(), y.tolist(), color=_BLUE, linewidth=1.8, label="prediction")
            if known is not None:
                at, values, partials = known
                half = _TANGENT * float(x[-1] - x[0])
                axes.scatter(at.tolist(), values.tolist(), s=18, color=_ORANGE, zorder=3, label="true, with tangent")
                for a, v, p in zip(at.tolist(), values.tolist(), partials.tolist(), strict=True):
                    axes.plot([a - half, a + half], [v - half * p, v + half * p], color=_ORANGE)
                axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")
            axes.set(title=f"Slice along input {number}", xlabel=f"input {number}", ylabel=f"output {k}")
            axes.locator_params(axis="x", nbins=4)
            axes.set_ylim(min(reach) - margin, max(reach) + margin)  # the same, so that slices compare
        for axes in panels:
            axes.title.set_fontsize(11)
            axes.grid(alpha=0.25, linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[count:]:
            axes.set_visible(False)
        return svg(figure)

    def _bars(self, axes: Any) -> None:
        """A bar for each of the inputs with the largest sensitivity, and the sign of its mean derivative."""
        k = self.listed[0]
        order = self.size[k].argsort(descending=True)[:_BARS].tolist()
        bars = axes.barh([str(i) for i in order], self.size[k][order].tolist(), color=_BLUE)
        axes.bar_label(bars, ["+" if self.signs[k, i] > 0 else "−" for i in order], padding=3)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set(title="Sensitivity and sign", xlabel="mean |∂y/∂x| × range of the input", ylabel="input")

    def table(self) -> Table:
        """Return R² and the most sensitive input of each output."""
        rows = []
        for k in self.listed:
            r2 = self.r2[k]
            best = int(self.size[k].argmax())
            rows.append((str(k), NOTHING if r2 is None else _share(r2), str(best), f"{float(self.size[k, best]):.3g}"))
        head = ("output", "R²", "most sensitive input", "mean |∂y/∂x| × its range")
        return Table("outputs", "Each output at the held-out points", head, tuple(rows))


def _line(low: Tensor, high: Tensor, number: int, count: int) -> Float[Tensor, "point input"]:
    """Return points along one input, the others in the middle."""
    x = (0.5 * (low + high)).repeat(count, 1)
    margin = 0.0 if count == _DENSE else 0.1
    x[:, number] = low[number] + (high - low)[number] * torch.linspace(margin, 1 - margin, count, dtype=torch.float64)
    return x


def _share(r2: float) -> str:
    """Return R² with enough digits to distinguish it from 1."""
    return f"{r2:.4f}" if r2 < 0.9999 else f"1 − {1 - r2:.1g}"


def tables(result: Result) -> list[Table]:
    """Return the errors by number of training points, and the cost of function and student."""
    return [_errors(result), _costs(result)]


def figure(result: Result, *, small: bool = False) -> bytes:
    """Return both errors over the number of training points as an SVG file, wide or for a page of 400 pixels.

    Bands are ± one standard deviation, at most 0.9 of the mean: a logarithmic axis has no zero.
    """
    from matplotlib.figure import Figure

    sizes = {row["samples"] for row in result["curves"]}
    known = [name for name in NAMES if any((row["errors"][name] or {"mean": 0})["mean"] for row in result["curves"])]
    shown = known or ["values"]
    down, across = (len(shown), 1) if small else (1, len(shown))
    figure = Figure(figsize=((4.4 if small else 4.9) * across, 3.7 * down + 0.5), layout="constrained")
    panels: Any = figure.subplots(down, across, squeeze=False)
    for axes, measure in zip(panels.flat, shown, strict=True):
        for style, method in zip(styles([LABELS[each] for each in result["methods"]]), result["methods"], strict=True):
            rows = [row for row in result["curves"] if row["method"] == method and row["errors"][measure] is not None]
            points = [(row["samples"], row["errors"][measure]) for row in rows if row["errors"][measure]["mean"] > 0]
            x, means = [size for size, _ in points], [error["mean"] for _, error in points]
            off = [min(error["std"] or 0.0, 0.9 * error["mean"]) for _, error in points]
            drawn: dict[str, Any] = {"color": PALETTE[style.color][0], "linestyle": dashes(style), "linewidth": 1.8}
            axes.plot(x, means, label=LABELS[method], marker="o", ms=3.5, **drawn)
            axes.fill_between(x, np.subtract(means, off), np.add(means, off), color=drawn["color"], alpha=0.12, lw=0)
        axes.set(xscale="log", yscale="log", xlabel="training points", title=f"RMSE of {NAMES[measure]} in units")
        if len(sizes) == 1:
            axes.set_xlim(0.5 * min(sizes), 2 * max(sizes))
        axes.grid(alpha=0.25, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
    panels[0][0].set_ylabel("RMSE in units")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return svg(figure)


def reached(result: Result) -> str | None:
    """Return the number of points with which partials reach the error of values alone with the most points."""
    if set(result["methods"]) != {"values", "slopes"}:
        return None
    means = {(row["method"], row["samples"]): row["errors"]["values"]["mean"] for row in result["curves"]}
    most = max(samples for _, samples in means)
    for samples in sorted({samples for _, samples in means}):
        if means["slopes", samples] <= means["values", most]:
            return f"Values + partials reach the RMSE of values alone at {most} points with {samples}."
    return f"Values + partials never reach the RMSE of values alone at {most} points."


def _errors(result: Result) -> Table:
    head = ["training points"]
    for what in ("values", "slopes"):
        head += [f"{NAMES[what]}, from {LABELS[method]}" for method in result["methods"]]
    sizes = dict.fromkeys(row["samples"] for row in result["curves"])
    errors = {(row["samples"], row["method"]): row["errors"] for row in result["curves"]}
    rows = []
    for size in sizes:
        each = [errors[size, method][what] for what in ("values", "slopes") for method in result["methods"]]
        rows.append((str(size), *map(_plus_minus, each)))
    notes = [
        "In units: of each output, and of output over input for partials. "
        f"{result['test_points']} held-out points, {result['seeds']} seed(s), {result['seconds']:.0f} s.",
        *filter(None, [reached(result)]),
        *result["notes"],
    ]
    title = f"Held-out error of surrogates of {result['settings']['teacher']}"
    return Table("errors", title, tuple(head), tuple(rows), tuple(notes))


def _costs(result: Result) -> Table:
    costs = result["costs"]
    rows = [
        ("evaluations for training, per seed", f"{costs['training_calls']:,}"),
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
            rows.append((f"µs per point,  {what}: function", duration))
            rows.append((f"µs per point,  {what}: student", f"{1e6 * timed['student']:.3g}"))
            rows.append((f"{name}, {what}", ratio))
    exported = result["export"]
    rows.append(("safetensors: largest difference, in units", f"{exported['safetensors']['largest_difference']:.2g}"))
    onnx = exported["onnx"]
    shown = f"{onnx['largest_difference']:.2g} ({onnx['checked_by']})" if onnx["file"] else f"none: {onnx['why']}"
    rows.append(("ONNX: largest difference, in units", shown))
    return Table("costs", "Cost", ("", "measured"), tuple(rows))


def _plus_minus(error: Mapping[str, Any] | None) -> str:
    if error is None:
        return NOTHING
    mean = f"{error['mean']:.3g}"
    return mean if error["std"] is None else f"{mean} ± {error['std']:.2g}"
