"""Transfer from a pretrained teacher to another architecture: the paper's rows, and recipes with unlabeled images."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jacmatch.datasets import Split, per_class
from jacmatch.errors import InputError
from jacmatch.jacobian import DataPairs, RandomOutputs, SubspaceInputs
from jacmatch.jobs.networks import Description
from jacmatch.jobs.settings import mixed
from jacmatch.jobs.study import Progress
from jacmatch.jobs.transfer import Ready, Transfer
from jacmatch.jobs.transfer_results import (
    FALL,
    LEARNED,
    METHODS,
    PAPER,
    bound_table,
    distance_table,
    distances,
    loss_falls,
    matched_rows,
    nearest_mean_accuracy,
)
from jacmatch.models import count_parameters
from jacmatch.objectives import AtMixedPairs, Distillation
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, entry
from jacmatch.teachers import Answer, MemoizedTeacher, ModuleTeacher, Question
from jacmatch.training import evaluate, fit
from jacmatch.training.data import augment
from jacmatch_research.figures import by_columns, dot_figure, line_figure
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.reproduce.published import TRANSFER
from jacmatch_research.tables import Document, gains, grid, names, origin, paired, published_row, signed, spreads

Settings = Mapping[str, Any]
FULL = "lwf+attention+jacobians"
ABLATIONS: dict[str, Settings] = {
    "depth: the deepest pair alone": {"method": FULL, "depths": 1},
    "depth: three pairs": {"method": FULL, "depths": 3},
    "pooling: to 2 × 2": {"method": FULL, "pool": 2},
    "pooling: to one pixel": {"method": FULL, "pool": 1},
    "p = 1.5": {"method": FULL, "p": 1.5},
    "p = 4": {"method": FULL, "p": 4.0},
    "Jacobians compared relative": {"method": FULL, "jacobian_loss": "relative"},
}
"""Changes of the last row, which has two pairs, maps of the smaller size of each, p = 2 and the normalized loss."""
LONGER: dict[str, Settings] = {
    f"{METHODS[method]}, 4 × the steps": {"method": method, "longer": 4} for method in ("labels", "lwf", FULL)
}
"""The same methods with four times the steps."""

SMALL_VGG, LARGER_VGG = "vgg:16-M-32-M-64-M-128", "vgg:32-M-64-M-128-M-256"
_LARGER = ", larger student"
_TWICE = f"{METHODS['adapt']}, twice the steps"
_KINDS: dict[str, Settings] = {
    METHODS["mixup"]: {"method": "mixup"},
    "oracle, augmented": {"method": "oracle"},
    "mean teacher": {"method": "mean-teacher"},
    "self-training": {"method": "self-training"},
    "LwF, KL": {"method": "lwf", "recipe": "lwf"},
    "LwF, KL, Jacobians": {"method": "lwf+jacobians", "recipe": "lwf"},
    "LwF, KL, attention": {"method": "lwf+attention", "recipe": "lwf"},
    "LwF, KL, attention + Jacobians": {"method": "lwf+attention+jacobians", "recipe": "lwf", "jacobian_share": 0.1},
    METHODS["features"]: {"method": "features", "recipe": "features"},
    METHODS["features+jacobians"]: {"method": "features+jacobians", "recipe": "features"},
    METHODS["adapt"]: {"method": "adapt"},
    METHODS["adapt+attention"]: {"method": "adapt+attention"},
    "probe, outputs + one row": {"method": "adapt+jacobians"},
    "probe, outputs + one row, share 0.5": {"method": "adapt+jacobians", "jacobian_share": 0.5},
    "probe, outputs + row averaged over noise": {"method": "adapt+jacobians", "probe": "noise-averaged"},
    "probe, outputs + white noise": {"method": "adapt+jacobians", "probe": "random-inputs"},
    "probe, outputs + 48 low frequencies": {"method": "adapt+jacobians", "probe": "subspace-inputs"},
    "probe, outputs + 48 principal components": {
        "method": "adapt+jacobians", "probe": "subspace-inputs", "probe_basis": "pca"
    },
    "probe, outputs + data pairs": {"method": "adapt+jacobians", "probe": "data-pairs"},
    _TWICE: {"method": "adapt", "longer": 2},
    f"{METHODS['mixup']}{_LARGER}": {"method": "mixup", "student": LARGER_VGG},
    f"{METHODS['adapt']}{_LARGER}": {"method": "adapt", "student": LARGER_VGG},
    f"probe, outputs + one row{_LARGER}": {"method": "adapt+jacobians", "student": LARGER_VGG},
    f"{_TWICE}{_LARGER}": {"method": "adapt", "longer": 2, "student": LARGER_VGG},
}  # fmt: skip
_LABELS_ALONE = ("mixup", "oracle")
_WITHOUT = {"LwF, KL", METHODS["features"], METHODS["adapt"], "probe, outputs + one row"}
_MANY = {METHODS["adapt"], _TWICE, "probe, outputs + one row", "probe, outputs + data pairs", "mean teacher"}
_MANY |= {f"{METHODS['adapt']}{_LARGER}", f"{_TWICE}{_LARGER}", f"probe, outputs + one row{_LARGER}"}
UNLABELLED: dict[int, tuple[set[str], Settings]] = {
    0: ({*_WITHOUT, *(row for row, own in _KINDS.items() if own["method"] in _LABELS_ALONE)}, {}),
    900: ({row for row, own in _KINDS.items() if own["method"] not in _LABELS_ALONE}, {}),
    5000: (_MANY, {"views": 2}),
}
"""The rows with a number of unlabeled images, and what they change. With 100 labeled images, 900 in 8 views are 8,000
queries of the teacher, and 5,000 in 2 views are 10,200."""
_PAPER_ROWS = tuple(METHODS[method] for method in PAPER)
RECIPE_ROWS: dict[str, Settings] = {
    (row if settings["method"] in _LABELS_ALONE else f"{row}; {count} unlabelled"): {
        "recipe": "adapt", "unlabelled_count": count, **changes, **settings
    }
    for count, (rows, changes) in UNLABELLED.items()
    for row, settings in _KINDS.items()
    if row in rows
}  # fmt: skip
"""Rows at mixed pairs of augmented images, with a number of unlabeled images of the target."""

_BY_COUNT = (METHODS["mixup"], f"{METHODS['adapt']}; 900 unlabelled", "probe, outputs + one row; 900 unlabelled")

WITHOUT_TEACHER = ("mean-teacher", "self-training")
"""Semi-supervised methods: the gain from unlabeled images without a pretrained teacher."""

_COLUMNS = {"smoke": (5,), "cpu": (5, 10, 25, 50), "paper": (5, 10, 25, 50)}
_ABLATED, _LONGER, _RECIPES = 10, 25, 10  # images per class of ablations, of longer training, and of the recipes
_SEEDS = {"smoke": 1, "cpu": 3, "paper": 5}
_JUDGED, _FAR, _SHOWN = 4000, 100, 50  # test images for accuracy at the size cpu; for the bound; for agreement
_PROBED = 2000  # test images for the accuracy of the probed teacher
_VIEWS = 8  # views of each image in the rows of the recipes: the teacher is queried once for each view
_COSINES: dict[str, Any] = {
    "random rows": RandomOutputs(),
    "low frequencies": SubspaceInputs(48),
    "data pairs": DataPairs(),
}
"""Probes with which every student of a probed teacher is evaluated on new images, independent of its training."""
_SECOND_VIEW = 1  # seed of the views of a mean teacher


class MeanTeacher:
    """The exponential moving average of a student's weights, evaluated at a second random view of the images.

    Each query is a step of the average.

    References:
        Tarvainen & Valpola 2017, arXiv:1703.01780; at mixed pairs as in Verma et al. 2019, arXiv:1903.03825.
    """

    answers_vjp = False

    def __init__(self, student: nn.Module, augment: tuple[str, ...], decay: float = 0.99) -> None:
        """Initialize from a student, the augmentations of the second view, and the decay of the average."""
        mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.student, self.augment = student, augment
        self.average = AveragedModel(student, multi_avg_fn=mean, use_buffers=True).eval().requires_grad_(False)

    def answer(self, x: Tensor, question: Question | None = None) -> Answer:
        """Return the outputs of the average at other views of the images."""
        about = question or Question()
        ids = torch.arange(len(x)) if about.ids is None else about.ids
        self.average.update_parameters(self.student)
        with torch.no_grad():
            outputs = self.average.eval()(augment(x, ids, about.draw or 0, _SECOND_VIEW, self.augment))
        return Answer(outputs, outputs)


def _own(request: Request) -> dict[str, Any]:
    """Return the networks and the schedule of a size."""
    if not request.teacher and request.data.partition(":")[0] in ("digits", "fashion-mnist"):
        if request.data == "digits":
            return {"teacher": "cnn5", "student": "cnn3", "steps": 200, "oracle_steps": 60}
        return {"teacher": "vgg:16-M-32-M-64-M-64", "student": "vgg:8-M-16-M-32", "steps": 400, "oracle_steps": 60}
    if not request.teacher or (request.teacher_weights is None and not Path(request.teacher).is_dir()):
        rule = "`reproduce transfer` must be given a pretrained teacher for such data."
        do = "Give --teacher torchvision:mobilenet_v2 --teacher-weights FILE.safetensors, or the folder of a run."
        raise InputError(rule, got=f"--data {request.data}, --teacher {request.teacher or 'none'}", do=do)
    shared = {"teacher": request.teacher, "teacher_weights": request.teacher_weights}
    size = None if request.teacher_weights is None else 224 if request.scale == "paper" else 96
    if request.scale == "paper":
        return {**shared, "student": "vgg9", "steps": 4000, "oracle_steps": 1000, "teacher_size": size}
    return {**shared, "student": SMALL_VGG, "steps": 750, "oracle_steps": 100, "teacher_size": size}


def _recipe(request: Request, settings: Settings) -> Transfer:
    """The settings of `jacmatch transfer` for one cell."""
    chosen = {name: value for name, value in settings.items() if name not in ("method", "longer")}
    own: dict[str, Any] = {"lr": 2e-3, "batch_size": 50, **_own(request)}
    if "recipe" in settings:
        own["augment"] = () if request.data == "digits" else ("crop", "flip")
        own |= {"views": _VIEWS, "batch_size": 64, "warmup": 50, "optimizer": "adamw"}
        own |= {"lr": 1e-2, "outputs_share": 0.7, "jacobian_share": 0.2, "every": 8}
        chosen["unlabelled"] = request.data if settings["unlabelled_count"] else None
        own["views"] *= 1 if settings["unlabelled_count"] else 5  # as many views as there are steps to show them
    else:
        chosen["recipe"] = "paper"
    own["steps"] *= settings.get("longer", 1)
    return Transfer(
        data=request.data,
        seed=request.seed,
        device=request.device,
        smoke=request.smoke,
        validation=0.0,
        **own | chosen,
    )


_KNOWN: dict[object, dict[str, Any]] = {}  # memories and adapted teachers: several rows query the same images
_READY: dict[object, Ready] = {}  # the last one: a process works on one request


def _ready(request: Request, recipe: Transfer, progress: Progress | None = None) -> Ready:
    """Target, teacher and the pairs of a cell; data and teacher are loaded once in a process."""
    key = (request.data, request.seed, request.scale, request.teacher, request.teacher_weights, request.device)
    if key not in _READY:
        forget()
        _READY[key] = recipe.ready(progress or Progress(quiet=True))
        if request.scale == "cpu":
            data = _READY[key].data
            some = data.test.subset(torch.arange(min(_JUDGED, len(data.test))))
            _READY[key] = replace(_READY[key], data=replace(data, test=some))
    ready = replace(_READY[key], description=Description.of(recipe.student, _READY[key].data))
    return replace(ready, pairs=recipe.layers(ready))


def forget() -> None:
    """Clear what this process has loaded, because files of the same names may have changed."""
    _READY.clear()
    _KNOWN.clear()


def _cells(request: Request) -> list[Cell]:
    """Return the cells, seed by seed, so that an interrupted run has a table with fewer seeds."""
    _own(request)
    columns = request.per_class or _COLUMNS[request.scale]
    seeds = request.seed_numbers(_SEEDS[request.scale])
    main = {METHODS[method]: {"method": method} for method in PAPER}
    ablated = columns[0] if _ABLATED not in columns else _ABLATED
    cells = []
    for seed in seeds:
        for column in columns:
            rows = {**main, **(ABLATIONS if column == ablated else {}), **(LONGER if column == _LONGER else {})}
            recipes = request.rows or column == (_RECIPES if _RECIPES in columns else columns[0])
            without = {"views", "student"} if request.data == "digits" else set()  # few images of 8 × 8 pixels
            rows |= {row: each for row, each in RECIPE_ROWS.items() if recipes and not without & set(each)}
            cells += [
                Cell(row, str(column) if column else "all", seed, {**settings, "per_class": column})
                for row, settings in rows.items()
            ]
    return cells


def _prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """Teacher and student, nearest-mean accuracy of the teacher's outputs, and distances by images per class."""
    recipe = _recipe(request, {})
    ready = _ready(request, recipe, progress)
    student, teacher = ready.student(), ready.teacher
    some = ready.data.test.subset(torch.arange(min(500, len(ready.data.test))))
    facts: dict[str, Any] = {
        "teacher": {
            "model": teacher.description.spec,
            "outputs": teacher.description.outputs,
            "size": teacher.description.shape[-1],
            "parameters": count_parameters(teacher.network),
        },
        "student": {"model": recipe.student, "parameters": count_parameters(student)},
        "pairs": [list(pair) for pair in ready.pairs],
        "judged": len(ready.data.test),
        "steps": recipe.steps,
        "oracle_steps": recipe.oracle_steps,
        "nearest_mean": {},
        "distances": {},
    }
    for column in request.per_class or _COLUMNS[request.scale]:
        train = _subset(ready, column, request.seed)
        near, far = recipe.images(ready, train, _FAR)
        results = {"unseen": distances(teacher.network, ready.pairs[-1][1], near, far)}
        if teacher.source is not None:
            source = mixed(teacher.source.train, len(far)).inputs()
            results["source"] = distances(teacher.network, ready.pairs[-1][1], near, source)
        facts["distances"][str(column)] = results
        facts["nearest_mean"][str(column)] = nearest_mean_accuracy(teacher.network, train, some, ready.classes)
    return facts


def _teacher(request: Request) -> nn.Module:
    return _ready(request, _recipe(request, {})).teacher.network


def _subset(ready: Ready, column: int, seed: int) -> Any:
    train = ready.data.train
    return train.subset(per_class(train.y, column, seed)) if column else train


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Train and evaluate one network."""
    recipe = _recipe(request, cell.settings)
    ready = _ready(request, recipe)
    method = cell.settings["method"]
    column = cell.settings["per_class"]
    labelled = _subset(ready, column, cell.seed)
    images = recipe.unlabelled_images(ready, labelled, cell.seed)
    if method in WITHOUT_TEACHER:
        return _without_teacher(request, recipe, ready, cell, labelled, images)
    group = (column, recipe.unlabelled_count, recipe.views)  # cells of one group and seed see the same images
    ready = replace(ready, **_KNOWN.setdefault(group, {"memories": {}, "adapted": {}}))
    for other in set(_KNOWN) - {group}:
        del _KNOWN[other]
    ready = recipe.taught(method, ready, labelled, images, cell.seed)
    network, objective = recipe.network_and_objective(method, cell.seed, ready)
    train, settings = recipe.training_images(method, labelled, images), recipe.training_of(method, cell.seed)
    curve: list[dict[str, float]] = []

    def note(step: int, row: dict[str, float]) -> None:
        factors = objective.loss_weights.factors  # that of a share changes: terms are compared without it
        known = [term for term in ("labels", "outputs") if row.get(term) and factors.get(term)]
        terms = {term: row[term] / factors[term] for term in known}
        curve.append({**row, **terms, "step": step})

    fitted = fit(objective, train, settings, seed=cell.seed, device=request.device, on_step=note)
    late, whole = loss_falls(curve, fitted.steps) or (None, None)
    accuracy = evaluate(objective.student, ready.data.test, device=request.device)["accuracy"]
    judged = recipe.judged(method, network, ready, labelled, objective, some=_SHOWN, far=_FAR)
    some = ready.data.test.subset(torch.arange(min(_PROBED, len(ready.data.test))))
    adapted = method.startswith("adapt") and isinstance(objective, Distillation)
    probe = evaluate(ready.teacher.network, some, device=request.device) if method == "adapt" else {}
    shown = ready.data.test.subset(torch.arange(min(_SHOWN, len(ready.data.test))))
    same = {name: matched_rows(objective, shown, each) for name, each in _COSINES.items()} if adapted else {}
    return {
        "accuracy": accuracy,
        "probe_accuracy": probe.get("accuracy"),
        **{f"cosine {name}": each["jacobian_cosine"] for name, each in same.items()},
        **judged["agreement"],
        **(judged["bound"] or {}),
        "late_fall": late,
        "whole_fall": whole,
        "steps": fitted.steps,
        "train_seconds": fitted.seconds,
    }


def _without_teacher(
    request: Request, recipe: Transfer, ready: Ready, cell: Cell, labelled: Split, images: Split | None
) -> Measures:
    """Train a student with unlabeled images by a semi-supervised method, and evaluate it."""
    train, seed = recipe.training_images("adapt", labelled, images), cell.seed
    settings = replace(recipe.training_of("mixup", seed), doctor=False)  # a mean teacher moves with each query
    network, objective = recipe.network_and_objective("mixup", seed, ready)
    if cell.settings["method"] == "mean-teacher":
        weight = len(train) / len(labelled)  # the term is a mean over all images, with 0 where there is no label
        loss: dict[str, Any] = {"jacobians": 0.0, "output_loss": "kl", "temperature": 1.0, "point": AtMixedPairs()}
        objective = Distillation(network, MeanTeacher(network, recipe.augment), labels=weight, outputs=1.0, **loss)
    else:
        fit(objective, labelled, settings, seed=seed, device=request.device)
        teacher = MemoizedTeacher(ModuleTeacher(network.eval().requires_grad_(False)), draws=True)
        torch.manual_seed(seed)
        objective = recipe.objective("adapt", ready.student(0), replace(ready, answers=teacher))
    fitted = fit(objective, train, settings, seed=seed, device=request.device)
    accuracy = evaluate(objective.student, ready.data.test, device=request.device)["accuracy"]
    return {"accuracy": accuracy, "steps": fitted.steps, "train_seconds": fitted.seconds}


def _tables(document: Document) -> list[Table]:
    facts = document["facts"]
    sets = {f"n = {column}: ": results for column, results in facts["distances"].items()}
    apart = [(label + row[0], *row[1:]) for label, results in sets.items() for row in distance_table(results).rows]
    distances = replace(distance_table({}), rows=tuple(apart), notes=(f"Euclidean, at most {_FAR} images a set.",))
    return [*_paper(document), *_recipes(document), *_by_count(document), *_cosines(document), distances]


def _paper(document: Document) -> list[Table]:
    """The paper's rows and the tables that explain them; empty where none was measured."""
    columns = names(document, "column")
    rows = [row for row in names(document, "row") if row in _PAPER_ROWS]
    if not rows:
        return []
    lwf, full = METHODS["lwf"], METHODS[FULL]
    pairs = [
        (METHODS["lwf+jacobians"], lwf), (full, METHODS["lwf+attention"]), (full, lwf), (lwf, METHODS["labels"])
    ]  # fmt: skip
    differences = [gains(document, *pair) for pair in pairs if set(pair) <= set(rows)]
    called = {**METHODS, "oracle": "pretrained student fine-tuned (oracle)"}
    printed = [published_row(f"paper: {called[row]}", values, columns) for row, values in TRANSFER.items()]
    title = "Test accuracy in % by images per class"
    return [
        Table("accuracy", title, ("row", *columns), (*grid(document, "accuracy", rows=rows), *differences, *printed),
              (_difference(document), origin(document))),
        *_changes(document, ABLATIONS, "ablations", "Depth, pooling and p", (METHODS["lwf"], METHODS[FULL])),
        *_changes(document, LONGER, "longer", "Longer training", _PAPER_ROWS),
        _teacher_distance(document, rows),
        _bounds(document, rows),
    ]  # fmt: skip


def _difference(document: Document) -> str:
    """Return a description of the setting, and its differences from the paper."""
    facts = document["facts"]
    teacher, student = facts["teacher"], facts["student"]
    pairs = ", ".join(" : ".join(pair) for pair in facts["pairs"]).replace("network.", "")
    known = ", ".join(f"{100 * value:.1f} at {column}" for column, value in facts["nearest_mean"].items())
    return (
        f"Teacher {teacher['model']} with {teacher['outputs']} outputs at {teacher['size']} pixels, student "
        f"{student['model']} with {student['parameters']:,} parameters, {facts['steps']} steps with batches of 50, no "
        f"augmentation, evaluated on {facts['judged']} test images. Nearest class mean of the teacher's outputs, in "
        f"%: {known}. Layers (student : teacher): {pairs}. Oracle: the teacher itself with a new last layer, "
        f"fine-tuned in {facts['oracle_steps']} steps (the paper's is a pretrained student). The paper: ImageNet → "
        "MIT Indoor Scenes (67 classes), ResNet teacher → VGG-9 of full width; other data, so its numbers cannot be "
        "compared with these. It does not give layers, pooling, weights, schedule and seeds, and its values at 5 and "
        "10 images per class are not confirmed."
    )


def _changes(
    document: Document, changes: Mapping[str, Settings], name: str, title: str, beside: tuple[str, ...]
) -> list[Table]:
    """Rows in which one setting is changed, and the rows of the main table with which they are compared."""
    results = spreads(document, "accuracy")
    changed = [row for row in names(document, "row") if row in changes]
    if not changed:
        return []
    column = next(column for row, column in results if row in changes)
    rows = [row for row in (*beside, *changed) if (row, column) in results]
    measures = {"accuracy": (100, 1), "top1": (100, 1), "attention_cosine": (1, 2), "jacobian_cosine": (1, 2)}
    values = {measure: spreads(document, measure) for measure in measures}
    body = [(row, *(entry(values[key].get((row, column)), *measures[key]) for key in measures)) for row in rows]
    note = f"Each row changes one setting. Cosines are those of the maps that the row compares. {_few(document)}"
    head = ("row", "accuracy %", "agreement %", "cosine of maps", "cosine of gradients")
    return [Table(name, f"{title}, {column} images per class", head, tuple(body), (note,))]


def _recipes(document: Document) -> list[Table]:
    """Recipes at mixed pairs: accuracy, gain over labels alone at mixed pairs, and cosine of what is compared."""
    forms = {"accuracy": (100, 1), "probe_accuracy": (100, 1), "top1": (100, 1)}
    forms |= {"jacobian_cosine": (1, 3), "jacobian_relative_error": (1, 2)}
    values = {name: spreads(document, name) for name in forms}
    falls: list[Any] = [spreads(document, name) for name in ("late_fall", "whole_fall")]
    keys = [key for key in values["accuracy"] if key[0] in RECIPE_ROWS]
    columns = [column for column in names(document, "column") if column in {key[1] for key in keys}]
    if not keys:
        return []
    body = []
    for column in columns:
        for row in names(document, "row"):
            if (row, column) not in keys:
                continue
            labels = METHODS["mixup"] + _LARGER * (_LARGER in row)
            own, alone = values["accuracy"][row, column], values["accuracy"].get((labels, column))
            accuracy, *others = (entry(values[name].get((row, column)), *form) for name, form in forms.items())
            label = row if len(columns) == 1 else f"n = {column}: {row}"
            gain = signed(paired(own, alone)) if row != labels else NOTHING
            fell = [each.get((row, column), {}).get("mean") for each in falls]
            converged = NOTHING if None in fell else "yes" if fell[0] <= FALL and fell[1] >= LEARNED else "no"
            body.append((label, accuracy, gain, str(len(own["seeds"])), *others, converged))
    shown = ("probed teacher %", "agreement %", "cosine", "relative error", "converged")
    head = ("row", "accuracy %", "gain", "seeds", *shown)
    facts = document["facts"]
    teacher, student = facts["teacher"], facts["student"]["model"]
    shown_rows = " ".join(row for row, _ in keys)
    many = ", 2 with 5000 unlabeled images" if "5000" in shown_rows else ""
    larger = f"Larger student: {LARGER_VGG}. " if _LARGER in shown_rows else ""
    note = (
        f"Teacher {teacher['model']} at {teacher['size']} pixels, student {student}, {facts['steps']} steps with "
        f"batches of 64, evaluated on {facts['judged']} test images, {', '.join(columns)} labeled images per "
        f"class; the teacher sees each image in {_VIEWS} views{many}. {larger}Gain: over labels at mixed pairs "
        "with the same seeds and student. Cosine and relative error: on new images, of the products that the row "
        f"compares; if it compares none, of one random row. {_few(document)} Converged: in the last fifth of the "
        f"steps the sum of labels and outputs, without weights, is at most {FALL:.0%} below that of 50 to 70 %, and "
        f"at least {LEARNED:.0%} below the first."
    )
    return [Table("recipes", "Recipes with unlabeled images", head, tuple(body), (note, origin(document)))]


def _by_count(document: Document) -> list[Table]:
    """Labels, probe and one row by number of labeled images; empty with fewer than two numbers."""
    accuracy, probed = spreads(document, "accuracy"), spreads(document, "probe_accuracy")
    labels, adapted, one_row = _BY_COUNT
    columns = [column for column in names(document, "column") if all((row, column) in accuracy for row in _BY_COUNT)]
    if len(columns) < 2:
        return []
    body = []
    for column in columns:
        alone, taught, matched = (accuracy[row, column] for row in _BY_COUNT)
        seeds = min(len(each["seeds"]) for each in (alone, taught, matched))
        values = entry(alone), entry(taught), signed(paired(taught, alone)), entry(probed.get((adapted, column)))
        body.append((column, *values, signed(paired(matched, taught)), str(seeds)))
    head = ("labels per class", "labels alone", "probe's outputs", "gain", "probed teacher", "one row adds", "seeds")
    note = f"Accuracy in %. Labels alone: {labels}. Probe's outputs: {adapted}. One row adds: {one_row}, seed by seed."
    title = "Gain by number of labeled images per class, 900 unlabeled images"
    return [Table("by-count", title, head, tuple(body), (note, origin(document)))]


def _teacher_distance(document: Document, rows: list[str]) -> Table:
    """Agreement and cosines on unseen images."""
    measures = {"top1": (100, 1), "attention_cosine": (1, 2), "jacobian_cosine": (1, 2)}
    values = {name: spreads(document, name) for name in measures}
    body = [
        (f"n = {column}: {row}", *(entry(values[name].get((row, column)), *measures[name]) for name in measures))
        for column in names(document, "column")
        for row in rows
        if row != METHODS["oracle"]
    ]
    head = ("n and row", "agreement %", "cosine of maps", "cosine of gradients")
    note = f"The second head's largest output, the attention maps, their largest pixels. {_few(document)}"
    return Table("closeness", "Agreement of the student with the teacher", head, tuple(body), (note,))


def _few(document: Document) -> str:
    """Return a note on the number of images for agreement and cosines."""
    count = min(16 if document["settings"]["smoke"] else _SHOWN, document["facts"]["judged"])
    return f"Agreement and cosines: on {count} unseen images, so one image is {100 / count:.3g} points of agreement."


def _bounds(document: Document, rows: list[str]) -> Table:
    """The bound of each row and column that has one."""
    keys = ("rho_unseen", "rho_average", "rho_largest", "slope", "by_hausdorff", "by_nearest", "by_transport")
    values = {key: spreads(document, key) for key in keys}
    bounds = {
        f"n = {column}: {row}": {key: values[key][row, column] for key in keys}
        for column in names(document, "column")
        for row in rows
        if (row, column) in values["slope"]
    }
    table = bound_table(bounds, "squared")
    return replace(table, head=("n and row", *table.head[1:]), rows=table.rows or ((NOTHING,) * len(table.head),))


def _figure(document: Document) -> bytes:
    columns, data = names(document, "column"), document["settings"]["data"]
    if not (rows := [row for row in names(document, "row") if row in _PAPER_ROWS]):
        measured = [cell["column"] for cell in document["cells"]]
        return _cosine_figure(document, max(columns, key=measured.count), data)
    lines = by_columns(spreads(document, "accuracy"), rows, columns)
    return line_figure([(data, lines)], x_label="images per class", y_label="test accuracy in %", columns=columns)


def _cosine_figure(document: Document, column: str, data: str) -> bytes:
    """Cosine of the products that each row compares, on new images; of a random row without a Jacobian term."""
    known = {row: value for (row, at), value in spreads(document, "jacobian_cosine").items() if at == column}
    rows = [(row, known[row]["mean"], known[row]["std"]) for row in names(document, "row") if row in known]
    return dot_figure(rows, title=f"{data}, {column} labeled images per class", x_label="cosine on new images")


def _cosines(document: Document) -> list[Table]:
    """Cosines of all students of a probed teacher along the same three kinds of directions."""
    values = {name: spreads(document, f"cosine {name}") for name in _COSINES}
    keys = list(dict.fromkeys(key for each in values.values() for key in each))
    if not keys:
        return []
    body = [(row, column, *(entry(each.get((row, column)), 1, 3) for each in values.values())) for row, column in keys]
    title = "Cosine with the probed teacher's Jacobian on new images, by kind of direction"
    return [Table("cosines", title, ("row", "n", *values), tuple(body), (_few(document), origin(document)))]


TRANSFER_TABLE = Experiment(
    about="pretrained teacher → another architecture, 5 to 50 images per class, six rows, ablations (section 2.3)",
    cells=_cells,
    measure=_measure,
    tables=_tables,
    figure=_figure,
    prepare=_prepare,
    teacher=_teacher,
    takes=frozenset({"data", "per_class", "teacher", "teacher_weights"}),
)
