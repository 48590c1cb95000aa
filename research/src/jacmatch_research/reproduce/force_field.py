"""Small networks for the energy of a cluster: what forces and Hessian rows of a larger one add at equal steps."""

import time
from collections.abc import Mapping
from typing import Any

from jacmatch.jobs.progress import Progress
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, Spread, entry
from jacmatch.runs import spread
from jacmatch_research.figures import dot_figure
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures
from jacmatch_research.reproduce.request import Request
from jacmatch_research.systems.force_field.learning import (
    STEP,
    configurations,
    errors,
    simulated,
    taught,
    teacher,
)
from jacmatch_research.systems.force_field.lennard_jones import ARGON
from jacmatch_research.tables import Document, names, paired, seeds_of, spreads

ENERGIES, FORCES, LONGER = "energies", "+ forces", "+ forces, 4 × steps"
ROW, ROWS = "+ forces + 1 Hessian row", "+ forces + 4 Hessian rows"
METHODS: dict[str, Mapping[str, Any]] = {
    ENERGIES: {"forces": False, "rows": 0, "longer": 1},
    FORCES: {"forces": True, "rows": 0, "longer": 1},
    LONGER: {"forces": True, "rows": 0, "longer": 4},
    ROW: {"forces": True, "rows": 1, "longer": 1},
    ROWS: {"forces": True, "rows": 4, "longer": 1},
}
"""What is matched; a step with a row takes three to four times as long as one without, with four rows seven times."""

_SIZES: dict[str, dict[str, int]] = {
    "smoke": {
        "steps": 8,
        "configurations": 16,
        "simulated": 20,
        "clusters": 2,
        "tested": 10,
        "taught": 32,
        "teaching": 8,
    },
    "cpu": {
        "steps": 600,
        "configurations": 50,
        "simulated": 10_000,
        "clusters": 8,
        "tested": 200,
        "taught": 1000,
        "teaching": 2000,
    },
}
LOST = 1000
"""A drift in meV that no bound cluster can have: its binding energy is 170."""
MEASURES = {
    "force": ("forces, meV/Å", 3),
    "hessian": ("Hessian, meV/Å²", 2),
    "energy": ("energy, meV", 2),
    "drift": ("drift, meV", 3),
    "own": ("own energy, meV", 4),
    "train_seconds": ("seconds of training", 0),
}
"""Headings and digits."""


def _size(request: Request) -> dict[str, int]:
    return _SIZES["smoke" if request.smoke else "cpu"]


def _cells(request: Request) -> list[Cell]:
    size = _size(request)
    return [
        Cell(
            method,
            str(size["configurations"]),
            seed,
            {
                **size,
                "forces": how["forces"],
                "rows": how["rows"],
                "share": 0.5,
                "steps": how["longer"] * size["steps"],
            },
        )
        for method, how in METHODS.items()
        for seed in request.seed_numbers(5)
    ]


def _prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """The teacher's own errors, to be compared with."""
    size = _size(request)
    results = errors(teacher(size["taught"], size["teaching"]), size["tested"])
    return {"teacher": {name: round(value, 6) for name, value in results.items()}}


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Errors of a student, and what a simulation that it drives does to the energy."""
    options = cell.settings
    by = teacher(options["taught"], options["teaching"])
    x = configurations(options["configurations"], seed=cell.seed)
    start = time.perf_counter()
    student = taught(
        x,
        by,
        forces=options["forces"],
        rows=options["rows"],
        share=options["share"],
        steps=options["steps"],
        seed=cell.seed,
    )
    seconds = time.perf_counter() - start
    motion = simulated(student, clusters=options["clusters"], steps=options["simulated"], seed=cell.seed)
    results = errors(student, options["tested"])
    return {**results, **motion, "train_seconds": seconds}


def _tables(document: Document) -> list[Table]:
    results = {name: spreads(document, name) for name in MEASURES}
    (column,) = names(document, "column")
    own, made = document["facts"]["teacher"], document["environment"]
    options = document["cells"][0]["settings"]
    rows = [
        (row, *(_entry(results[name].get((row, column)), name, digits) for name, (_, digits) in MEASURES.items()))
        for row in names(document, "row")
    ]
    examples = ("the teacher", *(f"{own[n]:.{d}f}" if n in own else NOTHING for n, (_, d) in MEASURES.items()))
    time_step = STEP * ARGON.time * 1e15
    notes = (
        f"Seven argon atoms, {column} configurations, mean ± standard deviation over seeds: {seeds_of(document)}. "
        f"Errors against the potential at {options['tested']} fresh configurations, where the forces have a standard "
        f"deviation of {own['force_std']:.2f} meV/Å.",
        f"Drift: root mean square of H(t) − H(0), H with the potential's energy, over {options['simulated']:,} steps "
        f"of {time_step:.1f} fs in {options['clusters']} clusters; own energy: the same with the network's. Lost: "
        f"seeds in which H left by more than {LOST} meV, atoms having fallen into each other; they are not in "
        "the mean.",
        f"CPU, one thread beside other work, torch {made['torch']}, jacmatch {made['jacmatch']}.",
    )
    head = ("matched", *(heading for heading, _ in MEASURES.values()))
    gains = Table(
        "gain",
        "What rows of the Hessian take away, seed by seed, at equal steps and at about equal cost",
        ("difference", *(MEASURES[name][0] for name in ("force", "hessian", "drift"))),
        tuple(
            (
                f"{row} − {than}",
                *(
                    entry(paired(results[name].get((row, column)), results[name].get((than, column))), 1, 3)
                    for name in ("force", "hessian", "drift")
                ),
            )
            for row in (ROW, ROWS)
            for than in (FORCES, LONGER)
        ),
        ("Negative: the rows lower the error.",),
    )
    return [Table("force-field", "Errors of students at equal steps", head, (*rows, examples), notes), gains]


def _entry(value: Spread | None, name: str, digits: int) -> str:
    """A mean ± standard deviation; of a drift over the seeds that kept the cluster, and how many did not."""
    if value is None or name != "drift":
        return entry(value, 1, digits)
    retained, lost = _survivors(value)
    predicted = [entry(retained, 1, digits)] * (retained is not None) + [f"{lost} lost"] * (lost > 0)
    return ", ".join(predicted)


def _survivors(value: Spread) -> tuple[Spread | None, int]:
    """A drift over the seeds that kept the cluster, and the number of the others."""
    values = [each for each in value["values"] if each <= LOST]
    return (spread(values) if values else None), len(value["values"]) - len(values)


def _figure(document: Document) -> bytes:
    """Drift of each row of the table, over the seeds that kept the cluster."""
    results, (column,) = spreads(document, "drift"), names(document, "column")
    retained = [(row, _survivors(results[row, column])[0]) for row in names(document, "row")]
    return dot_figure(
        [(row, value["mean"], value["std"]) for row, value in retained if value is not None],
        title="Energy lost or won in a simulation that the student drives",
        x_label="root mean square of H(t) − H(0), meV",
    )


FORCE_FIELD = Experiment(
    about="a cluster of argon: energies, forces and sampled rows of the Hessian of a larger network, at equal steps",
    cells=_cells,
    measure=_measure,
    tables=_tables,
    figure=_figure,
    prepare=_prepare,
    takes=frozenset(),
)
