"""Rows of the losses in `jacmatch.losses.attention`."""

import torch
from tests.losses import reference

from jacmatch import losses

from .inputs import dead_maps, fewer_rows, maps, normal, one_sample, replaced, scaled, swapped, twice
from .row import BATCH, Case

ROWS = [
    Case(
        "attention-map",
        losses.attention_map,
        reference.attention_map,
        lambda: (normal(BATCH, 4, 3, 2),),
        equal=lambda: (torch.zeros(BATCH, 4, 3, 2, dtype=torch.float64),),
        invariances={"sign": scaled(-1.0, 0), "order of channels": lambda inputs: (inputs[0].flip(1),)},
        refused={"`features` of `attention_map` must have shape .*Choose a layer": replaced(0, lambda z: z.flatten(2))},
        at_zero={"dead features": lambda: (torch.zeros(BATCH, 4, 3, 2, dtype=torch.float64),)},
    ),
    *(
        Case(
            f"attention-map-{p}",
            losses.attention_map,
            reference.attention_map,
            lambda: (normal(BATCH, 4, 3, 2),),
            options={"p": p},
            at_zero={"dead features": lambda: (torch.zeros(BATCH, 4, 3, 2, dtype=torch.float64),)},
        )
        for p in (1.0, 2.5, 3.0, 4.0)
    ),
    Case(
        "match-sizes",
        losses.match_sizes,
        reference.match_sizes,
        lambda: (normal(BATCH, 5, 2), normal(BATCH, 3, 4)),
        refused={
            "`student_map` and `teacher_map` of `match_sizes` must be": replaced(1, one_sample),
            r"equal batch sizes\. Got \(3, 5\) and \(3, 3, 4\)": replaced(0, lambda a: a[:, :, 0]),
        },
    ),
    Case(
        "attention-transfer",
        losses.attention_transfer,
        reference.attention_transfer,
        lambda: (maps(), maps()),
        options={"eps": 0.3},
        equal=lambda: twice(maps),
        invariances={"swap": swapped},
        refused={
            r"`attention_transfer` must .* Got \(3, 3, 2\) and \(3, 2, 2\)\. Call `match_sizes` first": replaced(
                1, fewer_rows
            ),
            r"`attention_transfer` must .* Got \(3, 2, 3\)": replaced(0, lambda a: a.transpose(1, 2)),
            "`attention_transfer` must have equal shapes": replaced(1, one_sample),
        },
        at_zero=dead_maps(),
    ),
    Case(
        "attention-transfer-scale",
        losses.attention_transfer,
        reference.attention_transfer,
        lambda: (maps(), maps()),
        options={"eps": 1e-20},
        invariances={"scale of student": scaled(7.0, 0), "scale of teacher": scaled(0.1, 1)},
    ),
]
