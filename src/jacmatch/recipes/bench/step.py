"""`jacmatch bench step`: what a training step with slopes costs, in steps of plain distillation of the same pair."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from jacmatch.jacobian import RandomOutputs
from jacmatch.models import build
from jacmatch.objectives import Distillation, Share
from jacmatch.recipes.bench import rivals
from jacmatch.recipes.bench.claims import Benchmark, Case, Claim, Measured
from jacmatch.recipes.bench.method import Conditions, NotMeasured, compare

ROW = Claim("step with one random row, live teacher ÷ plain distillation, live teacher", must=2.1, aim=1.9)
CACHED = Claim(
    "step with one row or Jv, cached teacher ÷ plain distillation, live teacher", must=1.15, aim=1.05, of_floor=True
)
ROW_SELDOM = Claim("the same with `every=4`, live teacher", must=1.35, aim=1.3)
CACHED_SELDOM = Claim("the same with `every=4`, cached teacher, r ≥ 3.4", must=0.65, aim=0.6)
COMPILED = Claim("compiled ÷ eager step (bf16)", must=0.8, aim=0.5)

PAIRS = {
    "VGG-9 → VGG-4, 28×28": ("vgg9", "vgg4", (1, 28, 28), 64),
    "ResNet-56 → ResNet-20, 32×32": ("resnet56", "resnet20", (3, 32, 32), 32),
}


def row_step(conditions: Conditions, pair: str, batch_norm: Literal["batch", "frozen"]) -> Measured:
    """A step with one random row ÷ a step of plain distillation; the floor is (2r + 6) ÷ (r + 3)."""
    teacher_name, student_name, shape, batch = PAIRS[pair]
    if conditions.quick:
        teacher_name, student_name, batch = "cnn5", "cnn3", 4
    x = torch.rand(batch, *shape, device=conditions.device)
    y = torch.randint(0, 10, (batch,), device=conditions.device)

    def step(weight: Share | float) -> Callable[[], None]:
        teacher, student = (build(name, 10, shape).to(conditions.device) for name in (teacher_name, student_name))
        objective = Distillation(student, teacher, jacobians=weight, probe=RandomOutputs(1), batch_norm=batch_norm)
        # The measurement of the gradient shares is a separate cost: 1 / measure_every of a few backward passes.
        objective.measure_every = 10**9
        return rivals.stepper(student, lambda: objective(x, y)["loss"])

    r = forward_ratio(conditions, teacher_name, student_name, x)
    times = compare(conditions, step(Share(0.3)), step(0.0), 15)
    details = {"batch": batch, "r": r, "baseline_seconds": times.baseline_seconds}
    return Measured(times.spread, (2 * r + 6) / (r + 3), details)


def forward_ratio(conditions: Conditions, teacher: str, student: str, x: Tensor) -> float:
    """The teacher's forward pass in evaluation mode ÷ the student's in training mode, which floors are made of."""
    first, second = (build(name, 10, tuple(x.shape[1:])).to(x.device) for name in (teacher, student))
    with torch.no_grad():
        return compare(conditions, partial(first.eval(), x), partial(second.train(), x), 9).spread.median


def later(conditions: Conditions) -> Measured:
    """Not measured yet."""
    raise NotMeasured("not measured yet")


STEP = Benchmark(
    "a training step with slopes, in steps of plain distillation of the same pair",
    (
        *(
            Case(ROW, f"{pair}, BatchNorm {policy}", partial(row_step, pair=pair, batch_norm=policy))
            for pair in PAIRS
            for policy in ("frozen", "batch")
        ),
        Case(CACHED, "VGG-9 → VGG-4; ResNet-56 → ResNet-20", later),
        Case(ROW_SELDOM, "VGG-9 → VGG-4; ResNet-56 → ResNet-20", later),
        Case(CACHED_SELDOM, "VGG-9 → VGG-4; ResNet-56 → ResNet-20", later),
        Case(COMPILED, "batch 128 and 1024", later, devices=("cuda",)),
    ),
)
