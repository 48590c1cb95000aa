"""Rows of the losses in `jacmatch.losses.noise`."""

from tests.losses import reference

from jacmatch import losses

from .inputs import answers, fewer_rows, normal, replaced, swapped, twice, unlike_pair
from .row import BATCH, Case

ROWS = [
    Case(
        "noise-distillation",
        losses.noise_distillation,
        reference.noise_distillation,
        lambda: (answers(), answers()),
        equal=lambda: twice(answers),
        invariances={"swap": swapped, "order of draws": lambda inputs: tuple(x.flip(0) for x in inputs)},
        batch_dim=1,
        refused={
            **unlike_pair("noise_distillation"),
            r"`noise_distillation` must have shape \(noise, batch, out\) with at least 1 draw of": lambda inputs: (
                inputs[0][0],
                inputs[1][0],
            ),
        },
    ),
    Case(
        "centered-variance",
        losses.centered_variance,
        reference.centered_variance,
        lambda: (answers(), answers()),
        equal=lambda: twice(answers),
        invariances={
            "constant difference": lambda inputs: (inputs[0] + normal(1, BATCH, 5), inputs[1]),
            "order of draws": lambda inputs: tuple(x.flip(0) for x in inputs),
        },
        batch_dim=1,
        refused={
            **unlike_pair("centered_variance"),
            r"`centered_variance` must .* at least 2 draws of noise\. Got \(1, 3, 5\)": lambda inputs: (
                inputs[0][:1],
                inputs[1][:1],
            ),
        },
    ),
    Case(
        "antithetic",
        losses.antithetic,
        reference.antithetic,
        lambda: (answers(), answers(), answers(), answers()),
        equal=lambda: (*twice(answers), *twice(answers)),
        invariances={
            "constant difference": lambda inputs: (inputs[0] + 3, inputs[1], inputs[2] + 3, inputs[3]),
            "sign of noise": lambda inputs: (*inputs[2:], *inputs[:2]),
        },
        batch_dim=1,
        refused={
            "`student_plus` and .* and `teacher_minus` of `antithetic` must have equal shapes": replaced(3, fewer_rows),
            "`antithetic` must have shape": lambda inputs: tuple(tensor[0] for tensor in inputs),
        },
    ),
]
