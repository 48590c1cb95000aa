"""Rows of the losses in `jacmatch.losses.outputs`."""

import torch
from tests.losses import reference

from jacmatch import losses

from .inputs import (
    common_rotation,
    fewer_rows,
    labels,
    logits,
    no_row_dimension,
    normal,
    replaced,
    rows,
    scaled,
    shifted_logits,
    simplex,
    swapped,
    twice,
    unlike_pair,
)
from .row import BATCH, Case

ROWS = [
    Case(
        "cross-entropy",
        losses.cross_entropy,
        reference.cross_entropy,
        lambda: (logits(), labels()),
        invariances={"shift of logits": lambda inputs: (inputs[0] + normal(BATCH, 1), inputs[1])},
        refused={
            r"`labels` of `cross_entropy` must be integers of shape \(3,\) .* Got int64 of shape \(2,\)": replaced(
                1, lambda y: y[:2]
            ),
            r"probabilities of shape \(3, 5\)\. Got float64 of shape \(3,\)\. For regression use": replaced(
                1, lambda y: y.double()
            ),
            r"`cross_entropy` must .* Got bool of shape": replaced(1, lambda y: y > 0),
            r"`logits` of `cross_entropy` must have a batch dimension": lambda inputs: (inputs[0][:, 0], inputs[1]),
        },
        at_zero={"infinite logit": lambda: (logits().index_fill(1, torch.tensor([4]), -torch.inf), labels())},
    ),
    Case(
        "cross-entropy-soft",
        losses.cross_entropy,
        reference.cross_entropy,
        lambda: (logits(), simplex(BATCH, 5)),
        refused={r"`labels` of `cross_entropy` must .* Got float64 of shape \(3, 4\)": replaced(1, fewer_rows)},
    ),
    Case(
        "squared-outputs",
        losses.squared_error,
        reference.squared_error,
        lambda: (logits(), logits()),
        equal=lambda: twice(logits),
        invariances={"swap": swapped, "common shift": lambda inputs: (inputs[0] + 2, inputs[1] + 2)},
        refused={
            **unlike_pair("squared_error"),
            "`squared_error` must have a batch dimension .*Reshape": no_row_dimension,
        },
    ),
    Case(
        "squared-rows",
        losses.squared_error,
        reference.squared_error,
        lambda: (rows(), rows()),
        equal=lambda: twice(rows),
        invariances={"swap": swapped, "rotation": common_rotation},
        refused=unlike_pair("squared_error"),
    ),
    Case(
        "kl",
        losses.hinton_kl,
        reference.hinton_kl,
        lambda: (logits(), logits()),
        options={"temperature": 2.5},
        equal=lambda: twice(logits),
        invariances={"shift of logits": shifted_logits},
        refused=unlike_pair("hinton_kl"),
    ),
    Case(
        "agreement",
        losses.agreement,
        reference.agreement,
        lambda: (torch.tensor([[1.0, 2.0], [4.0, 3.0], [0.0, 1.0]]).double(), torch.eye(3, 2).double()),
        invariances={"swap": swapped, "scale": scaled(3.0, 0)},
        refused=unlike_pair("agreement"),
        differentiable=False,
    ),
]
