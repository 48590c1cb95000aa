"""Is the default of `Distillation`, used as in the README, at least as good as a loop without it?

The plan, the settings and the criterion are in docs/results/default-recipe.md; they were written before the first cell.
Networks, optimizer and loop are a user's own: plain torch, no argument of `Distillation` but the size of the data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch import datasets
from jacmatch.datasets import Data, Split
from jacmatch.jobs import networks
from jacmatch.jobs.settings import parts
from jacmatch.jobs.study import Progress
from jacmatch.jobs.teachers import prepare as prepare_teacher
from jacmatch.jobs.train import Train
from jacmatch.models import count_parameters
from jacmatch.objectives import AtData, AtMixedPairs, Distillation, GradientShare, Point
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, Spread, entry
from jacmatch.training import evaluate
from jacmatch_research.figures import by_columns, line_figure
from jacmatch_research.reproduce import students
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.tables import Document, grid, names, origin, paired, spreads

PAIRS = ("convolutional", "residual")
OPTIMIZERS = ("Adam", "SGD")
PER_CLASS = (5, 10, 100, 1000)
SECOND_PAIR_AT = {"digits": (10, 100), "fashion-mnist": (5, 1000), "cifar10": (10, 100)}
"""Images per class at which the second pair is measured."""
CROSS_ENTROPY, PLAIN_KL, DEFAULT = "cross-entropy", "plain KL", "default"
EQUAL_TIME = {CROSS_ENTROPY: "cross-entropy, equal time", PLAIN_KL: "plain KL, equal time"}
_ORDER = ("digits", "fashion-mnist", "cifar10")
_BATCH, _SEEDS, _GRID_SEED = 32, 3, 100  # the grid has seeds that differ from those of the table that it decides
_STEPS = {"smoke": 6, "cpu": 600, "paper": 2000}
_LR = {"Adam": 3e-3, "SGD": 1e-2}
_MODULE = "jacmatch_research.reproduce.two_pairs"

_FLIP: Mapping[str, Any] = {"augment": ("flip",), "precision": "bf16"}
_CROP: Mapping[str, Any] = {"augment": ("crop", "flip"), "precision": "bf16"}
_TEACHERS: dict[tuple[str, str], Mapping[str, Any]] = {
    ("fashion-mnist", "convolutional"): {"steps": 3000, **_FLIP},
    ("fashion-mnist", "residual"): {"steps": 1500, **_FLIP},
    ("cifar10", "convolutional"): {"steps": 4000, **_CROP},
    ("cifar10", "residual"): {"steps": 2500, **_CROP},
}
"""How teachers are trained, where not in 600 steps without augmentation."""

STEP_TIMES: dict[tuple[str, str], tuple[float, float]] = {
    ("digits", "convolutional"): (1.54, 4.54),
    ("digits", "residual"): (1.43, 4.11),
    ("fashion-mnist", "convolutional"): (1.73, 5.17),
    ("fashion-mnist", "residual"): (1.58, 4.07),
    ("cifar10", "convolutional"): (1.79, 5.22),
    ("cifar10", "residual"): (1.58, 4.07),
}
"""Time of a step of plain KL, and of the default where data are scarce, in steps of cross-entropy, by data and pair."""
_STEP_TIMES = 1.6, 4.5  # for other data


@dataclass(frozen=True)
class Setting:
    """Networks, amount of data and optimizer of a column."""

    pair: str
    per_class: int
    optimizer: str

    @property
    def name(self) -> str:
        """The name of the column."""
        return f"{self.pair}, n = {self.per_class}, {self.optimizer}"


def settings_of(request: Request) -> list[Setting]:
    """The first pair at every size, with Adam and SGD in turn; the second at its sizes, with the other optimizer."""
    family = request.data.partition(":")[0]
    offset = _ORDER.index(family) if family in _ORDER else 0
    sizes = students.per_class_of(request, (5,) if request.smoke else PER_CLASS)
    first, second = PAIRS
    settings = []
    for n in sizes:
        turn = (PER_CLASS.index(n) if n in PER_CLASS else 0) + offset
        settings.append(Setting(first, n, OPTIMIZERS[turn % 2]))
        if n in SECOND_PAIR_AT.get(family, PER_CLASS) or request.smoke:
            settings.append(Setting(second, n, OPTIMIZERS[(turn + 1) % 2]))
    return settings


# Networks and data


@dataclass(frozen=True)
class Pair:
    """Data and networks that all students of a pair share."""

    data: Data
    pool: Split
    validation: Split
    teacher: nn.Module
    student: networks.Description


@lru_cache(maxsize=2)
def pair_of(data: str, seed: int, device: str, smoke: bool, pair: str) -> Pair:
    """Data and networks; the teacher is trained on all training images except the held-out ones, and cached."""
    loaded = students.data_of(data, seed, smoke)
    pool, validation = parts(loaded, students.VALIDATION, 0, seed)
    assert validation is not None
    chosen = _TEACHERS.get((data.partition(":")[0], pair), {"steps": 600})
    recipe = Train(
        data=data,
        model=f"{_MODULE}:{pair}_teacher",
        seed=seed,
        device=device,
        smoke=smoke,
        validation=students.VALIDATION,
        batch_size=128,
        lr=3e-3,
        validate_every=500,
        **chosen,
    )
    prepared = prepare_teacher(recipe.model, loaded, None, recipe, Progress(quiet=True), allow_code=True)
    student = networks.Description.of(f"{_MODULE}:{pair}_student", loaded)
    return Pair(loaded, pool, validation, prepared.network, student)


def _pair(request: Request, pair: str) -> Pair:
    return pair_of(request.data, request.seed, request.device, request.smoke, pair)


def teachers(request: Request) -> nn.Module:
    """The teachers of all pairs."""
    return nn.ModuleDict({name: _pair(request, name).teacher for name in PAIRS})


def prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """Accuracy and size of the networks, and what a step costs on this machine."""
    pair_of.cache_clear()  # data and teachers of the same names may have changed
    facts: dict[str, Any] = {"teachers": {}, "parameters": {}, "step_times": {}}
    for name in PAIRS:
        pair = _pair(request, name)
        facts["teachers"][name] = evaluate(pair.teacher, pair.data.test, device=request.device)["accuracy"]
        facts["parameters"][name] = [count_parameters(pair.teacher), count_parameters(pair.student.build())]
        facts["step_times"][name] = step_times(request, pair, 1 if request.smoke else 40)
    return facts


def step_times(request: Request, pair: Pair, rounds: int) -> list[float]:
    """Time of a step of plain KL and of the default with few data, in steps of cross-entropy (medians).

    On the CPU in processor time, which other processes of a shared machine change little.
    """
    clock = process_time if request.device == "cpu" else perf_counter
    steps = []
    for row in (CROSS_ENTROPY, PLAIN_KL, DEFAULT):
        student = pair.student.build().to(request.device)
        loss = loss_of(row, student, pair.teacher, torch.arange(pair.data.outputs).repeat(PER_CLASS[0]), 0)
        steps.append(_step(loss, student, optimizer_of("SGD", student, 0.0)))
    x, y = pair.pool.inputs(torch.arange(_BATCH)).to(request.device), pair.pool.y[:_BATCH].to(request.device)
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 3):
        for step, seconds in zip(steps, taken, strict=True):
            start = clock()
            step(x, y)
            seconds.append(clock() - start)
    first, *others = taken
    return [round(median(b / a for a, b in zip(first[3:], other[3:], strict=True)), 2) for other in others]


# The loop


Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(row: str, student: nn.Module, teacher: nn.Module, labels: Tensor, seed: int) -> Loss:
    """The objective that the loop calls instead of cross-entropy; `labels` are those of the training set."""
    if row in (CROSS_ENTROPY, EQUAL_TIME[CROSS_ENTROPY]):
        return lambda x, y: nn.functional.cross_entropy(student(x), y)
    if row == DEFAULT:
        objective = Distillation.for_dataset(student, teacher, labels)
    else:
        recipe = RECIPES["data: KL" if row in (PLAIN_KL, EQUAL_TIME[PLAIN_KL]) else row]
        objective = recipe.objective(student, teacher, seed)
    return lambda x, y: objective(x, y)["loss"]


@dataclass(frozen=True)
class Recipe:
    """KL at temperature 4 and a row of the Jacobian, or none; the weights of labels and outputs are 1."""

    point: Point
    share: float = 0.0

    def objective(self, student: nn.Module, teacher: nn.Module, seed: int) -> Distillation:
        """Return the loss with explicit settings."""
        return Distillation(
            student,
            teacher,
            jacobians=GradientShare(self.share) if self.share else 0.0,
            point=self.point,
            output_loss="kl",
            temperature=4.0,
            seed=seed,
        )


_DATA, _MIXED = AtData(), AtMixedPairs()
RECIPES: dict[str, Recipe] = {
    "data: KL": Recipe(_DATA),
    "mixed: KL": Recipe(_MIXED),
    "data: KL + row, 0.3": Recipe(_DATA, 0.3),
    "mixed: KL + row, 0.1": Recipe(_MIXED, 0.1),
    "mixed: KL + row, 0.3": Recipe(_MIXED, 0.3),
    "mixed: KL + row, 0.5": Recipe(_MIXED, 0.5),
}
"""Candidates for the default, compared on validation images."""


def optimizer_of(name: str, student: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum 0.9."""
    if name == "Adam":
        return torch.optim.Adam(student.parameters(), lr=lr)
    return torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)


def _step(loss: Loss, student: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss(x, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    student.train()
    return step


def trained(pair: Pair, cell: Cell, device: str) -> nn.Module:
    """The student of a cell: the same initial weights, images and batches for each row of a setting and seed."""
    chosen = cell.settings
    train = pair.pool.subset(datasets.per_class(pair.pool.y, chosen["per_class"], cell.seed)).to(device)
    torch.manual_seed(cell.seed)
    student = pair.student.build().to(device)
    loss = loss_of(cell.row, student, pair.teacher.to(device), train.y, cell.seed)
    optimizer = optimizer_of(chosen["optimizer"], student, chosen["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen["steps"])
    step, generator, done = _step(loss, student, optimizer), torch.Generator().manual_seed(cell.seed), 0
    while done < chosen["steps"]:
        order = torch.randperm(len(train), generator=generator)
        for rows in torch.split(order, _BATCH)[: chosen["steps"] - done]:
            step(train.inputs(rows), train.y[rows.to(train.y.device)])
            schedule.step()
            done += 1
    return student


# Cells


def _cell(setting: Setting, row: str, seed: int, steps: int) -> Cell:
    chosen = {"pair": setting.pair, "per_class": setting.per_class, "optimizer": setting.optimizer}
    return Cell(row, setting.name, seed, {**chosen, "lr": _LR[setting.optimizer], "steps": steps, "batch": _BATCH})


def _cells(request: Request) -> list[Cell]:
    family, steps, cells = request.data.partition(":")[0], _STEPS[request.scale], []
    for seed in request.seed_numbers(_SEEDS):
        for setting in settings_of(request):
            kl, default = STEP_TIMES.get((family, setting.pair), _STEP_TIMES)
            longest = default if jacobians_pay(setting.per_class) else kl
            rows = {
                CROSS_ENTROPY: 1.0,
                PLAIN_KL: 1.0,
                DEFAULT: 1.0,
                EQUAL_TIME[CROSS_ENTROPY]: longest,
                EQUAL_TIME[PLAIN_KL]: longest / kl,
            }
            cells += [_cell(setting, row, seed, round(steps * factor)) for row, factor in rows.items()]
    return cells


def jacobians_pay(per_class: int) -> bool:
    """Whether the default computes derivatives with this number of images per class."""
    net = nn.Linear(1, 1)
    return bool(Distillation(net, nn.Linear(1, 1), samples_per_class=per_class).loss_weights.weights["jacobians"])


def _grid_cells(request: Request) -> list[Cell]:
    """Cross-entropy and all recipes in equal steps, and plain KL in the time of a recipe with Jacobians."""
    family, steps, rows = request.data.partition(":")[0], _STEPS[request.scale], [CROSS_ENTROPY, *RECIPES]
    seeds = range(_GRID_SEED, _GRID_SEED + (request.seeds or 1))
    cells = []
    for setting in settings_of(request):
        kl, jacobians = STEP_TIMES.get((family, setting.pair), _STEP_TIMES)
        chosen = {**dict.fromkeys(rows, steps), EQUAL_TIME[PLAIN_KL]: round(steps * jacobians / kl)}
        cells += [_cell(setting, row, seed, number) for row, number in chosen.items() for seed in seeds]
    return cells


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    pair = _pair(request, cell.settings["pair"])
    student = trained(pair, cell, request.device)
    return {
        "accuracy": evaluate(student, pair.data.test, device=request.device)["accuracy"],
        "validation_accuracy": evaluate(student, pair.validation, device=request.device)["accuracy"],
    }


def _measure_validation(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    pair = _pair(request, cell.settings["pair"])
    student = trained(pair, cell, request.device)
    return {"validation_accuracy": evaluate(student, pair.validation, device=request.device)["accuracy"]}


# Tables


@dataclass(frozen=True)
class Margin:
    """The gain of the default for each seed over the baseline with the higher mean test accuracy."""

    rival: str
    gain: Spread

    @property
    def error(self) -> float:
        """Standard error of the mean gain; 0 for a single seed."""
        return float(self.gain["std"] or 0.0) / math.sqrt(len(self.gain["values"]))

    @property
    def holds(self) -> bool:
        """Whether the default is no worse within two standard errors."""
        return bool(self.gain["mean"] >= -2 * self.error)

    def text(self) -> str:
        """Gain ± standard error in points, with a mark if the criterion is missed."""
        return f"{100 * self.gain['mean']:+.1f} ± {100 * self.error:.1f}{'' if self.holds else ' (missed)'}"


def margin(document: Document, column: str, rivals: Sequence[str]) -> Margin | None:
    """The margin in a column, None where not all rows have been measured with the same seeds."""
    results = spreads(document, "accuracy")
    have = [row for row in rivals if (row, column) in results]
    if not have:
        return None
    best = max(have, key=lambda row: float(results[row, column]["mean"]))
    gain = paired(results.get((DEFAULT, column)), results[best, column])
    return None if gain is None else Margin(best, gain)


_STEPS_RIVALS, _TIME_RIVALS = (CROSS_ENTROPY, PLAIN_KL), tuple(EQUAL_TIME.values())


def _tables(document: Document) -> list[Table]:
    columns, results = names(document, "column"), spreads(document, "accuracy")
    data, facts = document["settings"]["data"], document["facts"]
    teachers = ", ".join(f"{name} {100 * value:.1f} %" for name, value in facts["teachers"].items())
    notes = (
        "Accuracies: mean ± standard deviation over seeds. Gains: difference to cross-entropy or plain KL, whichever "
        "has the higher mean test accuracy; mean ± standard error over seeds. Equal time: these two baselines take "
        "as many steps as fit into the time of the default.",
        f"Teachers on {data}: {teachers}. Time of a step, in steps of cross-entropy, of plain KL and of the default "
        f"with few data, as measured before the run and again in the run: {_step_times(document)}.",
        origin(document),
    )
    body = []
    for column in columns:
        three = [entry(results.get((row, column))) for row in (CROSS_ENTROPY, PLAIN_KL, DEFAULT)]
        both = [margin(document, column, rivals) for rivals in (_STEPS_RIVALS, _TIME_RIVALS)]
        body.append((f"{data}, {column}", *three, *(NOTHING if one is None else one.text() for one in both)))
    head = ("setting", CROSS_ENTROPY, PLAIN_KL, DEFAULT, "gain, equal steps", "gain, equal time")
    return [
        Table("settings", "Test accuracy in %, and gain of the default in points", head, tuple(body), notes),
        Table("accuracy", "Test accuracy in %", ("row", *columns), tuple(grid(document, "accuracy")), notes),
    ]


def _step_times(document: Document) -> str:
    """For each pair the times in `STEP_TIMES`, and those that `prepare` measured."""
    texts = []
    for pair, measured in document["facts"]["step_times"].items():
        chosen = STEP_TIMES.get((document["settings"]["data"], pair), _STEP_TIMES)
        both = (", ".join(f"{value:.2f}" for value in values) for values in (chosen, measured))
        texts.append("{} {} and {}".format(pair, *both))
    return "; ".join(texts)


def _grid_tables(document: Document) -> list[Table]:
    columns = names(document, "column")
    rows = tuple(grid(document, "validation_accuracy"))
    return [Table("grid", "Validation accuracy in %, equal steps", ("recipe", *columns), rows, (origin(document),))]


def _figure(document: Document, measure: str = "accuracy") -> bytes:
    columns, rows = names(document, "column"), names(document, "row")
    panels = []
    for pair in dict.fromkeys(column.partition(",")[0] for column in columns):
        own = [column for column in columns if column.startswith(f"{pair},")]
        panels.append((pair, by_columns(spreads(document, measure), rows, own)))
    sizes = list(dict.fromkeys(column.split(", ")[1].removeprefix("n = ") for column in columns))
    label = "test" if measure == "accuracy" else "validation"
    return line_figure(panels, x_label="images per class", y_label=f"{label} accuracy in %", columns=sizes)


DEFAULTS = Experiment(
    "the default of `Distillation` in a loop of your own, against cross-entropy and plain KL",
    _cells,
    _measure,
    _tables,
    _figure,
    prepare,
    teacher=teachers,
    takes=frozenset({"data", "per_class"}),
)

DEFAULTS_GRID = Experiment(
    "candidates for the default of `Distillation`, on validation images",
    _grid_cells,
    _measure_validation,
    _grid_tables,
    lambda document: _figure(document, "validation_accuracy"),
    prepare,
    teacher=teachers,
    takes=frozenset({"data", "per_class"}),
)
