"""Section 2.2 of the paper: the Jacobian-norm penalty under input noise, and noise in training."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.robust import UNSEEN, Robust, Variant
from jacmatch.jobs.settings import parts
from jacmatch.jobs.study import Progress
from jacmatch.models import count_parameters
from jacmatch.report import Table
from jacmatch.report.tables import Spread, entry
from jacmatch.runs import spread
from jacmatch.training import evaluate, evaluate_under_shifts, fit
from jacmatch.training.state import channels_last
from jacmatch_research.figures import Line, line_figure
from jacmatch_research.reproduce import students
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.tables import Document, names, origin, spreads

LEVELS = (0.1, 0.2, 0.3, 0.4)
"""Standard deviations of the noise, in units of normalized inputs."""
PUBLISHED: dict[str, tuple[float, ...]] = {
    "λ = 0": (64.78, 61.9, 47.53, 29.63, 17.69),
    "λ = 0.01": (64.67, 61.85, 49.47, 32.24, 19.63),
    "λ = 0.1": (65.62, 63.36, 53.57, 37.38, 23.99),
    "λ = 0.5": (64.26, 62.85, 56.57, 44.99, 31.97),
    "λ = 1": (63.59, 62.66, 57.53, 47.48, 35.43),
}
"""Accuracy in % without noise and at `LEVELS`, VGG-9 on CIFAR-100: "Local Affine Approximators", NIPS 2017 LLD, table
3. Single networks; the authors' ± (at most 0.3) is there with noise only, so presumably over its draws."""

_TWICE = "twice the steps"
ROWS: dict[str, Mapping[str, Any]] = {
    "λ = 0": {},
    "λ = 0.001": {"penalty": 0.001},
    "λ = 0.01": {"penalty": 0.01},
    "λ = 0.1": {"penalty": 0.1},
    "λ = 0.5": {"penalty": 0.5},
    "λ = 1": {"penalty": 1.0},
    "cross-entropy form, λ = 1": {"penalty": 1.0, "form": "piecewise-linear-cross-entropy"},
    f"λ = 0, {_TWICE}": {"times": 2},
    f"noise 0.1, {_TWICE}": {"noise": 0.1, "times": 2},
    f"noise 0.2, {_TWICE}": {"noise": 0.2, "times": 2},
    f"noise 0.4, {_TWICE}": {"noise": 0.4, "times": 2},
    "λ = 0.001, noise 0.1": {"penalty": 0.001, "noise": 0.1},
    "λ = 0.001, noise 0.2": {"penalty": 0.001, "noise": 0.2},
    "λ = 0.01, noise 0.2": {"penalty": 0.01, "noise": 0.2},
    "λ = 0.01, noise 0.4": {"penalty": 0.01, "noise": 0.4},
    "λ = 0.1, noise 0.2": {"penalty": 0.1, "noise": 0.2},
}
"""Penalties by weight, and trainings without penalty in the same number of passes."""
KINDS = {
    "plain": (f"λ = 0, {_TWICE}",),
    "penalty": tuple(row for row, settings in ROWS.items() if "penalty" in settings and "noise" not in settings),
    "noise": tuple(row for row, settings in ROWS.items() if "noise" in settings and "penalty" not in settings),
    "both": tuple(row for row, settings in ROWS.items() if {"penalty", "noise"} <= set(settings)),
}
"""Rows of equal cost; the best row of each kind on validation images is selected."""

_COLUMN = "all"
_STEPS = {"smoke": 8, "cpu": 200}
_SMALL = {"digits": "cnn3", "synthetic": "cnn3", "fashion-mnist": "vgg:8-M-16-M-32"}
_BATCH, _EPOCHS = 128, 500
_JUDGED = 1000  # test images, and validation images, in the small sizes


def _model(request: Request) -> str:
    if request.student:
        return request.student
    small, paper = _SMALL.get(request.data.partition(":")[0], students.QUARTER_VGG9), request.scale == "paper"
    return "vgg9" if paper and small != "cnn3" else small


def _training(request: Request) -> dict[str, Any]:
    """The paper's optimizer and schedule in its size, else a short cosine; `steps` are those of a step with penalty."""
    shared = {"optimizer": "adam", "batch_size": _BATCH, "validation": students.VALIDATION}
    if request.scale == "paper":
        samples = round(len(students.data_of(request.data, request.seed, False).train) * (1 - students.VALIDATION))
        schedule = {"lr": 1e-3, "schedule": "step", "milestones": (0.8,)}
        return {**shared, **schedule, "steps": _EPOCHS * max(1, samples // _BATCH)}
    precision = "32" if _model(request) in _SMALL.values() else "bf16"
    return {**shared, "lr": 2e-3, "precision": precision, "steps": _STEPS[request.scale]}


def _cells(request: Request) -> list[Cell]:
    """Return the cells, seed by seed, so that an interrupted run has equally many seeds for each row, or one more."""
    if students.data_of(request.data, request.seed, request.smoke).classes is None:
        raise InputError("`--data` of `reproduce robustness` must have classes.", got=request.data)
    training = _training(request)
    return [
        Cell(row, _COLUMN, seed, {"form": "squared-norm", **settings, **training})
        for seed in request.seed_numbers(3)
        for row, settings in ROWS.items()
    ]


def _prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """The network, the standard deviation that is the unit of penalty and noise, and [judged, all] images by split."""
    data = students.data_of(request.data, request.seed, request.smoke)
    network = networks.Description.of(_model(request), data).build()
    _, validation = parts(data, students.VALIDATION, 0, request.seed)
    assert validation is not None
    splits = {"test": data.test, "validation": validation}
    images = {name: [len(_some(split, request)), len(split)] for name, split in splits.items()}
    parameters = count_parameters(network)
    return {"model": _model(request), "parameters": parameters, "std": list(data.std), "images": images}


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Train the network of a cell and evaluate it on test and validation images."""
    settings = dict(cell.settings)
    penalty, noise, times = (settings.pop(*each) for each in (("penalty", 0.0), ("noise", 0.0), ("times", 1)))
    form = settings.pop("form")
    data = students.data_of(request.data, request.seed, request.smoke)
    train, validation = parts(data, students.VALIDATION, 0, request.seed)
    assert validation is not None
    recipe = Robust(data=request.data, smoke=request.smoke, seed=cell.seed, penalty=form, **settings)
    torch.manual_seed(cell.seed)
    network = channels_last(networks.Description.of(_model(request), data).build())
    variant = Variant(penalty, noise, times * recipe.steps)
    objective = recipe.objective(variant, network, data, cell.seed)
    training = recipe.training(steps=variant.steps)
    fitted = fit(objective, train, training, seed=cell.seed, device=request.device)
    some, validation_points = (_some(split, request) for split in (data.test, validation))
    noises = [("gaussian-noise", level) for level in LEVELS]
    shifts = [*noises, *(UNSEEN if len(data.shape) == 3 else ())]
    shared: dict[str, Any] = {"scale": data.std, "device": request.device}
    under = evaluate_under_shifts(network, some, shifts, **shared)
    chosen = evaluate_under_shifts(network, validation_points, noises, draws=1, seed=1000, **shared)
    return {
        "accuracy": evaluate(network, some, device=request.device)["accuracy"],
        "validation_accuracy": evaluate(network, validation_points, device=request.device)["accuracy"],
        **{_name(*shift): statistics.fmean(values) for shift, values in under.items()},
        **{f"validation {_name(*shift)}": values[0] for shift, values in chosen.items()},
        "steps": fitted.steps,
        "train_seconds": fitted.seconds,
    }


def _name(shift: str, severity: float) -> str:
    return f"{shift} {severity:g}"


def _some(split: Split, request: Request) -> Split:
    """The images on which networks are evaluated: all in the paper's size, else the same random ones."""
    if request.scale == "paper" or len(split) <= _JUDGED:
        return split
    drawn = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.subset(drawn[:_JUDGED].sort().values)


_NOISES = ("accuracy", *(_name("gaussian-noise", level) for level in LEVELS))
_VALIDATION = ("validation_accuracy", *(f"validation {name}" for name in _NOISES[1:]))


def scores(document: Document) -> dict[str, Spread]:
    """The validation accuracy of each row by seed, averaged over all noise levels and no noise."""
    results: dict[str, list[float]] = {}
    for cell in sorted(document["cells"], key=lambda cell: cell["seed"]):
        results.setdefault(cell["row"], []).append(statistics.fmean(cell["measures"][name] for name in _VALIDATION))
    return {row: spread(values) for row, values in results.items()}


def chosen(document: Document) -> dict[str, str]:
    """For each measured kind of method, the row with the best mean score on validation images."""
    results = scores(document)
    measured = {kind: [row for row in rows if row in results] for kind, rows in KINDS.items()}
    return {kind: max(rows, key=lambda row: results[row]["mean"]) for kind, rows in measured.items() if rows}


def front(document: Document) -> tuple[tuple[str, ...], ...]:
    """For each row: accuracy without noise, mean over the noise levels, and whether no other row is better in both."""
    results = [spreads(document, name) for name in _NOISES]
    means = {row: [each[row, _COLUMN]["mean"] for each in results] for row in names(document, "row")}
    both = {row: (values[0], statistics.fmean(values[1:])) for row, values in means.items()}

    def beaten(row: str) -> bool:
        return any(all(a > b for a, b in zip(other, both[row], strict=True)) for other in both.values())

    ordered = sorted(both, key=lambda row: -both[row][0])
    return tuple((row, *(f"{100 * each:.1f}" for each in both[row]), "no" if beaten(row) else "yes") for row in ordered)


def _rows(document: Document, rows: Sequence[str], measures: Sequence[str]) -> list[tuple[str, ...]]:
    results = {name: spreads(document, name) for name in measures}
    return [(row, *(entry(results[name].get((row, _COLUMN))) for name in measures)) for row in rows]


def _tables(document: Document) -> list[Table]:
    rows = names(document, "row")
    heads = ("0", *(f"{level:g}" for level in LEVELS))
    measured = [name for name in (_name(*shift) for shift in UNSEEN) if spreads(document, name)]
    best = chosen(document)
    results, everything = scores(document), (*_NOISES, *measured)
    published = [
        (f"paper, VGG-9 on CIFAR-100: {row}", *(f"{v:.2f}" for v in values)) for row, values in PUBLISHED.items()
    ]
    steps = {cell["row"]: str(cell["measures"]["steps"]) for cell in document["cells"]}
    notes = (_images(document), origin(document))
    return [
        Table(
            "noise",
            "Test accuracy in % by standard deviation of the noise on normalized inputs",
            ("row", *heads),
            (*_rows(document, rows, _NOISES), *published),
            (_differences(document), *notes),
        ),
        Table(
            "equal-cost",
            "Equal cost in passes: each kind's best on validation images, test accuracy in % under noise and shifts",
            ("kind", *heads, *measured, "validation score"),
            tuple(
                (f"{kind}: {row}", *_rows(document, [row], everything)[0][1:], entry(results[row]))
                for kind, row in best.items()
            ),
            (_SCORE, *notes),
        ),
        Table(
            "shifts",
            "Test accuracy in % under shifts that were not used in training",
            ("row", "steps", "none", *measured),
            tuple((row, steps[row], *line) for row, *line in _rows(document, rows, ("accuracy", *measured))),
            ("Salt and pepper: share of the pixels. Blur: Gaussian, in pixels. Contrast: factor.", *notes),
        ),
        Table(
            "front",
            "Accuracy against robustness: mean over the seeds, in %",
            ("row", "without noise", "mean over the noise", "on the front"),
            front(document),
            (
                "On the front: no other row is better in both columns. Mean over the noise: of the columns 0.1 to 0.4.",
                *notes,
            ),
        ),
    ]


_SCORE = (
    "Score: validation accuracy averaged over the five columns of noise. Equal cost is in passes through the "
    "network: a step with a penalty takes two passes, and two to three times as long as a plain step."
)


def _images(document: Document) -> str:
    """Return a note on the images that were used; documents without this fact used the first images."""
    results = document["facts"].get("images")
    if results is None and document["size"] != "paper" and document["settings"]["data"] != "digits":
        return (
            "The column without noise or shift is measured on all images, the other columns on the first "
            f"{_JUDGED:,}. These two kinds of column therefore also differ in their images."
        )
    if results is None or all(judged == every for judged, every in results.values()):
        return "All columns are measured on all test and validation images."
    (tested, tests), (validation_points, validation) = results["test"], results["validation"]
    return (
        f"All columns are measured on the same {tested:,} of {tests:,} test images and {validation_points:,} of "
        f"{validation:,} validation images, drawn at random."
    )


def _differences(document: Document) -> str:
    """What differs from the paper, and what the paper does not give."""
    facts, settings = document["facts"], document["cells"][0]["settings"]
    return (
        f"Network {facts['model']} with {facts['parameters']:,} parameters on {document['settings']['data']}, in the "
        "paper VGG-9 on CIFAR-100. Penalty λ‖J‖²_F, with J the Jacobian of the logits with respect to normalized "
        f"inputs, estimated by one random row; {settings['steps']} steps of {settings['batch_size']} images with Adam "
        f"in {settings.get('precision', '32').replace('32', 'float32')}; rows with '{_TWICE}' take as many passes as "
        "rows with a penalty. The paper does not give: form of the penalty, one class or all, augmentation, batch "
        "size, seeds, and whether the noise is Gaussian (here it is, without clipping). With noise: mean over 3 draws."
    )


def _figure(document: Document) -> bytes:
    results = {name: spreads(document, name) for name in _NOISES}
    levels = (0.0, *LEVELS)
    lines = []
    for row in names(document, "row"):
        values = [results[name][row, _COLUMN] for name in _NOISES]
        lines.append(Line(row, levels, [100 * v["mean"] for v in values], [100 * (v["std"] or 0.0) for v in values]))
    theirs = [Line(row, levels, values) for row, values in PUBLISHED.items() if row in names(document, "row")]
    title = f"{document['settings']['data']}, {document['facts']['model'].partition(':')[0]}"
    return line_figure(
        [(title, lines), ("published: CIFAR-100, VGG-9", theirs)],
        x_label="standard deviation of the noise",
        y_label="test accuracy in %",
    )


_ABOUT = "the paper's table of robustness: weight of the Jacobian-norm penalty × noise, and noise in training"
ROBUSTNESS = Experiment(_ABOUT, _cells, _measure, _tables, _figure, _prepare, takes=frozenset({"data", "student"}))
