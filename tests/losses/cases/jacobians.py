"""Rows of the losses in `jacmatch.losses.jacobians`."""

from tests.losses import reference

from jacmatch import losses

from .inputs import (
    common_rotation,
    dead,
    dead_rows,
    fewer_rows,
    one_sample,
    replaced,
    rows,
    saturated,
    scaled,
    simplex,
    swapped,
    twice,
    unlike_pair,
)
from .row import BATCH, Case

ROWS = [
    Case(
        "relative",
        losses.relative_error,
        reference.relative_error,
        lambda: (rows(), rows()),
        options={"eps": 0.3},
        equal=lambda: twice(rows),
        invariances={"rotation": common_rotation},
        refused=unlike_pair("relative_error"),
        at_zero=dead_rows(),
    ),
    Case(
        "relative-scale",
        losses.relative_error,
        reference.relative_error,
        lambda: (rows(), rows()),
        options={"eps": 1e-20},
        invariances={"common scale": scaled(7.0, 0, 1)},
    ),
    Case(
        "bounded",
        losses.bounded_error,
        reference.bounded_error,
        lambda: (rows(), rows()),
        options={"eps": 0.3},
        equal=lambda: twice(rows),
        invariances={"rotation": common_rotation},
        refused=unlike_pair("bounded_error"),
        at_zero=dead_rows(),
    ),
    Case(
        "bounded-scale",
        losses.bounded_error,
        reference.bounded_error,
        lambda: (rows(), rows()),
        options={"eps": 1e-20},
        invariances={"common scale": scaled(7.0, 0, 1)},
    ),
    Case(
        "normalized",
        losses.normalized_error,
        reference.normalized_error,
        lambda: (rows(), rows()),
        options={"eps": 0.3},
        equal=lambda: twice(rows),
        invariances={"rotation": common_rotation, "swap": swapped},
        refused=unlike_pair("normalized_error"),
        at_zero=dead_rows(),
    ),
    Case(
        "normalized-scale",
        losses.normalized_error,
        reference.normalized_error,
        lambda: (rows(), rows()),
        options={"eps": 1e-20},
        invariances={"scale of student": scaled(7.0, 0), "scale of teacher": scaled(0.1, 1)},
    ),
    Case(
        "direction-and-magnitude",
        losses.direction_and_magnitude,
        reference.direction_and_magnitude,
        lambda: (rows(), rows()),
        options={"eps": 0.3},
        equal=lambda: twice(rows),
        invariances={"rotation": common_rotation, "swap": swapped},
        refused=unlike_pair("direction_and_magnitude"),
        at_zero=dead_rows(),
    ),
    Case(
        "fisher",
        losses.fisher,
        reference.fisher,
        lambda: (rows(), rows(), simplex(BATCH, 4)),
        equal=lambda: (*twice(rows), simplex(BATCH, 4)),
        invariances={"rotation": common_rotation, "swap": swapped},
        refused={
            **unlike_pair("fisher"),
            r"`probabilities` of `fisher` must have one number for each row, shape \(3, 4\)\. Got \(3, 3\)": replaced(
                2, fewer_rows
            ),
        },
        at_zero={which: (lambda which=which: (*dead(which), simplex(BATCH, 4))) for which in ("student", "both")},
    ),
    Case(
        "paper-cross-entropy",
        losses.paper_cross_entropy,
        reference.paper_cross_entropy,
        lambda: (rows(), rows(), simplex(BATCH, 4)),
        invariances={"rotation": common_rotation},
        refused={
            **unlike_pair("paper_cross_entropy"),
            "`student_probabilities` of `paper_cross_entropy` must have one number for each row": replaced(
                2, one_sample
            ),
        },
        at_zero={"underflow": lambda: (saturated()[0], rows(), saturated()[1])},
    ),
]
