"""`jacmatch bench compiled`: time of a step with one row, compiled by Inductor ÷ eager, and its longest operators."""

import time
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch

from jacmatch.models import build
from jacmatch.objectives import CompiledSteps, Distillation, GradientShare
from jacmatch.teachers import ModuleTeacher
from jacmatch_research.bench import rivals
from jacmatch_research.bench.claims import Benchmark, Case, Claim, Conditions, Measured, NotMeasured, compare
from jacmatch_research.bench.step import TOP, Stored, longest_operators

COMPILED = Claim("compiled ÷ eager step with one row, cached teacher", must=1.0)
STUDENTS = {
    "VGG-4, 28×28": ("vgg4", (1, 28, 28), 64),
    "ResNet-20, 32×32": ("resnet20", (3, 32, 32), 32),
    "ViT-Tiny, 32×32": ("vit-tiny", (3, 32, 32), 16),
}


def steps(conditions: Conditions, student: str) -> tuple[Callable[[], None], Callable[[], None], float]:
    """An eager and a compiled step of networks of the same weights, and the seconds of the first compiled one."""
    name, shape, batch = STUDENTS[student]
    return _compiled(*(("cnn3", (1, 8, 8), 16, "aot_eager") if conditions.quick else (name, shape, batch, "inductor")))


@cache
def _compiled(
    name: str, shape: tuple[int, ...], batch: int, backend: str
) -> tuple[Callable[[], None], Callable[[], None], float]:
    """The steps of this network; each is compiled once for all rows.

    Raises:
        NotMeasured: The objective runs eagerly after all.
    """
    x, y = torch.rand(batch, *shape), torch.arange(batch) % 10
    both, seconds = [], 0.0
    for compiled in (False, True):
        torch.manual_seed(0)
        teacher = Stored(ModuleTeacher(build(name, 10, shape)))
        # the shares are measured in the first step, which is eager
        objective = Distillation(build(name, 10, shape), teacher, jacobians=GradientShare(0.3), measure_every=10**9)
        objective.compiled = CompiledSteps(backend=backend) if compiled else None
        step = rivals.stepper(objective.student, partial(_loss, objective, x, y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
        if objective.compiled is not None and objective.compiled.fallback is not None:
            raise NotMeasured(objective.compiled.fallback)
        both.append(step)
    return both[0], both[1], seconds


def _loss(objective: Distillation, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = objective(x, y)["loss"]
    return loss


def ratio(conditions: Conditions, student: str) -> Measured:
    """Time of a compiled step ÷ time of an eager step."""
    eager, compiled, seconds = steps(conditions, student)
    times = compare(conditions, compiled, eager, 15)
    details = {"baseline_seconds": times.baseline_seconds, "seconds_to_compile": round(seconds, 1)}
    return Measured(times.spread, details={"batch": STUDENTS[student][2], **details})


def operators(conditions: Conditions, student: str, compiled: bool) -> Measured:
    """The longest operators of a step, compiled or eager."""
    eager, other, _ = steps(conditions, student)
    return longest_operators(conditions, other if compiled else eager, STUDENTS[student][2])


COMPILED_STEP = Benchmark(
    "a step with one row, compiled by Inductor",
    (
        *(Case(COMPILED, student, partial(ratio, student=student), devices=("cpu",)) for student in STUDENTS),
        *(
            Case(TOP, f"{student}, {way}", partial(operators, student=student, compiled=compiled), devices=("cpu",))
            for student in STUDENTS
            for way, compiled in (("eager", False), ("compiled", True))
        ),
    ),
)
