"""An arm of six joints: the samples that its kinematics need, and inverse kinematics by a network's Jacobian."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from jacmatch.jacobian import jacobian
from jacmatch.jobs.study import Progress
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, entry
from jacmatch_research.figures import line_figure
from jacmatch_research.reproduce.equal_error import (
    ADAM,
    DERIVATIVES,
    VALUES,
    Measure,
    curves,
    made,
    measured,
    saved,
    surrogate,
)
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.systems.kinematics.chain import PUMA_560, rotation_vector
from jacmatch_research.systems.kinematics.inverse import (
    Known,
    animate,
    errors,
    exact,
    exact_poses,
    nearest_rotation,
    of_student,
    solve,
)
from jacmatch_research.tables import Document, seeds_of

SHARE = 0.5
"""Middle part of each joint's range that is learned, and that inverse kinematics may use."""
LONGER = "values + partials, longer"
ROWS = (VALUES, DERIVATIVES, LONGER, ADAM)
EVALUATIONS = {
    "smoke": {VALUES: {40: 40}, DERIVATIVES: {40: 40}},
    "cpu": {
        VALUES: {100: 2100, 200: 2450, 500: 3450, 1000: 3450},
        LONGER: {100: 3200, 200: 3000},
        DERIVATIVES: dict.fromkeys((100, 200, 500), 1400),
    },
}
"""Evaluations of the last fit: about as many processor seconds for both methods at each number of samples. The longer
fits take about as many as values alone with five times the samples."""
_ADAM = {"smoke": (40, 8), "cpu": (200, 8000)}
"""Samples at which Adam is compared, and its steps: about as many processor seconds again."""
_SIZES: dict[str, dict[str, int]] = {
    "smoke": {"targets": 8, "animations": 1, "frames": 3, "iterations": 6, "frame": 6},
    "cpu": {"targets": 200, "animations": 8, "frames": 20, "iterations": 60, "frame": 15},
}
"""Targets; animations, and frames of each of their parts; steps of inverse kinematics, and those for a frame."""
_HIDDEN = {"hidden": (96, 96, 96), "activation": "silu"}
"""The best of four networks that were compared with a seed that differs from those of the tables."""
_OF_ADAM = {"hidden": (128, 128), "activation": "silu", "probes": 2, "batch_size": 64, "lr": 0.02, "weight": 2.0}
"""The best of the values that were compared with this seed."""
_TEST, _TEST_SEED = 2000, 2**20
_AWAY, _STRAIGHT = 0.6, 0.05  # radians: starts from their targets; wrists that count as nearly straight
LEARNED = (
    ("place", "place, mm", 1e3, 1),
    ("turn", "rotation, mrad", 1e3, 1),
    ("partials", "partials, %", 100, 1),
    ("evaluations", "evaluations", 1, 0),
    ("cpu_seconds", "processor seconds", 1, 0),
)
DRIVEN = (
    ("reached", "reached, %", 100, 1),
    ("iterations", "iterations", 1, 1),
    ("straight_reached", "wrist straight: reached, %", 100, 1),
    ("straight_iterations", "iterations", 1, 1),
    ("alone_place", "alone: place, mm", 1e3, 2),
    ("alone_turn", "rotation, mrad", 1e3, 2),
)
SWITCHED = (
    ("into", "into, mrad", 1e3, 2),
    ("inside", "inside, mrad", 1e3, 0),
    ("off", "off the path, mm", 1e3, 2),
    ("straight_into", "through straight: into, mrad", 1e3, 2),
    ("straight_inside", "inside, mrad", 1e3, 0),
    ("straight_off", "off the path, mm", 1e3, 2),
    ("alone_into", "alone: into, mrad", 1e3, 1),
    ("alone_off", "off the path, mm", 1e3, 1),
)


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    of_adam, steps = _ADAM[size]
    cells = []
    for seed in request.seed_numbers(5):
        for row, numbers in EVALUATIONS[size].items():
            for samples, evaluations in sorted(numbers.items(), reverse=row == VALUES):
                each = {"samples": samples, "partials": row != VALUES, **_SIZES[size]}
                cells.append(Cell(row, str(samples), seed, {**_HIDDEN, "evaluations": evaluations, **each}))
        each = {"samples": of_adam, "partials": True, **_SIZES[size]}
        cells.append(Cell(ADAM, str(of_adam), seed, {**_OF_ADAM, "steps": steps, **each}))
    return cells


def _prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """Return the results of the arm's own poses and Jacobians for the same targets, animations and starts."""
    size = _SIZES["smoke" if request.smoke else "cpu"]
    own = exact(PUMA_560)
    results = {**_inverse(own, own, size), **_switches(own, size)}
    cold = {f"cold_{name}": value for name, value in _switches(own, size, cold=True).items()}
    return {"exact": {name: float(f"{value:.6g}") for name, value in (results | cold).items()}}


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Errors of a student, and of inverse kinematics with it."""
    options = cell.settings
    q = PUMA_560.drawn(options["samples"], cell.seed, SHARE)
    student, training = surrogate(
        (q, PUMA_560.outputs(q)), PUMA_560.output_jacobian(q), options, cell.seed, device=request.device
    )
    at = PUMA_560.drawn(_TEST, _TEST_SEED, SHARE)
    predicted, partials = (each.detach().double() for each in jacobian(student, at.float()))
    position, rotation = PUMA_560.pose(at)
    turned = rotation_vector(nearest_rotation(predicted[:, 3:].reshape(-1, 3, 3)) @ rotation.mT)
    known = PUMA_560.output_jacobian(at)
    own = of_student(student)
    measured = exact_poses(PUMA_560, own)
    return {
        "place": float((predicted[:, :3] - position).square().sum(1).mean().sqrt()),
        "turn": float(turned.square().sum(1).mean().sqrt()),
        "partials": float((partials - known).norm() / known.norm()),
        **_inverse(measured, own, options),
        **_switches(measured, options),
        **{f"alone_{name}": value for name, value in _switches(own, options).items()},
        **training,
    }


@lru_cache(maxsize=4)
def _problems(targets: int, *, straight: bool) -> tuple[Tensor, Tensor]:
    """Joint angles whose poses are the targets, and starts within `_AWAY` of them; perhaps nearly straight wrists."""
    q = PUMA_560.drawn(targets, _TEST_SEED + 1, SHARE)
    if straight:
        q[:, 4] *= _STRAIGHT / float(q[:, 4].abs().max())
    generator = torch.Generator().manual_seed(_TEST_SEED)
    away = _AWAY * (2 * torch.rand(q.shape, generator=generator, dtype=q.dtype) - 1)
    return q, torch.clamp(q + away, *PUMA_560.limits(SHARE))


def _inverse(measured: Known, alone: Known, size: Mapping[str, Any]) -> dict[str, float]:
    """Inverse kinematics with measured poses, and with poses and derivatives from the same source.

    Return the share of targets that are reached, and their iterations. Alone: median errors of the arm's own pose.
    """
    results, limits = {}, PUMA_560.limits(SHARE)
    for straight in (False, True):
        q, start = _problems(size["targets"], straight=straight)
        target, name = PUMA_560.pose(q), "straight_" if straight else ""
        solved = solve(measured, target, start, limits, iterations=size["iterations"])
        results[f"{name}reached"] = float(solved.reached.double().mean())
        results[f"{name}iterations"] = float(solved.iterations[solved.reached].double().mean().nan_to_num())
        if not straight:
            solved = solve(alone, target, start, limits, iterations=size["iterations"])
            missing = errors(PUMA_560.pose(solved.q), target)
            results["alone_place"] = float(missing[:, :3].norm(dim=1).median())
            results["alone_turn"] = float(missing[:, 3:].norm(dim=1).median())
    return results


def _switches(known: Known, size: Mapping[str, Any], *, cold: bool = False) -> dict[str, float]:
    """Animations without and with a wrist that goes through straight in the inverse part; the worst of them.

    Cold: each frame is solved from the middle of the joint ranges, not from the frame before.
    """
    keys = torch.stack([PUMA_560.drawn(size["animations"], _TEST_SEED + 10 + k, 0.6 * SHARE) for k in range(4)])
    keys[:, :, 4] = keys[:, :, 4].abs() + 0.2
    through = keys.clone()
    through[2, :, 4] *= -1
    low, high = PUMA_560.limits(SHARE)
    start = (low + high) / 2 if cold else None
    often = {"frames": size["frames"], "iterations": size["frame"]}
    motion = animate(PUMA_560, known, torch.cat((keys, through), 1), cold=start, share=SHARE, **often)
    results = {}
    for name, part in (("", slice(len(keys[0]))), ("straight_", slice(len(keys[0]), None))):
        for measure, values in motion.items():
            results[f"{name}{measure}"] = float(values[part].min() if measure == "fold" else values[part].max())
    return results


def _tables(document: Document) -> list[Table]:
    options, own = document["cells"][0]["settings"], document["facts"]["exact"]
    notes = (
        f"PUMA 560, the middle {100 * SHARE:.0f} % of each joint's range; errors at {_TEST} new points, mean ± "
        f"standard deviation over seeds (of points and weights): {seeds_of(document)}. Evaluations: evaluations of "
        "loss and gradient over all samples; for Adam, steps. The weight decay is selected on a fifth of the samples.",
        made(document),
    )
    inverse_note, switch_note = _notes(options, own)
    cold = {name.removeprefix("cold_"): value for name, value in own.items() if name.startswith("cold_")}
    lines = [_exact_row("the arm's own Jacobian", DRIVEN, own), _exact_row("the arm's own", SWITCHED, own)]
    compared = {"{}": (VALUES, DERIVATIVES), "{}, longer fits": (VALUES, LONGER)}
    title, following = "Inverse kinematics driven by a network", "From forward to inverse kinematics and back"
    return [
        measured(document, "kinematics", "Networks for the arm's pose", LEARNED, ROWS, notes),
        saved(document, "Samples", LEARNED[:3], compared),
        measured(document, "inverse", title, DRIVEN, ROWS, (inverse_note,), more=lines[:1]),
        measured(
            document,
            "switching",
            following,
            SWITCHED,
            ROWS,
            (switch_note,),
            more=(lines[1], _exact_row("the arm's own, cold", SWITCHED, cold)),
        ),
    ]


def _notes(options: Mapping[str, Any], own: Mapping[str, float]) -> tuple[str, str]:
    """Return the notes of the tables of inverse kinematics and of switches."""
    inverse = (
        f"{options['targets']} targets, starts up to {_AWAY} rad from a solution in each joint, at most "
        f"{options['iterations']} damped steps within the learned range. Reached: 1 mm and 2 mrad; iterations are of "
        "reached targets only. First four columns: poses of the arm, Jacobians of the network; wrists are straight "
        f"within {_STRAIGHT} rad. Alone: the poses are the network's too, and the table gives the median error of the "
        "arm."
    )
    switch = (
        f"{options['animations']} animations of three parts with {options['frames']} frames, the largest joint step of "
        "all: where inverse kinematics takes over from the joints' own motion, and between its frames. Poses are the "
        "arm's and Jacobians the network's; alone, both are the network's. The joints' own motion has steps up to "
        f"{1e3 * own['usual']:.0f} mrad, and continues where inverse kinematics ended, with a step of at most "
        f"{1e3 * own['back']:.0f} mrad. Cold: frames are solved from the middle of the ranges. Smallest singular value "
        f"on the way: {own['fold']:.2g}; with a straight wrist {own['straight_fold']:.1g}."
    )
    return inverse, switch


def _exact_row(label: str, measures: tuple[Measure, ...], own: Mapping[str, float]) -> tuple[str, ...]:
    known = [(own.get(name), scale, digits) for name, _, scale, digits in measures]
    return (label, *(NOTHING if v is None else entry({"mean": v, "std": None}, s, d) for v, s, d in known))


def _figure(document: Document) -> bytes:
    """Errors and success over the number of samples."""
    drawn = {
        "place": ("place, RMSE in mm", 1e3),
        "turn": ("rotation, RMSE in mrad", 1e3),
        "reached": ("inverse kinematics: reached, %", 100),
        "alone_into": ("alone: jump into inverse kinematics, mrad", 1e3),
    }
    panels = [(title, curves(document, name, scale, ROWS[:3])) for name, (title, scale) in drawn.items()]
    return line_figure([panel for panel in panels if panel[1]], x_label="samples", y_label="", log_x=True, log_y=True)


_ABOUT = "an arm of six joints by values and partials: samples, inverse kinematics, and switching without a jump"
KINEMATICS = Experiment(_ABOUT, _cells, _measure, _tables, _figure, _prepare)
