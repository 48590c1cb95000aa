"""A robot hand and its description as a parallel manipulator, and networks for the pose of the object."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.jacobian import jacobian, jvp, vjp
from jacmatch.jobs.study import Progress
from jacmatch.report import Table
from jacmatch_research.figures import line_figure
from jacmatch_research.reproduce.equal_error import (
    ADAM,
    DERIVATIVES,
    METHODS,
    VALUES,
    curves,
    made,
    measured,
    saved,
    surrogate,
)
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.systems.grasp.hand import Hand, ObjectPose, by_hand, torques_by_hand
from jacmatch_research.systems.grasp.manipulator import (
    Inverse,
    by_manipulator,
    coordinates,
    drawn,
    pose,
    regularity,
    toward_singular,
    twist_of,
)
from jacmatch_research.systems.grasp.manipulator import pose_jacobian as by_joints
from jacmatch_research.tables import Document, seeds_of

NEARLY_SINGULAR = "values + partials, nearly singular grasps too"
INVERSE = {VALUES: "inverse: values", DERIVATIVES: "inverse: values + partials"}
"""Rows of networks from pose to joints, which are inverted; they learn from the nearly singular grasps too."""
ROWS = (*METHODS, NEARLY_SINGULAR, *INVERSE.values(), ADAM)
SAMPLES = {"smoke": (40,), "cpu": (100, 500)}
EVALUATIONS: dict[str, dict[str, dict[int, int]]] = {
    "smoke": {VALUES: {40: 40}, DERIVATIVES: {40: 40}},
    "cpu": {VALUES: {100: 2100, 500: 7000}, DERIVATIVES: {100: 1400, 500: 1000}},
}
"""Evaluations of the last fit: about as many processor seconds for both methods at each number of samples."""
_ADAM = {"smoke": (40, 20), "cpu": (100, 1000)}
"""Samples at which Adam is compared, and its steps: about as many processor seconds again."""
_HIDDEN = {"hidden": (64, 64), "activation": "silu"}
_OF_ADAM = {"hidden": (64, 64), "activation": "silu", "probes": 2, "batch_size": 64, "lr": 0.02, "weight": 2.0}
_REACH, _REGULAR, _LEAST = 0.15, 0.2, 0.02
TESTED, _TEST_SEED = {"smoke": 200, "cpu": 2000}, 2**20
DIRECTIONS = {"smoke": 3, "cpu": 24}
"""Grasps at which errors are measured, and paths to singular ones."""
BINS = ((0.02, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 2.0))
SHARES = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999)
"""Fractions of the paths to singular grasps."""
MEASURES = (
    ("place", "place, mm", 1e3, 3),
    ("turn", "rotation, mrad", 1e3, 2),
    ("partials", "partials, %", 100, 2),
    ("torque", "torques, %", 100, 2),
    ("power", "power, 10⁻⁶", 1e6, 1),
    ("cpu_seconds", "processor seconds", 1, 0),
)


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    of_adam, steps = _ADAM[size]
    cells = []
    for seed in request.seed_numbers(5):
        for samples in SAMPLES[size]:
            for row in (*METHODS, NEARLY_SINGULAR):
                method = VALUES if row == VALUES else DERIVATIVES
                least = _LEAST if row == NEARLY_SINGULAR else _REGULAR
                each = {"samples": samples, "partials": method == DERIVATIVES, "least": least}
                evaluations = EVALUATIONS[size][method][samples]
                cells.append(Cell(row, str(samples), seed, {**_HIDDEN, "evaluations": evaluations, **each}))
                if row in INVERSE:
                    inverse = {**_HIDDEN, "evaluations": evaluations, **each, "least": _LEAST, "inverse": True}
                    cells.append(Cell(INVERSE[row], str(samples), seed, inverse))
                if samples == of_adam and row == DERIVATIVES:
                    cells.append(Cell(ADAM, str(samples), seed, {**_OF_ADAM, "steps": steps, **each}))
    return cells


def _prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """Return the agreement of the two formalisms, on test grasps and on paths to singular ones."""
    hand, size = Hand(), "smoke" if request.smoke else "cpu"
    driven, object_pose = _grasps(hand, TESTED[size], _TEST_SEED, _REGULAR)
    facts = {"regular": _agreement(hand, object_pose, driven)}
    object_pose, driven = toward_singular(hand, DIRECTIONS[size], 0, SHARES)
    for k, share in enumerate(SHARES):
        part = slice(k, None, len(SHARES))
        facts[f"{share:g}"] = _agreement(hand, ObjectPose(object_pose.p[part], object_pose.r[part]), driven[part])
    return {"agreement": facts}


def _agreement(hand: Hand, object_pose: ObjectPose, driven: Tensor) -> dict[str, float]:
    """Largest relative differences of velocities and torques between the formalisms, and how regular the grasps are."""
    q = hand.joints(object_pose)
    one, other = by_manipulator(hand, object_pose, driven), by_hand(hand, object_pose, q)
    wrench = torch.randn(len(q), 6, generator=torch.Generator().manual_seed(0), dtype=q.dtype)
    by_duality = torch.einsum("gij,gi->gj", one, wrench)
    torques, _ = torques_by_hand(hand, object_pose, q, wrench)
    numbers = {
        "regularity": regularity(hand, object_pose, driven).median(),
        "jacobian": torch.linalg.matrix_norm(one, 2).median(),
        "velocities": ((one - other).norm(dim=(1, 2)) / one.norm(dim=(1, 2))).max(),
        "torques": ((torques - by_duality).norm(dim=1) / by_duality.norm(dim=1)).max(),
    }
    return {name: float(f"{float(value):.3g}") for name, value in numbers.items()}


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Errors of pose, derivatives and torques at new grasps, also by the distance from singular ones."""
    options, hand, size = cell.settings, Hand(), "smoke" if request.smoke else "cpu"
    q, object_pose = _grasps(hand, options["samples"], cell.seed, options["least"])
    points = q, coordinates(hand, object_pose)
    known = by_joints(hand, object_pose, q)
    weights = _by_size(*points, known) if cell.row == NEARLY_SINGULAR else None
    if options.get("inverse"):
        points, known = points[::-1], torch.linalg.inv(known)
    student, training = surrogate(points, known, options, cell.seed, weights=weights, device=request.device)
    if options.get("inverse"):
        student = Inverse(student, coordinates(hand, hand.rest())[0])
    return {**_errors(hand, student, TESTED[size]), **training}


def _by_size(q: Tensor, y: Tensor, known: Tensor) -> Tensor:
    """Weights 1/(1 + s/median s), s the squared size of a grasp's partials in standardized units.

    Without them, nearly singular grasps, whose partials are largest, would dominate the loss.
    """
    size = (known * q.std(0) / y.std(0)[:, None]).square().sum((1, 2))
    return 1 / (1 + size / size.median())


def _errors(hand: Hand, student: nn.Module, count: int) -> dict[str, float]:
    """Errors of a student; a radian counts as the grip's radius in derivatives and wrenches.

    Torques are the student's vᵀJ with v = Tᵀw, for a random wrench w at each grasp. `power` is the largest difference
    between τ·q̇ of the student and w·ẋ of its Jv, over |w·ẋ| on average; by duality it should be 0.
    """
    q, object_pose = _grasps(hand, count, _TEST_SEED, _LEAST)
    y, near = coordinates(hand, object_pose), regularity(hand, object_pose, q)
    unit = torch.tensor([1.0] * 3 + [hand.grip] * 3, dtype=q.dtype)
    generator = torch.Generator().manual_seed(_TEST_SEED)
    wrench = torch.randn(len(q), 6, generator=generator, dtype=q.dtype) * unit
    known = by_manipulator(hand, object_pose, q)
    predicted, by_joint = (each.detach().double() for each in jacobian(student, q.float()))
    wrenches = torch.einsum("gij,gi->gj", twist_of(y), wrench).float()
    torques = vjp(student, q.float(), wrenches)[1].detach().double()
    motion = torch.randn(len(q), 6, generator=generator, dtype=q.dtype).float()
    moved = jvp(student, q.float(), motion)[1].detach()
    power = ((torques.float() * motion).sum(1) - (wrenches * moved).sum(1)).abs().max()
    wrong = (predicted - y).square()
    partials = ((twist_of(y) @ by_joint - known) * unit[:, None]).square().sum((1, 2))
    torque = (torques - torch.einsum("gij,gi->gj", known, wrench)).square().sum(1)
    partials_size = (known * unit[:, None]).square().sum((1, 2))
    torque_size = torch.einsum("gij,gi->gj", known, wrench).square().sum(1)
    results = {"power": float(power / (wrenches * moved).sum(1).abs().mean())}
    for low, high in (*BINS, (_REGULAR, 2.0)):
        name = "" if (low, high) == (_REGULAR, 2.0) else f"_{low:g}"
        part = (near >= low) & (near < high)
        if not part.any():
            continue
        results |= {
            f"place{name}": float(wrong[part, :3].sum(1).mean().sqrt()),
            f"turn{name}": float(wrong[part, 3:].sum(1).mean().sqrt()),
            f"partials{name}": float((partials[part].sum() / partials_size[part].sum()).sqrt()),
            f"torque{name}": float((torque[part].sum() / torque_size[part].sum()).sqrt()),
        }
    return results


@lru_cache(maxsize=8)
def _grasps(hand: Hand, count: int, seed: int, least: float) -> tuple[Tensor, ObjectPose]:
    """Driven joints, and the poses of the object."""
    q = drawn(hand, count, seed, _REACH, least)
    return q, pose(hand, q)[0]


def _tables(document: Document) -> list[Table]:
    size = document["size"]
    notes = (
        f"At those of {TESTED[size]} new grasps whose smallest singular value of A is at least {_REGULAR}; mean ± "
        f"standard deviation over seeds (of grasps and weights): {seeds_of(document)}. Partials and torques relative "
        "to their root mean square; a radian counts as the radius of the grip. Torques: vᵀJ of the student for random "
        "wrenches. Power: largest |τ·q̇ − w·ẋ| of the student in float32, over the mean of |w·ẋ|.",
        made(document),
    )
    head = "error of torques, %, by smallest singular value of A"
    bins = tuple((f"torque_{low:g}", f"{low:g} to {high:g}", 100, 1) for low, high in BINS)
    learned = (
        f"Training grasps have at least {_REGULAR}; in the last three rows of each number of grasps, at least {_LEAST}."
    )
    compared = {"{}": METHODS, "inverse: {}": (INVERSE[VALUES], INVERSE[DERIVATIVES])}
    return [
        measured(document, "grasp", "Networks for the pose of the object", MEASURES, ROWS, notes, first="grasps"),
        saved(document, "Grasps", (*MEASURES[:2], MEASURES[3]), compared),
        measured(document, "singular", "Torques near singular grasps", bins, ROWS[:-1], (learned,), first=head),
        _agreement_table(document),
    ]


def _agreement_table(document: Document) -> Table:
    facts = document["facts"]["agreement"]
    rows = [
        (
            "grasps of the test" if name == "regular" else f"{float(name):.4g} of the way to a singular one",
            f"{each['regularity']:.2g}",
            f"{each['jacobian']:.3g}",
            f"{each['velocities']:.0e}",
            f"{each['torques']:.0e}",
        )
        for name, each in facts.items()
    ]
    head = ("where", "smallest singular value of A", "‖A⁻¹B‖, rad⁻¹", "velocities", "torques")
    note = (
        f"Largest relative differences in float64; medians of the other two. {DIRECTIONS[document['size']]} random "
        "directions of the object from rest until det A changes its sign."
    )
    return Table("agreement", "Hand against parallel manipulator", head, tuple(rows), (note,))


def _figure(document: Document) -> bytes:
    """Errors over the number of grasps."""
    panels = [
        (f"{heading}", curves(document, name, scale, ROWS)) for name, heading, scale, _ in (*MEASURES[:2], MEASURES[3])
    ]
    return line_figure(panels, x_label="grasps", y_label="error", log_x=True, log_y=True)


_ABOUT = "a hand as a parallel manipulator: the pose of the object by values and partials, torques by duality"
GRASP = Experiment(_ABOUT, _cells, _measure, _tables, _figure, _prepare)
