"""Small networks for the energy of a cluster: the gain from forces and Hessian rows of a larger one."""

from collections.abc import Mapping
from typing import Any

from jacmatch.jobs.study import Progress
from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, Spread, entry
from jacmatch.runs import spread
from jacmatch_research.figures import Line, line_figure
from jacmatch_research.reproduce.equal_error import made
from jacmatch_research.reproduce.experiment import Cell, Experiment, Measures, Request
from jacmatch_research.systems.force_field.learning import STEP, configurations, errors, simulated, teacher, trained
from jacmatch_research.systems.force_field.lennard_jones import ARGON
from jacmatch_research.tables import Document, names, paired, seeds_of, spreads

ENERGIES, FORCES, ADAM = "energies", "+ forces", "+ forces, Adam"
ROW, ROWS = "+ forces + 1 Hessian row", "+ forces + 4 Hessian rows"
METHODS: dict[str, Mapping[str, Any]] = {
    ENERGIES: {"forces": False, "rows": 0},
    FORCES: {"forces": True, "rows": 0},
    ROW: {"forces": True, "rows": 1},
    ROWS: {"forces": True, "rows": 4},
    ADAM: {"forces": True, "rows": 0},
}
"""The quantities that are matched."""
EVALUATIONS: dict[str, dict[int, dict[str, int]]] = {
    "smoke": {16: {ENERGIES: 9, FORCES: 9, ROW: 6, ROWS: 6}},
    "cpu": {
        5: {FORCES: 1360, ROW: 500, ROWS: 270},
        20: {FORCES: 1030, ROW: 350, ROWS: 170},
        50: {ENERGIES: 3000, FORCES: 840, ROW: 320, ROWS: 136},
    },
}
"""Evaluations of the last fit, by configurations: about as many processor seconds for each method."""
_STEPS = {"smoke": (16, 8), "cpu": (50, 1700)}
"""Configurations at which Adam is compared, and its steps: about as many processor seconds again."""
_SIZES: dict[str, dict[str, int]] = {
    "smoke": {"simulated": 20, "clusters": 2, "tested": 10, "pool": 32, "pool_steps": 8},
    "cpu": {"simulated": 2000, "clusters": 8, "tested": 200, "pool": 1000, "pool_steps": 2000},
}
LOST = 1000
"""A drift in meV that no bound cluster can have: its binding energy is 170."""
MEASURES = {
    "force": ("forces, meV/Å", 3),
    "hessian": ("Hessian, meV/Å²", 2),
    "energy": ("energy, meV", 2),
    "drift": ("drift, meV", 3),
    "own": ("own energy, meV", 4),
    "evaluations": ("evaluations", 0),
    "cpu_seconds": ("processor seconds", 1),
}
"""Headings and digits."""


def _cells(request: Request) -> list[Cell]:
    size = "smoke" if request.smoke else "cpu"
    of_adam, steps = _STEPS[size]
    return [
        Cell(method, str(count), seed, {**_SIZES[size], **METHODS[method], "configurations": count, **length})
        for seed in request.seed_numbers(5)
        for count, evaluations in EVALUATIONS[size].items()
        for method, length in (
            *((method, {"evaluations": number}) for method, number in evaluations.items()),
            *([(ADAM, {"steps": steps})] if count == of_adam else []),
        )
    ]


def _prepare(request: Request, progress: Progress) -> dict[str, Any]:
    """Return the teacher's own errors, for comparison."""
    size = _SIZES["smoke" if request.smoke else "cpu"]
    results = errors(teacher(size["pool"], size["pool_steps"]), size["tested"])
    return {"teacher": {name: round(value, 6) for name, value in results.items()}}


def _measure(request: Request, cell: Cell, facts: Mapping[str, Any]) -> Measures:
    """Errors of a student, and the drift of the energy in a simulation with it."""
    options = cell.settings
    student, training = trained(
        configurations(options["configurations"], seed=cell.seed),
        teacher(options["pool"], options["pool_steps"]),
        seed=cell.seed,
        **{name: options[name] for name in ("forces", "rows", "evaluations", "steps") if name in options},
    )
    motion = simulated(student, clusters=options["clusters"], steps=options["simulated"], seed=cell.seed)
    return {**errors(student, options["tested"]), **motion, **training}


def _tables(document: Document) -> list[Table]:
    results = {name: spreads(document, name) for name in MEASURES}
    columns = names(document, "column")
    own = document["facts"]["teacher"]
    options = document["cells"][0]["settings"]
    rows = [
        (
            f"n = {column}: {row}",
            *(_entry(results[name].get((row, column)), name, digits) for name, (_, digits) in MEASURES.items()),
        )
        for column in columns
        for row in METHODS
        if (row, column) in results["force"]
    ]
    examples = ("the teacher", *(f"{own[n]:.{d}f}" if n in own else NOTHING for n, (_, d) in MEASURES.items()))
    time_step = STEP * ARGON.time * 1e15
    notes = (
        f"Seven argon atoms, n configurations, mean ± standard deviation over seeds: {seeds_of(document)}. "
        f"Errors against the potential at {options['tested']} new configurations, where the forces have a standard "
        f"deviation of {own['force_std']:.2f} meV/Å.",
        f"Drift: root mean square of H(t) − H(0), H with the potential's energy, over {options['simulated']:,} steps "
        f"of {time_step:.1f} fs in {options['clusters']} clusters; own energy: the same with the network's. Lost: "
        f"seeds in which H changed by more than {LOST} meV because atoms collided; the mean leaves them out.",
        made(document, "CPU, one thread, with other work running"),
    )
    head = ("configurations and what is matched", *(heading for heading, _ in MEASURES.values()))
    differences = tuple(
        (
            f"n = {column}: {row} − {FORCES}",
            *(
                entry(paired(results[name].get((row, column)), results[name].get((FORCES, column))), 1, 3)
                for name in ("force", "hessian", "drift")
            ),
        )
        for column in columns
        for row in (ROW, ROWS)
    )
    gains = Table(
        "gain",
        "Change of the error by rows of the Hessian, seed by seed, at equal processor time",
        ("difference", *(MEASURES[name][0] for name in ("force", "hessian", "drift"))),
        differences,
        ("Negative: the rows lower the error.",),
    )
    title = "Errors of students at equal processor time"
    return [Table("force-field", title, head, (*rows, examples), notes), gains]


def _entry(value: Spread | None, name: str, digits: int) -> str:
    """A mean ± standard deviation; for a drift, over the seeds with a stable cluster, and the number of others."""
    if value is None or name != "drift":
        return entry(value, 1, digits)
    retained, lost = _survivors(value)
    predicted = [entry(retained, 1, digits)] * (retained is not None) + [f"{lost} lost"] * (lost > 0)
    return ", ".join(predicted)


def _survivors(value: Spread) -> tuple[Spread | None, int]:
    """A drift over the seeds in which the cluster was stable, and the number of the others."""
    values = [each for each in value["values"] if each <= LOST]
    return (spread(values) if values else None), len(value["values"]) - len(values)


def _figure(document: Document) -> bytes:
    """Errors of forces and Hessian over the number of configurations, and the drift of the seeds that lost no atom."""
    panels = []
    for name, heading in (("force", "forces, meV/Å"), ("hessian", "Hessian, meV/Å²"), ("drift", "drift, meV")):
        results, lines = spreads(document, name), []
        for row in (FORCES, ROW, ROWS):
            points = [(float(c), _survivors(results[row, c])[0]) for c in names(document, "column")]
            have = [(x, value) for x, value in points if value is not None]
            stds = [value["std"] or 0.0 for _, value in have]
            lines.append(Line(row, [x for x, _ in have], [value["mean"] for _, value in have], stds))
        panels.append((heading, lines))
    return line_figure(panels, x_label="configurations", y_label="", log_x=True, log_y=True)


_ABOUT = "a cluster of argon: energies, forces and rows of the Hessian of a larger network, at equal processor time"
FORCE_FIELD = Experiment(_ABOUT, _cells, _measure, _tables, _figure, _prepare)
