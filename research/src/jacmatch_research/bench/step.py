"""`jacmatch bench step`: the cost of a training step with derivatives, in steps of plain distillation.

r is the teacher's forward pass ÷ the student's. In forward passes of the student, a plain step costs r + 3: a forward
pass costs 1 and its gradient 2. A step with derivatives costs 2r + 6, because the row is one more pass of each network,
and that of the student is differentiated.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from jacmatch.jacobian import RandomInputs, RandomOutputs
from jacmatch.models import build
from jacmatch.objectives import Distillation, GradientShare
from jacmatch.teachers import Answer, ModuleTeacher, Question, Teacher
from jacmatch_research.bench import rivals
from jacmatch_research.bench.claims import (
    Benchmark,
    Case,
    Claim,
    Conditions,
    Measured,
    NotMeasured,
    Spread,
    compare,
)

ROW = Claim("step with one random row, live teacher ÷ plain distillation, live teacher", must=2.1, aim=1.9)
CACHED = Claim(
    "step with one row or Jv, cached teacher ÷ plain distillation, live teacher", must=1.15, aim=1.05, of_floor=True
)
ROW_SELDOM = Claim("step with one row and `every=4`, live teacher ÷ plain distillation", must=1.35, aim=1.3)
CACHED_SELDOM = Claim(
    "step with one row and `every=4`, cached teacher ÷ plain distillation, live teacher", must=0.65, aim=0.6
)
TOP = Claim("self time of the ten longest operators ÷ that of all, one training step")
COMPILED = Claim("compiled ÷ eager step (bf16)", must=0.8, aim=0.5)
FUSED = Claim("step of fused Adam ÷ step of Adam as PyTorch selects it")
ADAM = Claim("step of Adam ÷ training step with one row, cached teacher")

PAIRS = {
    "VGG-9 → VGG-4, 28×28": ("vgg9", "vgg4", (1, 28, 28), 64),
    "ResNet-56 → ResNet-20, 32×32": ("resnet56", "resnet20", (3, 32, 32), 32),
}
LARGER = "ResNet-110 → ResNet-20, 32×32"
CACHED_PAIRS = {**PAIRS, LARGER: ("resnet110", "resnet20", (3, 32, 32), 32)}
BatchNorm = Literal["batch", "frozen"]


@dataclass(frozen=True)
class Stored:
    """A teacher whose answers are in memory, like those of a cache after they are read."""

    teacher: ModuleTeacher
    known: dict[bool, Answer] = field(default_factory=dict)
    answers_vjp: bool = True

    def answer(self, x: Tensor, question: Question) -> Answer:
        """Return the stored answer."""
        with_products = question.cotangents is not None or question.tangents is not None
        if with_products not in self.known:
            self.known[with_products] = self.teacher.answer(x, question)
        return self.known[with_products]


@dataclass(frozen=True)
class Pair:
    """Networks by name, and a batch."""

    teacher: str
    student: str
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, conditions: Conditions, name: str) -> "Pair":
        """The pair of this name; in a quick run, the smallest networks."""
        teacher, student, shape, batch = CACHED_PAIRS[name]
        if conditions.quick:
            teacher, student, batch = "cnn5", "cnn3", 4
        x = torch.rand(batch, *shape, device=conditions.device)
        return cls(teacher, student, x, torch.randint(0, 10, (batch,), device=x.device))

    def network(self, name: str) -> nn.Module:
        """A new network for the batch."""
        return build(name, 10, tuple(self.x.shape[1:])).to(self.x.device)

    def ratio(self, conditions: Conditions) -> float:
        """r, with the teacher in evaluation and the student in training mode."""
        teacher, student = self.network(self.teacher).eval(), self.network(self.student).train()
        with torch.no_grad():
            return compare(conditions, partial(teacher, self.x), partial(student, self.x), 21).spread.median

    def objective(
        self, products: Literal["row", "Jv"] | None, batch_norm: BatchNorm, *, every: int = 1, cached: bool = False
    ) -> Distillation:
        """The loss of new networks, with or without derivatives."""
        live, student = self.network(self.teacher), self.network(self.student)
        teacher: Teacher | nn.Module = Stored(ModuleTeacher(live)) if cached else live
        return Distillation(
            student,
            teacher,
            jacobians=GradientShare(0.3) if products else 0.0,
            probe=RandomInputs(1) if products == "Jv" else RandomOutputs(1),
            every=every,
            batch_norm=batch_norm,
            # Measuring the gradient shares is a separate cost: a few backward passes in every `measure_every` steps.
            measure_every=10**9,
        )

    def steps(
        self,
        products: Literal["row", "Jv"] | None,
        batch_norm: BatchNorm,
        *,
        every: int = 1,
        cached: bool = False,
        count: int = 1,
    ) -> Callable[[], None]:
        """Run this number of steps, with or without derivatives."""
        objective = self.objective(products, batch_norm, every=every, cached=cached)
        step = rivals.stepper(objective.student, lambda: objective(self.x, self.y)["loss"])

        def run() -> None:
            for _ in range(count):
                step()

        for _ in range(every):  # the first step measures the shares, and a stored teacher caches its answers
            step()
        return run


def every_step(
    conditions: Conditions,
    pair: str,
    batch_norm: BatchNorm,
    products: Literal["row", "Jv"] = "row",
    cached: bool = False,
) -> Measured:
    """Derivatives in every step; the lower limit is (2r + 6) ÷ (r + 3), or 6 ÷ (r + 3) with stored teacher outputs."""
    chosen = Pair.of(conditions, pair)
    r = chosen.ratio(conditions)
    mine, plain = chosen.steps(products, batch_norm, cached=cached), chosen.steps(None, batch_norm)
    times = compare(conditions, mine, plain, 15)
    details = {"batch": len(chosen.x), "r": r, "baseline_seconds": times.baseline_seconds}
    return Measured(times.spread, (6 if cached else 2 * r + 6) / (r + 3), details)


def every_fourth(conditions: Conditions, pair: str, cached: bool) -> Measured:
    """Derivatives in every fourth step; the lower limit of three plain steps is 1; 3 ÷ (r + 3) with stored outputs."""
    chosen = Pair.of(conditions, pair)
    r = chosen.ratio(conditions)
    mine, plain = chosen.steps("row", "frozen", every=4, cached=cached, count=4), chosen.steps(None, "frozen", count=4)
    times = compare(conditions, mine, plain, 9)
    details = {"batch": len(chosen.x), "r": r, "baseline_seconds": times.baseline_seconds}
    derivative_step, without = (6, 3) if cached else (2 * r + 6, r + 3)
    return Measured(times.spread, (derivative_step + 3 * without) / (4 * (r + 3)), details)


def fused_adam(conditions: Conditions, pair: str) -> Measured:
    """A step of fused Adam ÷ one of PyTorch's default, on the parameters of the student."""
    chosen = Pair.of(conditions, pair)
    fused, default = (rivals.adam_step(chosen.network(chosen.student), fused=each) for each in (True, False))
    times = compare(conditions, fused, default, 15)
    return Measured(times.spread, details={"baseline_seconds": times.baseline_seconds})


def adam_in_step(conditions: Conditions, pair: str) -> Measured:
    """A step of Adam alone ÷ a training step with one row and a cached teacher."""
    chosen = Pair.of(conditions, pair)
    adam = rivals.adam_step(chosen.network(chosen.student), fused=False)
    times = compare(conditions, adam, chosen.steps("row", "frozen", cached=True), 15)
    return Measured(times.spread, details={"batch": len(chosen.x), "baseline_seconds": times.baseline_seconds})


def later(conditions: Conditions) -> Measured:
    """Not measured yet."""
    raise NotMeasured("not measured yet")


STEP = Benchmark(
    "a training step with derivatives, in steps of plain distillation of the same pair",
    (
        *(
            Case(ROW, f"{pair}, BatchNorm {policy}", partial(every_step, pair=pair, batch_norm=policy))
            for pair in PAIRS
            for policy in ("frozen", "batch")
        ),
        *(
            Case(
                CACHED,
                f"{pair}, {products}",
                partial(every_step, pair=pair, batch_norm="frozen", products=products, cached=True),
            )
            for pair in CACHED_PAIRS
            for products in ("row", "Jv")
        ),
        *(Case(ROW_SELDOM, pair, partial(every_fourth, pair=pair, cached=False)) for pair in PAIRS),
        Case(CACHED_SELDOM, LARGER, partial(every_fourth, pair=LARGER, cached=True)),
        Case(COMPILED, "batch 128 and 1024", later, devices=("cuda",)),
    ),
)

CPU_STEP = tuple(case for case in STEP.cases if "frozen" in case.name or "Jv" in case.name)
"""The steps that are measured in CPU time on a busy machine."""
OPTIMIZER = Benchmark(
    "the optimizer's part of a training step, in CPU time",
    tuple(
        Case(claim, pair, partial(measure, pair=pair), devices=("cpu",))
        for claim, measure in ((FUSED, fused_adam), (ADAM, adam_in_step))
        for pair in PAIRS
    ),
)


def profiled(conditions: Conditions, way: Literal["plain", "row", "rival"]) -> Measured:
    """The longest operators of a step of ResNet-56 → ResNet-20."""
    chosen = Pair.of(conditions, "ResNet-56 → ResNet-20, 32×32")
    if way == "rival":
        teacher, student = chosen.network(chosen.teacher).eval().requires_grad_(False), chosen.network(chosen.student)
        step: Callable[[], None] = rivals.stepper(
            student, lambda: rivals.row_loss(student, teacher, chosen.x, chosen.y)
        )
    else:
        step = chosen.steps("row" if way == "row" else None, "batch")
    step()
    return longest_operators(conditions, step, len(chosen.x))


def longest_operators(conditions: Conditions, step: Callable[[], object], batch: int) -> Measured:
    """Median milliseconds of the ten longest operators of a step; the ratio is their share of the total."""
    rounds: list[dict[str, float]] = []
    for _ in range(conditions.rounds(5)):
        with torch.profiler.profile() as profiler:
            step()
            conditions.wait()
        of_gpu = conditions.kind == "cuda"
        times = {e.key: e.self_device_time_total if of_gpu else e.self_cpu_time_total for e in profiler.key_averages()}
        rounds.append({name: time / 1000 for name, time in times.items()})
    medians = {name: statistics.median(each.get(name, 0.0) for each in rounds) for name in {*rounds[0], *rounds[-1]}}
    longest = sorted(medians, key=lambda name: -medians[name])[:10]
    shares = [sum(each.get(name, 0.0) for name in longest) / sum(each.values()) for each in rounds]
    whole = statistics.median(sum(each.values()) for each in rounds)
    details = {"batch": batch, "all": round(whole, 1), **{name: round(medians[name], 1) for name in longest}}
    return Measured(Spread.of(shares), details=details)


WAYS: dict[str, Literal["plain", "row", "rival"]] = {
    "plain distillation": "plain",
    "one row, plain PyTorch": "rival",
    "one row": "row",
}
PROFILE = Benchmark(
    "operators of a training step, ResNet-56 → ResNet-20, by torch.profiler",
    tuple(Case(TOP, name, partial(profiled, way=way)) for name, way in WAYS.items()),
)
