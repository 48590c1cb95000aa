"""Options learned from single paths: values alone against values and slopes, at equal numbers of paths."""

import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

from jacmatch.jacobian import jacobian
from jacmatch.recipes.reproduce.experiment import Cell, Experiment, Measures
from jacmatch.recipes.reproduce.request import Request
from jacmatch.recipes.surrogate.fitting import fit_surrogate
from jacmatch.recipes.systems.pricing import OPTIONS
from jacmatch.report import Document, Table
from jacmatch.report.experiments import NOTHING, Spread, grid, names, seeds_of, spreads
from jacmatch.report.lines import Line, line_figure

VALUES, LONGER, LONGEST, SLOPES = "values", "values, 4 × steps", "values, 16 × steps", "values + slopes"
SLOPES_LONGER = "values + slopes, 4 × steps"
RIVALS, TRIED = (VALUES, LONGER, LONGEST), (SLOPES, SLOPES_LONGER)
METHODS: dict[str, Mapping[str, Any]] = {
    VALUES: {"slopes": "none", "longer": 1},
    LONGER: {"slopes": "none", "longer": 4},
    LONGEST: {"slopes": "none", "longer": 16},
    SLOPES: {"slopes": "jacobian", "longer": 1},
    SLOPES_LONGER: {"slopes": "jacobian", "longer": 4},
}
"""Three lengths of training without slopes, the longest at the most paths only, and two with them; the best counts."""

PATHS = {"smoke": (512,), "cpu": (1024, 4096, 12_288, 16_384, 65_536)}
"""12,288 paths are less than a fifth of 65,536."""
_SHARED = {"hidden": (20, 20, 20, 20), "activation": "softplus", "batch_size": 1024, "lr": 0.02, "weight": 20.0}
_STEPS = {"smoke": 10, "cpu": 400}
_TEST, _TEST_SEED = 2000, 2**20
_OF_PATHS = 10_000  # seeds of paths are those of their states and this


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    seeds = request.seeds or (1 if request.smoke else 5)
    return [
        Cell(
            f"{option}: {method}",
            str(paths),
            seed,
            {
                **_SHARED,
                "option": option,
                "paths": paths,
                "slopes": how["slopes"],
                "steps": how["longer"] * _STEPS[size],
            },
        )
        for option in OPTIONS
        for paths in PATHS[size]
        for method, how in METHODS.items()
        for seed in range(request.seed, request.seed + seeds)
        if method != LONGEST or paths == PATHS[size][-1]
    ]


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """RMSE of price and deltas at fresh states, and the seconds of the training."""
    asked = cell.settings
    option = OPTIONS[asked["option"]]
    x = option.states(asked["paths"], cell.seed)
    y, slopes = option.paths(x, cell.seed + _OF_PATHS)
    x, y, slopes = x.float(), y.float(), slopes.float()
    each = (slopes * x.std(0) / y.std(0)).square().sum((1, 2)).mean()
    start = time.perf_counter()
    student = fit_surrogate(
        x,
        y,
        jacobian=slopes,
        slopes=asked["slopes"],
        weight=asked["weight"] / float(each),
        hidden=tuple(asked["hidden"]),
        activation=asked["activation"],
        steps=asked["steps"],
        batch_size=asked["batch_size"],
        lr=asked["lr"],
        seed=cell.seed,
        device=request.device,
    )
    seconds = time.perf_counter() - start
    points = option.states(_TEST, _TEST_SEED)
    price, deltas = option.exact(points)
    said, slopes_said = jacobian(student.cpu(), points.float())
    error, slope_error = said.detach().double() - price, slopes_said.detach().double() - deltas
    return {
        "price_rmse": float(error.square().mean().sqrt()),
        "delta_rmse": float(slope_error.square().mean().sqrt()),
        "price_worst": float(error.abs().max()),
        "price_std": float(price.std()),
        "delta_std": float(deltas.std(0).square().mean().sqrt()),
        "train_seconds": seconds,
    }


def _tables(document: Document) -> list[Table]:
    columns = names(document, "column")
    stds = {name: spreads(document, f"{name}_std") for name in ("price", "delta")}
    of_option = {option: f"{option}: {SLOPES}" for option in OPTIONS}
    scales = "; ".join(
        f"{option} {1e4 * stds['price'][row, columns[0]]['mean']:.0f} and "
        f"{100 * stds['delta'][row, columns[0]]['mean']:.1f}"
        for option, row in of_option.items()
        if (row, columns[0]) in stds["price"]
    )
    made = document["environment"]
    notes = (
        f"Errors at {_TEST} fresh states against exact prices, mean ± standard deviation over seeds (of paths, weights "
        f"and batches): {seeds_of(document)}. A spot is 1.",
        f"Standard deviation of the exact prices (10⁻⁴) and of the deltas (10⁻²): {scales}.",
        f"CPU, one thread, torch {made['torch']}, jacmatch {made['jacmatch']}.",
    )
    head = ("paths", *(f"{int(column):,}" for column in columns))
    return [
        Table("price", "RMSE of the price, 10⁻⁴", head, tuple(grid(document, "price_rmse", scale=1e4)), notes),
        Table("delta", "RMSE of the deltas, 10⁻²", head, tuple(grid(document, "delta_rmse", digits=2)), notes[:1]),
        Table(
            "paths",
            "Paths with slopes that reach the error of values alone at the largest number of paths",
            ("option and error", "values alone, best", "reached with", "share", "between columns"),
            tuple(_reached(document, option, error) for option in OPTIONS for error in ("price", "delta")),
            (
                "On both sides the best of the lengths of training by this error. Between columns: by a straight "
                "line through the logarithms.",
            ),
        ),
        Table(
            "seconds",
            "Seconds of training",
            head,
            tuple(grid(document, "train_seconds", scale=1, digits=1)),
            ("One thread, beside other work on the machine: the ratios say more than the numbers.",),
        ),
    ]


def _reached(document: Document, option: str, error: str) -> tuple[str, ...]:
    """The smallest number of paths whose mean error with slopes is not above that of values alone at the largest."""
    found = spreads(document, f"{error}_rmse")
    columns = sorted(names(document, "column"), key=int)

    def best(methods: tuple[str, ...], column: str) -> float | None:
        means = [
            found[row, column]["mean"] for row in (f"{option}: {each}" for each in methods) if (row, column) in found
        ]
        return min(means, default=None)

    label, scale = f"{option}: {error}", {"price": 1e4, "delta": 100.0}[error]
    bound = best(RIVALS, columns[-1])
    known = [(int(column), mean) for column in columns if (mean := best(TRIED, column)) is not None]
    if bound is None or not known:
        return (label, *[NOTHING] * 4)
    good = [paths for paths, mean in known if mean <= bound]
    where = crossing(known, bound)
    between = NOTHING if where is None else f"{where:,.0f} ({100 * where / int(columns[-1]):.1f} %)"
    first = (f"{good[0]:,}", f"{100 * good[0] / int(columns[-1]):.1f} %") if good else ("none", NOTHING)
    return label, f"{scale * bound:.2f}", *first, between


def crossing(curve: list[tuple[int, float]], bound: float) -> float | None:
    """Where a falling curve crosses a bound, on straight lines through logarithms; None if it is never above or below.

    Example:
        >>> round(crossing([(100, 0.1), (10_000, 0.01)], 0.05))
        400
    """
    for (fewer, high), (more, low) in itertools.pairwise(curve):
        if high > bound >= low:
            share = math.log(high / bound) / math.log(high / low)
            return float(fewer * (more / fewer) ** share)
    return None


def _figure(document: Document) -> bytes:
    """Errors over the number of paths: a panel for each option and error."""
    panels = []
    for option in OPTIONS:
        for error, scale, unit in (("price", 1e4, "10⁻⁴"), ("delta", 100.0, "10⁻²")):
            found = spreads(document, f"{error}_rmse")
            lines = [_line(found, f"{option}: {method}", method, scale) for method in METHODS]
            panels.append((f"{option}\n{error}, {unit}", [line for line in lines if line.x]))
    return line_figure(panels, x_label="paths", y_label="RMSE", log_x=True, log_y=True)


def _line(found: Mapping[tuple[str, str], Spread], row: str, label: str, scale: float) -> Line:
    have = sorted((int(column), value) for (name, column), value in found.items() if name == row)
    means = [scale * value["mean"] for _, value in have]
    return Line(label, [float(paths) for paths, _ in have], means, [scale * (v["std"] or 0.0) for _, v in have])


PRICING = Experiment(
    about="options from noisy paths and their pathwise slopes: errors of price and delta against exact ones",
    cells=_cells,
    measure=_measure,
    tables=_tables,
    figure=_figure,
    takes=frozenset(),
)
