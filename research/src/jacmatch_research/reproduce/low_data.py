"""The best student from little data at equal cost: Jacobian-free recipes and recipes with derivatives, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, entry
from jacmatch_research.figures import dot_figure
from jacmatch_research.reproduce import students
from jacmatch_research.reproduce.experiment import Cell, Request
from jacmatch_research.tables import Document, fidelity, grid, names, origin, paired, spreads

Settings = Mapping[str, Any]
_DATA: Settings = {"point": "data"}
_MIXED: Settings = {"point": "mixed-pairs"}
_SQUARED: Settings = {"output_loss": "squared"}
_KL: Settings = {"output_loss": "kl", "temperature": 4.0}
_BEST: Settings = {
    "method": "jacobians",
    "probe": "random-outputs",
    "jacobian_share": 0.3,
    "jacobian_schedule": "constant",
    **_MIXED,
    **_KL,
}

FREE: dict[str, Settings] = {
    "labels": {"method": "labels", **_DATA},
    "outputs, squared": {"method": "outputs", **_DATA, **_SQUARED},
    "outputs, KL": {"method": "outputs", **_DATA, **_KL},
    "mixed: outputs, squared": {"method": "outputs", **_MIXED, **_SQUARED},
    "mixed: outputs, KL": {"method": "outputs", **_MIXED, **_KL},
    "mixed: outputs, squared, no labels": {"method": "outputs", "labels_weight": 0.0, **_MIXED, **_SQUARED},
}
"""Recipes without derivatives."""

DERIVATIVES: dict[str, Settings] = {
    "mixed: KL + row": _BEST,
    "mixed: KL + row, share 0.1": {**_BEST, "jacobian_share": 0.1},
    "mixed: KL + row, share 0.5": {**_BEST, "jacobian_share": 0.5},
    "mixed: KL + row, λ=10": {**_BEST, "jacobian_weight": 10.0},
    "mixed: squared + row": {**_BEST, **_SQUARED},
    "mixed: KL + row, no labels": {**_BEST, "labels_weight": 0.0},
    "mixed: KL + row, normalized": {**_BEST, "jacobian_loss": "normalized"},
    "mixed: KL + row, squared": {**_BEST, "jacobian_loss": "squared"},
    "mixed: KL + 2 orthogonal rows": {**_BEST, "probes": 2, "probe_law": "orthogonal"},
    "mixed: KL + top class": {**_BEST, "probe": "top-class"},
    "mixed: KL + Fisher row": {**_BEST, "probe": "fisher-rows", "readout": "log-probabilities"},
    "mixed: KL + random direction": {**_BEST, "probe": "random-inputs"},
    "mixed: KL + data pair": {**_BEST, "probe": "data-pairs"},
    "mixed: KL + antithetic pair": {**_BEST, "probe": "antithetic-noise", "noise": 0.1},
    "mixed: KL + row, every 2nd step": {**_BEST, "every": 2},
    "data: KL + row": {**_BEST, **_DATA},
    "data: KL + top class": {**_BEST, **_DATA, "probe": "top-class"},
    "noise: KL + row": {**_BEST, "point": "noise", "noise": 0.1},
}
"""Recipes with derivatives: points, products, losses."""

DIRECTIONS: dict[str, Settings] = {
    **{row: {**FREE, **DERIVATIVES}[row] for row in ("mixed: outputs, KL", "mixed: KL + row", "mixed: KL + data pair")},
    "mixed: KL + 16 low frequencies": {**_BEST, "probe": "subspace-inputs", "probe_dimensions": 16},
    "mixed: KL + row averaged over noise": {**_BEST, "probe": "noise-averaged", "probes": 2, "noise": 0.1},
}
"""Rows and white noise against directions in which images differ, and rows of a smoothed Jacobian."""
CANDIDATES: dict[str, Settings] = {**FREE, **DERIVATIVES}
_FINAL = ("labels", "outputs, KL", "mixed: outputs, squared", "mixed: outputs, KL", "mixed: KL + row")
_GRID_SEED = 100  # the seeds of the grid differ from those of the table whose recipes it selects
_BUDGET = {"smoke": 20, "cpu": 800, "paper": 4000}  # steps of plain distillation
_SEEDS = {"smoke": 1, "cpu": 5, "paper": 10}


def _cells(
    request: Request, rows: Mapping[str, Settings], per_class: Sequence[int], seeds: int, first: int
) -> list[Cell]:
    """A cell for each row, column and seed, each with as many steps as the budget pays for."""
    outputs = students.data_of(request.data, request.seed, request.smoke).outputs
    ratio = students.forward_ratio(request)
    budget = _BUDGET[request.scale] * (3 + ratio)
    cells = []
    for number in students.per_class_of(request, per_class):
        for row, settings in rows.items():
            chosen = students.settings_of(request, number, **settings, batch_size=50, lr=2e-3)
            chosen["steps"] = round(budget / students.cost(chosen, outputs, ratio))
            for seed in range(first, first + (seeds if request.seeds is None else request.seeds)):
                cells.append(Cell(row, students.column_of(number), seed, chosen))
    return cells


def _grid_cells(request: Request) -> list[Cell]:
    few = dict(list(CANDIDATES.items())[3:8] if request.smoke else list(CANDIDATES.items())[1:])
    return _cells(request, few, (5,), 1 if request.smoke else 2, _GRID_SEED)


def _final_cells(request: Request) -> list[Cell]:
    rows = {row: CANDIDATES[row] for row in _FINAL}
    return _cells(request, rows, (5,) if request.smoke else (1, 5, 10), _SEEDS[request.scale], request.seed)


def _directions_cells(request: Request) -> list[Cell]:
    return _cells(request, DIRECTIONS, (5,) if request.smoke else (1, 5), min(3, _SEEDS[request.scale]), request.seed)


def _grid_tables(document: Document) -> list[Table]:
    columns = names(document, "column")
    rows = grid(document, "validation_accuracy", digits=1)
    return [
        Table(
            "grid",
            "Validation accuracy in %, equal cost, by images per class",
            ("recipe", *(f"n = {column}" for column in columns)),
            tuple(rows),
            (origin(document),),
        )
    ]


def best_free(document: Document, column: str) -> str | None:
    """The recipe without derivatives with the best validation accuracy in this column, None if there is none."""
    results = spreads(document, "validation_accuracy")
    rows = [row for row in FREE if (row, column) in results]
    return max(rows, key=lambda row: float(results[row, column]["mean"])) if rows else None


def margins(document: Document, recipe: str = "mixed: KL + row") -> list[tuple[str, ...]]:
    """For each column: the best recipe without derivatives, and the gain of the recipe over it.

    The difference is taken seed by seed; its standard error is the standard deviation over √seeds.
    """
    results = spreads(document, "accuracy")
    rows: list[tuple[str, ...]] = []
    for column in names(document, "column"):
        rival = best_free(document, column)
        gain = None if rival is None else paired(results.get((recipe, column)), results.get((rival, column)))
        if rival is None or gain is None:
            continue
        error = gain["std"] / len(gain["values"]) ** 0.5 if gain["std"] else None
        ratio = NOTHING if not error else f"{gain['mean'] / error:.1f}"
        rows.append((column, rival, entry(gain), NOTHING if error is None else f"{100 * error:.1f}", ratio))
    return rows


def _final_tables(document: Document) -> list[Table]:
    columns = names(document, "column")
    cost = (
        "Each recipe has the same budget in forward passes of the student. A step with a row of the Jacobian costs two "
        "plain steps, so these recipes take half the steps. The teacher's forward pass costs "
        f"{document['facts']['forward_ratio']:.2f} of the student's. All recipes have the same initialization, subset "
        "and batches for a seed; all seeds share one teacher and one validation split.",
        origin(document),
    )
    rule = ("The best method without Jacobians is the one with the best accuracy on validation images.", *cost)
    accuracy = Table(
        "accuracy",
        "Test accuracy in % by images per class, equal cost, mean ± standard deviation over seeds",
        ("recipe", *columns),
        tuple(grid(document, "accuracy")),
        cost,
    )
    head = ("images per class", "best without Jacobians", "gain of Jacobians", "standard error", "gain ÷ error")
    margin = Table(
        "margin", "Jacobians against the best method without, in points", head, tuple(margins(document)), rule
    )
    return [accuracy, margin, fidelity(document)]


def _grid_figure(document: Document) -> bytes:
    column = names(document, "column")[0]
    results = spreads(document, "validation_accuracy")
    rows = [(row, results[row, column]) for row in names(document, "row") if (row, column) in results]
    return dot_figure(
        [(row, 100 * value["mean"], 100 * value["std"] if value["std"] is not None else None) for row, value in rows],
        title=f"{document['settings']['data']}, {column} images per class",
        x_label="validation accuracy in %",
    )


GRID = students.experiment(
    "which recipe for little data, chosen on validation images: readout × probe × loss × point at equal cost",
    _grid_cells,
    _grid_tables,
    _grid_figure,
)

LOW_DATA = students.experiment(
    "little data at equal cost: outputs and Jacobians at mixed pairs against the best methods without Jacobians",
    _final_cells,
    _final_tables,
)

LOW_DATA_DIRECTIONS = students.experiment(
    "little data at equal cost: which directions of the Jacobian: rows, data pairs, low frequencies, averaged rows",
    _directions_cells,
    _final_tables,
)
