"""Rows of the losses in `jacmatch.losses.penalties`."""

import torch
from tests.losses import reference

from jacmatch import losses

from .inputs import (
    common_rotation,
    common_shift_of_rows,
    fewer_rows,
    labels,
    no_row_dimension,
    normal,
    one_sample,
    replaced,
    rows,
    saturated,
    scaled,
    simplex,
)
from .row import BATCH, Case

ROWS = [
    Case(
        "squared-norm",
        losses.squared_norm,
        reference.squared_norm,
        lambda: (rows(),),
        equal=lambda: (torch.zeros_like(rows()),),
        invariances={"rotation": common_rotation, "sign": scaled(-1.0, 0)},
        refused={"`rows` of `squared_norm` must have a batch dimension": no_row_dimension},
    ),
    Case(
        "hoffman",
        losses.hoffman,
        reference.hoffman,
        lambda: (rows(),),
        options={"outputs": 7},
        equal=lambda: (torch.zeros_like(rows()),),
        invariances={"rotation": common_rotation, "sign": scaled(-1.0, 0)},
        refused={"`rows` of `hoffman` must have a batch dimension": no_row_dimension},
    ),
    Case(
        "paper-label-squared",
        losses.paper_label_squared,
        reference.paper_label_squared,
        lambda: (rows(),),
        options={"sigma": 0.3},
        equal=lambda: (torch.zeros_like(rows()),),
        invariances={"rotation": common_rotation, "sign": scaled(-1.0, 0)},
        refused={"`rows` of `paper_label_squared` must have a batch dimension": no_row_dimension},
    ),
    Case(
        "paper-label-cross-entropy",
        losses.paper_label_cross_entropy,
        reference.paper_label_cross_entropy,
        lambda: (rows(), simplex(BATCH, 4), labels()),
        options={"sigma": 0.3},
        invariances={"rotation": common_rotation, "common scale": scaled(0.5, 0, 1)},
        refused={
            "`probabilities` of `paper_label_cross_entropy` must have one number": replaced(1, fewer_rows),
            "`labels` of `paper_label_cross_entropy` must be integers": replaced(2, lambda y: y[:2]),
            "`probability_rows` of `paper_label_cross_entropy` must have a batch": replaced(
                0, lambda r: r[:, 0, 0, 0, 0]
            ),
        },
        at_zero={"underflow": lambda: (*saturated(), labels())},
    ),
    Case(
        "paper-label-cross-entropy-soft",
        losses.paper_label_cross_entropy,
        reference.paper_label_cross_entropy,
        lambda: (rows(), simplex(BATCH, 4), simplex(BATCH, 4)),
        options={"sigma": 0.3},
    ),
    Case(
        "label-cross-entropy",
        losses.label_cross_entropy,
        reference.label_cross_entropy,
        lambda: (rows(), simplex(BATCH, 4), normal(BATCH, 4), labels()),
        options={"sigma": 0.3},
        invariances={"rotation": common_rotation, "common scale": scaled(0.5, 0, 1, 2)},
        refused={
            "`probabilities` of `label_cross_entropy` must have one number": replaced(1, fewer_rows),
            "`laplacians` of `label_cross_entropy` must have one number": replaced(2, one_sample),
            "`labels` of `label_cross_entropy` must be integers": replaced(3, lambda y: y[:2]),
        },
        at_zero={"underflow": lambda: (*saturated(), saturated()[1] * 0, labels())},
    ),
    Case(
        "label-cross-entropy-soft",
        losses.label_cross_entropy,
        reference.label_cross_entropy,
        lambda: (rows(), simplex(BATCH, 4), normal(BATCH, 4), simplex(BATCH, 4)),
        options={"sigma": 0.3},
    ),
    Case(
        "piecewise-linear-cross-entropy",
        losses.piecewise_linear_cross_entropy,
        reference.piecewise_linear_cross_entropy,
        lambda: (rows(), simplex(BATCH, 4)),
        options={"sigma": 0.3},
        equal=lambda: (normal(BATCH, 1, 1, 2, 3).repeat(1, 4, 1, 1, 1), simplex(BATCH, 4)),
        invariances={"rotation": common_rotation, "shift of logits": common_shift_of_rows},
        refused={
            "`probabilities` of `piecewise_linear_cross_entropy` must have one number for each": replaced(
                1, fewer_rows
            ),
            "`logit_rows` of `piecewise_linear_cross_entropy` must": replaced(0, lambda r: r[:, 0, 0, 0, 0]),
        },
    ),
]
