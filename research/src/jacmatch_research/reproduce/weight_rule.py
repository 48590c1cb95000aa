"""Does the default lower the accuracy? The Jacobian weight by data size and progress, against values alone."""

from collections.abc import Mapping
from typing import Any

from jacmatch.report import Table
from jacmatch_research.reproduce import students
from jacmatch_research.reproduce.experiment import Cell, Request
from jacmatch_research.tables import Document, fidelity, gains, grid, names, origin

VALUES, DEFAULT = "values alone, default", "values + Jacobians, default"
_SHARE = {"method": "jacobians", "jacobian_schedule": "constant", "jacobian_share": 0.3}
_DATA, _MIXED = {"point": "data"}, {"point": "mixed-pairs"}

ROWS: dict[str, Mapping[str, Any]] = {
    VALUES: {"method": "outputs"},
    DEFAULT: {"method": "jacobians"},
    "values alone, at the images": {"method": "outputs", **_DATA},
    "share 0.3 whatever n, at the images": {**_SHARE, **_DATA},
    "values alone, at mixed pairs": {"method": "outputs", **_MIXED},
    "share 0.3 whatever n, at mixed pairs": {**_SHARE, **_MIXED},
    "the same, fading from half": {**_SHARE, **_MIXED, "jacobian_fades_from": 0.5},
}
"""Settings of `jacmatch distill`; all others have their defaults."""

_PER_CLASS = {"smoke": (5,), "cpu": (1, 5, 10, 50, 100, 1000, 0), "paper": (1, 5, 10, 50, 100, 500, 1000, 0)}
_STEPS = {"smoke": 20, "cpu": 300, "paper": 4000}


def _cells(request: Request) -> list[Cell]:
    shared = {"batch_size": 64, "steps": _STEPS[request.scale], "lr": 2e-3}
    return students.cells_of(request, ROWS, _PER_CLASS[request.scale], 5, **shared)


def _tables(document: Document) -> list[Table]:
    columns = names(document, "column")
    notes = (
        "The rule by data size follows the paper's tables (gains up to 100 images per class, losses from 500); its "
        "power was raised from 2 to 4 after the losses on Fashion-MNIST, on validation and test images alike.",
        origin(document),
    )
    tables = [
        Table(
            name,
            f"{what} accuracy in % by images per class, equal steps",
            ("row", *columns),
            (*grid(document, measure), gains(document, DEFAULT, VALUES, measure)),
            notes,
        )
        for name, what, measure in (
            ("accuracy", "Test", "accuracy"),
            ("validation", "Validation", "validation_accuracy"),
        )
    ]
    return [*tables, fidelity(document)]


WEIGHT_RULE = students.experiment(
    "the default weight of the Jacobian term against values alone, from 1 image per class to all", _cells, _tables
)
