"""Section 2.1 of the paper: VGG-9 → VGG-4 by images per class, the six rows of its tables."""

from collections.abc import Mapping
from typing import Any

from jacmatch.report import Table
from jacmatch_research.reproduce import published, students
from jacmatch_research.reproduce.experiment import Cell, Request
from jacmatch_research.tables import Document, fidelity, gains, grid, names, origin, published_row

_JACOBIANS = {"method": "jacobians", "probe": "top-class", "jacobian_weight": 1.0, "jacobian_schedule": "constant"}

ROWS: dict[str, Mapping[str, Any]] = {
    "labels": {"method": "labels"},
    "labels + outputs": {"method": "outputs"},
    "labels + Jacobians": {**_JACOBIANS, "outputs_weight": 0.0},
    "labels + outputs + Jacobians": _JACOBIANS,
    "outputs": {"method": "outputs", "labels_weight": 0.0},
    "outputs + Jacobians": {**_JACOBIANS, "labels_weight": 0.0},
}
"""The paper's rows. All weights are 1; the Jacobian is its row of the teacher's largest output."""

_PER_CLASS = {"smoke": (1, 5), "cpu": (1, 5, 10, 50, 100, 500, 1000, 0), "paper": (1, 5, 10, 50, 100, 500, 1000, 0)}
_EPOCHS, _BATCH = 500, 128
_CPU_STEPS, _CPU_BATCH = 200, 64


def _training(request: Request, per_class: int) -> dict[str, Any]:
    """The paper's optimizer and schedule: Adam at 10⁻³, for the last fifth at 10⁻⁴; 500 epochs in the paper's size."""
    settings = {"optimizer": "adam", "lr": 1e-3, "schedule": "step", "milestones": (0.8,)}
    if request.scale != "paper":
        return {**settings, "steps": _CPU_STEPS, "batch_size": _CPU_BATCH}
    data = students.data_of(request.data, request.seed, request.smoke)
    samples = per_class * (data.classes or 1) or round(len(data.train) * (1 - students.VALIDATION))
    return {**settings, "steps": _EPOCHS * max(1, samples // _BATCH), "batch_size": _BATCH}


def _cells(request: Request) -> list[Cell]:
    # As in the paper: the squared loss for CIFAR-100, the normalized one for CIFAR-10, which is taken for the rest too.
    loss = {
        "point": "data",
        "output_loss": "squared",
        "jacobian_loss": "squared" if request.data.startswith("cifar100") else "normalized",
    }
    return [
        Cell(
            row,
            students.column_of(n),
            seed,
            students.settings_of(request, n, **settings, **loss, **_training(request, n)),
        )
        for n in students.per_class_of(request, _PER_CLASS[request.scale])
        for row, settings in ROWS.items()
        for seed in request.seed_numbers(3)
    ]


def _tables(document: Document) -> list[Table]:
    columns = names(document, "column")
    family = document["settings"]["data"]
    theirs = published.DISTILLATION.get(family, {})
    teacher = f"Teacher: {100 * document['facts']['teacher']['accuracy']:.1f} %"
    teacher += f" (paper: {published.TEACHER[family]:.1f} %)." if family in published.TEACHER else "."
    main = Table(
        "accuracy",
        "Test accuracy in % by images per class, last step, mean ± standard deviation over seeds",
        ("row", *columns),
        (
            *grid(document, "accuracy"),
            gains(document, "labels + outputs + Jacobians", "labels + outputs"),
            gains(document, "outputs + Jacobians", "outputs"),
            *(published_row(f"paper: {row}", values, columns) for row, values in theirs.items()),
        ),
        (origin(document), teacher, _differences(document)),
    )
    return [main, fidelity(document)]


def _differences(document: Document) -> str:
    """What differs from the paper, and what the paper does not give."""
    facts, first = document["facts"], document["cells"][0]
    teacher, student = facts["teacher"], facts["student"]
    steps = "500 epochs"
    if document["size"] != "paper":
        steps = f"{first['measures']['steps']:.0f} steps in every column (paper: 500 epochs)"
    return (
        f"Teacher {teacher['model']}, student {student['model']} with {student['parameters']:,} parameters. Adam with "
        f"learning rate 10⁻³, in the last fifth of the steps 10⁻⁴; {steps}, batches of "
        f"{first['settings']['batch_size']}, no augmentation of the student's images. A tenth of the training images "
        "is held out, so `all` is 90 % of them; all seeds share one teacher. The paper does not give: batch size, "
        "augmentation, subsets, seeds, whether terms are sums or means over the outputs (here sums), and to which "
        "class the Jacobian row belongs (here the class of the teacher's largest output)."
    )


DISTILLATION = students.experiment(
    "the paper's tables: VGG-9 → VGG-4 from 1 image per class to all, six rows (section 2.1)", _cells, _tables
)
