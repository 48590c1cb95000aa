"""The accuracy with cheaper derivatives: fewer steps, a part of the batch, repeated views, or more rows at once."""

from collections.abc import Mapping
from typing import Any

from jacmatch.report import Table
from jacmatch.report.tables import NOTHING
from jacmatch_research.reproduce import students
from jacmatch_research.reproduce.experiment import Cell, Request
from jacmatch_research.tables import Document, fidelity, gains, grid, names, origin

VALUES, EACH = "values alone", "one row in each step"

ROWS: dict[str, Mapping[str, Any]] = {
    VALUES: {"method": "outputs"},
    EACH: {"method": "jacobians"},
    "every 2nd step": {"method": "jacobians", "every": 2},
    "every 4th step": {"method": "jacobians", "every": 4},
    "half of the batch": {"method": "jacobians", "fraction": 0.5},
    "a quarter of the batch": {"method": "jacobians", "fraction": 0.25},
    "4 orthogonal rows": {"method": "jacobians", "probes": 4, "probe_law": "orthogonal"},
    "one row, 10 views": {"method": "jacobians", "views": 10},
    "one row, 1 view": {"method": "jacobians", "views": 1},
    "values alone, 10 views": {"method": "outputs", "views": 10},
}
"""Settings of `jacmatch distill`; all others have their defaults."""

_STEPS = {"smoke": 20, "cpu": 300, "paper": 4000}


def _cells(request: Request) -> list[Cell]:
    shared = {"batch_size": 64, "steps": _STEPS[request.scale], "lr": 2e-3}
    return students.cells_of(request, ROWS, (5,) if request.smoke else (10, 100), 5, **shared)


def _tables(document: Document) -> list[Table]:
    columns, gain = names(document, "column"), gains(document, EACH, VALUES)
    ratio, outputs = document["facts"]["forward_ratio"], document["facts"]["outputs"]
    options = {cell["row"]: cell["settings"] for cell in document["cells"]}
    plain = students.cost({**ROWS[VALUES], "point": "mixed-pairs"}, outputs, ratio)
    costs = {
        row: (students.cost(settings, outputs, ratio) / plain, students.cost(settings, outputs, 0.0) / plain)
        for row, settings in options.items()
    }

    def entries(row: str) -> tuple[str, str]:
        live, retained = costs[row]
        return f"{live:.2f}", f"{retained:.2f}" if options[row].get("views") else NOTHING

    main = Table(
        "accuracy",
        "Test accuracy in % by images per class, equal steps",
        ("row", "cost of a step", "cached teacher", *columns),
        (
            *((row, *entries(row), *rest) for row, *rest in grid(document, "accuracy")),
            (gain[0], NOTHING, NOTHING, *gain[1:]),
        ),
        (
            "Cost of a step by number of operations, with a live and with a cached teacher, relative to values alone "
            f"with a live teacher. The teacher's forward pass costs r = {ratio:.1f} of the student's.",
            "Views: number of epochs after which partner, point and directions repeat, so that they can be cached.",
            origin(document),
        ),
    )
    return [main, fidelity(document)]


def _prepare(request: Request, progress: Any) -> dict[str, Any]:
    facts = students.prepare(request, progress)
    return {**facts, "outputs": students.data_of(request.data, request.seed, request.smoke).outputs}


FEWER_PASSES = students.experiment(
    "the accuracy lost by cheaper derivatives: every n-th step, a part of the batch, views that repeat",
    _cells,
    _tables,
    prepare=_prepare,
)
