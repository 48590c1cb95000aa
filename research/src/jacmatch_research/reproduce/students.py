"""Parts shared by the experiments on distillation: networks of each size, the teacher, a student and its evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jacmatch import datasets
from jacmatch.datasets import Data, Split
from jacmatch.errors import InputError
from jacmatch.jacobian import ESTIMATORS
from jacmatch.jobs import networks
from jacmatch.jobs.distill import Distill, DistillationFields
from jacmatch.jobs.settings import TrainingFields, load, parts
from jacmatch.jobs.study import Progress
from jacmatch.jobs.teachers import prepare as prepare_teacher
from jacmatch.jobs.train import Train
from jacmatch.models import count_parameters
from jacmatch.report import Table
from jacmatch.teachers import MemoizedTeacher, ModuleTeacher, Teacher
from jacmatch.training import agreement, calibration, evaluate, fit, shifted
from jacmatch.training.state import channels_last
from jacmatch_research.figures import by_columns, line_figure
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.tables import Document, names, spreads

STUDENTS = frozenset({"data", "per_class", "teacher", "teacher_weights", "student"})
"""Fields of experiments whose students learn from a teacher, by images per class."""
VALIDATION = 0.1
"""Fraction of the training images that is held out for all selections, the same for every seed."""
QUARTER_VGG9 = "vgg:16-M-32-M-64-64-M-128-128-M-128-128-M"
QUARTER_VGG4, HALF_VGG4 = "vgg:16-M-32-M-128-M", "vgg:32-M-64-M-256-M"
_JUDGED, _FOR_JACOBIANS = 1000, 64  # test images for agreement, calibration and noise; for Jacobians
_NOISE = 0.2  # standard deviation, in units of normalized inputs


@dataclass(frozen=True)
class Scale:
    """The networks of a size, by name, and the settings of the teacher's training."""

    teacher: str
    student: str
    training: Mapping[str, Any] = field(default_factory=dict)


def scale_of(request: Request) -> Scale:
    """The networks for a request: VGG-9 → VGG-4 for images, small networks for the digits."""
    own = _own_scale(request)
    return replace(own, teacher=request.teacher or own.teacher, student=request.student or own.student)


def _own_scale(request: Request) -> Scale:
    if request.data.partition(":")[0] in {"digits", "synthetic"}:
        return Scale("cnn5", "cnn3", {"steps": 60 if request.smoke else 600})
    crop_flip = {"augment": ("crop", "flip"), "precision": "bf16", "validate_every": 500}
    if request.scale == "paper":
        return Scale("vgg9", "vgg4", {**crop_flip, "steps": 40_000, "lr": 1e-3})
    steps = 4000 if request.data.startswith("fashion-mnist") else 7000
    # Six rows by eight columns are many students, so they are narrow; little data means few, so they can be wider.
    student = QUARTER_VGG4 if request.name == "distillation" else HALF_VGG4
    return Scale(QUARTER_VGG9, student, {**crop_flip, "steps": steps, "lr": 3e-3})


@lru_cache(maxsize=1)
def data_of(spec: str, seed: int, smoke: bool) -> Data:
    """Return the data set, loaded once in a process."""
    return load(spec, seed, smoke)


@dataclass(frozen=True)
class World:
    """Parts that all students of a run share: training and held-out images, architecture, and the teacher."""

    data: Data
    pool: Split
    validation: Split
    description: networks.Description
    teacher: nn.Module

    def subset(self, per_class: int, seed: int) -> Split:
        """Return this number of training images of each class, 0 for all."""
        return self.pool.subset(datasets.per_class(self.pool.y, per_class, seed)) if per_class else self.pool


_WORLD: dict[object, World] = {}  # the last one that was requested


def world_of(request: Request, progress: Progress | None = None) -> World:
    """Data, teacher and student of a request; a teacher without weights is trained first and cached."""
    scale = scale_of(request)
    made = (scale.teacher, request.teacher_weights, scale.student)
    key = (request.data, request.seed, request.scale, request.device, *made)
    if key not in _WORLD:
        data = data_of(request.data, request.seed, request.smoke)
        pool, validation = parts(data, VALIDATION, 0, request.seed)
        assert validation is not None
        shared: dict[str, Any] = {"seed": request.seed, "device": request.device, "smoke": request.smoke}
        shared |= {"validation": VALIDATION, "batch_size": 128, **scale.training}
        recipe = Train(data=request.data, model=scale.teacher, **shared)
        weights = networks.Weights(request.teacher_weights) if request.teacher_weights else None
        quiet = Progress(quiet=True)
        teacher = prepare_teacher(
            scale.teacher, data, weights, recipe, progress or quiet, allow_code=request.allow_code
        )
        description = networks.Description.of(scale.student, data)
        _WORLD.clear()
        _WORLD[key] = World(data, pool, validation, description, channels_last(teacher.network))
    return _WORLD[key]


def teacher_of(request: Request) -> nn.Module:
    """The teacher of a request."""
    return world_of(request).teacher


def forget() -> None:
    """Clear what this process has loaded, because files of the same names may have changed."""
    data_of.cache_clear()
    _WORLD.clear()


def prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """Accuracy of the teacher, which is trained if necessary, and the size of both networks."""
    world = world_of(request, progress)
    accuracy = evaluate(world.teacher, world.data.test, device=request.device)
    validation_points = evaluate(world.teacher, world.validation, device=request.device)["accuracy"]
    student = world.description.build()
    scale = scale_of(request)
    return {
        "teacher": {
            "model": Path(scale.teacher).name,
            **accuracy,
            "validation_accuracy": validation_points,
            "parameters": count_parameters(world.teacher),
        },
        "student": {"model": scale.student, "parameters": count_parameters(student)},
        "forward_ratio": forward_ratio(request),
    }


def forward_ratio(request: Request) -> float:
    """Return the operations of the teacher's forward pass ÷ those of the student's; no weights are loaded."""
    data = data_of(request.data, request.seed, request.smoke)
    teacher, student = scale_of(request).teacher, scale_of(request).student
    if networks.is_run(teacher):
        description = networks.describe(Path(teacher), allow_code=request.allow_code)
    else:
        description = networks.Description.of(teacher, data)
    return operations(description.build(), data) / operations(networks.Description.of(student, data).build(), data)


def operations(network: nn.Module, data: Data) -> int:
    """Floating-point operations of a forward pass on one sample, as torch's own counter counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *data.shape, device=next(network.parameters()).device))
    return int(counter.get_total_flops())


def settings_of(request: Request, per_class: int, **named: Any) -> dict[str, Any]:
    """The settings of a cell: the given ones, and every other field of `DistillationFields` with its resolved default.

    A cell therefore contains all settings that affect it, even if the defaults of `jacmatch distill` change later.
    """
    data = data_of(request.data, request.seed, request.smoke)
    recipe = Distill(**{name: value for name, value in named.items() if name != "method"})
    known = {item.name: getattr(recipe, item.name) for item in fields(DistillationFields)}
    own = {name: known[name] for name in known if name not in TrainingFields.__dataclass_fields__}
    number = per_class or round((1 - VALIDATION) * len(data.train) / (data.classes or 1))
    return {**own, **recipe.resolved(number), **named, "per_class": per_class}


def cells_of(
    request: Request, rows: Mapping[str, Mapping[str, Any]], per_class: Sequence[int], seeds: int, **shared: Any
) -> list[Cell]:
    """A cell for each number of images per class, row and seed, with the settings of all rows and of its own."""
    return [
        Cell(row, column_of(n), seed, settings_of(request, n, **{**shared, **settings}))
        for n in per_class_of(request, per_class)
        for row, settings in rows.items()
        for seed in request.seed_numbers(seeds)
    ]


def still(settings: Mapping[str, Any]) -> bool:
    """Whether the query about an image is the same in every step, so that one query is enough."""
    if settings["point"] != "data" or settings.get("augment"):
        return False
    return settings["method"] == "outputs" or settings["probe"] in {"every-row", "top-class", "label-class"}


def cost(settings: Mapping[str, Any], outputs: int, forward_ratio: float) -> float:
    """Cost of a step in forward passes of the student, for each sample of the batch.

    A backward pass to the parameters counts as two forward passes, and one to the input as one. Labels cost 3. The
    teacher's outputs cost r more, where r is the cost of the teacher's forward pass. Each product (a vᵀJ, a Jv, or two
    values of a pair) takes another differentiated pass through both networks, which costs 3 + r. A teacher that is
    queried only once costs 0.
    """
    if settings["method"] == "labels":
        return 3.0
    passes = 0.0
    if settings["method"] == "jacobians":
        single = {"every-row", "top-class", "label-class", "data-pairs"}
        count = {} if settings["probe"] in single else {"count": settings["probes"]}
        own: dict[str, Any] = {name: {"sigma": 1.0} for name in ("antithetic-noise", "noise-averaged")}
        own |= {"subspace-inputs": {"k": 1}}
        passes = sum(astuple(ESTIMATORS[settings["probe"]](**count, **own.get(settings["probe"], {})).passes(outputs)))
        passes *= settings.get("fraction", 1.0) / settings["every"]
    return float((1 + passes) * (3 if still(settings) else 3 + forward_ratio))


def recipe_of(request: Request, world: World, seed: int, settings: Mapping[str, Any]) -> tuple[Distill, str]:
    """Return the job of `jacmatch distill` with the settings of a cell, and its method."""
    named = {name: value for name, value in settings.items() if name not in {"method", "per_class"}}
    spec = world.description.spec
    return Distill(data=request.data, student=spec, smoke=request.smoke, seed=seed, **named), settings["method"]


def measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Train and evaluate the student of a cell; the settings are those of `jacmatch distill` with one method."""
    world = world_of(request)
    recipe, method = recipe_of(request, world, cell.seed, cell.settings)
    train = world.subset(cell.settings["per_class"], cell.seed)
    torch.manual_seed(cell.seed)
    student = channels_last(world.description.build())
    teacher: Teacher = ModuleTeacher(world.teacher)
    if still(cell.settings):
        teacher = MemoizedTeacher(teacher)
    objective = recipe.objective(method, student, teacher, train, world.data, cell.seed)
    training = recipe.training(doctor=cell.seed == 0)  # the other seeds have the same objective
    fitted = fit(objective, train, training, seed=cell.seed, device=request.device)
    return {**judged(student, world, request.device), "steps": float(fitted.steps), "train_seconds": fitted.seconds}


def judged(student: nn.Module, world: World, device: str) -> Measures:
    """Accuracy, agreement with the teacher in values and derivatives, calibration, and accuracy under noise.

    The accuracy is measured on all images of the split. The other measures use 1,000 test images (Jacobians 64), the
    same for every student. Noise is Gaussian, with a standard deviation of 0.2 of that of the data.
    """
    some = sample(world.data.test)
    noisy = shifted(some, "gaussian-noise", _NOISE, scale=world.data.std)
    close = agreement(student, ModuleTeacher(world.teacher), some, samples=min(_FOR_JACOBIANS, len(some)))
    return {
        "accuracy": evaluate(student, world.data.test, device=device)["accuracy"],
        "validation_accuracy": evaluate(student, world.validation, device=device)["accuracy"],
        **close,
        "calibration_error": calibration(student, some, device=device),
        "noisy_accuracy": evaluate(student, noisy, device=device)["accuracy"],
    }


def sample(split: Split) -> Split:
    """At most 1,000 images, drawn once for a part of a given length: a folder has its images ordered by class."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.subset(order[:_JUDGED])


def per_class_of(request: Request, default: Sequence[int]) -> tuple[int, ...]:
    """Numbers of images per class, 0 for all: as requested, or the default ones that the data can fill.

    Raises:
        InputError: The data have no classes, or too few images of a class.
    """
    data = data_of(request.data, request.seed, request.smoke)
    if data.classes is None:
        rule = f"`--data` of `reproduce {request.name}` must have classes."
        raise InputError(rule, got=f"a regression, {data.name}")
    pool, _ = parts(data, VALIDATION, 0, request.seed)
    least = int(pool.y.bincount().min())
    for number in request.per_class:
        if not 0 <= number <= least:
            rule = f"`--per-class` of `reproduce` must be 0 for all images, or at most {least} with these data."
            raise InputError(rule, got=number)
    if request.per_class:
        return tuple(dict.fromkeys(request.per_class))
    return tuple(number for number in default if number <= least)


def column_of(per_class: int) -> str:
    """The name of a column: images per class, or `all`."""
    return str(per_class) if per_class else "all"


def columns_figure(document: Document) -> bytes:
    """Test accuracy over images per class as an SVG file, a line for each row."""
    columns = sorted(names(document, "column"), key=lambda column: float("inf") if column == "all" else int(column))
    return line_figure(
        [(document["settings"]["data"], by_columns(spreads(document, "accuracy"), names(document, "row"), columns))],
        x_label="images per class",
        y_label="test accuracy in %",
        columns=columns,
    )


def experiment(
    about: str,
    cells: Callable[[Request], list[Cell]],
    tables: Callable[[Document], list[Table]],
    figure: Callable[[Document], bytes] = columns_figure,
    prepare: Callable[[Request, Progress], dict[str, Any]] = prepare,
) -> Experiment:
    """An experiment whose students learn from a teacher, by images per class."""
    return Experiment(about, cells, measure, tables, figure, prepare, teacher_of, STUDENTS)
