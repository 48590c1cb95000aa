"""Tables of experiments, made from the stored results of their cells: mean ± standard deviation over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from jacmatch.report import Table
from jacmatch.report.tables import NOTHING, Spread, entry
from jacmatch.runs import spread

Document = Mapping[str, Any]
"""The `results.json` of an experiment: `cells` is a list of row, column, seed, `measures` and seconds."""


def spreads(document: Document, measure: str) -> dict[tuple[str, str], Spread]:
    """Mean, standard deviation, values and `seeds` of a measure for each (row, column), in the order of the cells."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for cell in sorted(document["cells"], key=lambda cell: cell["seed"]):
        value = cell["measures"].get(measure)
        if value is not None:
            values.setdefault((cell["row"], cell["column"]), {})[cell["seed"]] = value
    return {key: _by_seed(each) for key, each in values.items()}


def _by_seed(values: Mapping[int, float]) -> Spread:
    return {**spread(list(values.values())), "seeds": list(values)}


def names(document: Document, axis: str) -> list[str]:
    """The rows or the columns (`axis` is `row` or `column`) of a document, in the order they were requested."""
    return list(dict.fromkeys(cell[axis] for cell in document["cells"]))


def grid(
    document: Document,
    measure: str,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    scale: float | int = 100,
    digits: int = 1,
) -> list[tuple[str, ...]]:
    """The rows of a table: the name of each row, and a mean ± standard deviation for each column.

    By default all rows and columns, in their order; the factor 100 gives percent.
    """
    results = spreads(document, measure)
    across = names(document, "column") if columns is None else columns
    down = names(document, "row") if rows is None else rows
    return [(row, *(entry(results.get((row, column)), scale, digits) for column in across)) for row in down]


def published_row(row: str, values: Mapping[str, float], columns: Sequence[str]) -> tuple[str, ...]:
    """A row of published numbers, in the columns that they belong to."""
    return (row, *(NOTHING if values.get(column) is None else f"{values[column]:.2f}" for column in columns))


def gains(document: Document, row: str, than: str, measure: str = "accuracy") -> tuple[str, ...]:
    """A row of the table: the difference of two rows, seed by seed, mean ± standard deviation in points."""
    results = spreads(document, measure)
    pairs = [(results.get((row, column)), results.get((than, column))) for column in names(document, "column")]
    return (f"gain: {row} − {than}", *(signed(paired(*pair)) for pair in pairs))


def paired(one: Spread | None, other: Spread | None) -> Spread | None:
    """The spread of the differences, seed by seed, of two entries of `spreads`; None where the other lacks one."""
    if one is None or other is None or not set(one["seeds"]) <= set(other["seeds"]):
        return None
    subtrahend = dict(zip(other["seeds"], other["values"], strict=True))
    minuend = zip(one["seeds"], one["values"], strict=True)
    return _by_seed({seed: value - subtrahend[seed] for seed, value in minuend})


def signed(value: Spread | None) -> str:
    """Return a difference with its sign; a dash where nothing was measured."""
    text = entry(value)
    return text if value is None or value["mean"] < 0 else f"+{text}"


FIDELITY = {
    "accuracy": ("accuracy %", 100, 1),
    "top1": ("agreement %", 100, 1),
    "jacobian_cosine": ("cosine of J", 1, 2),
    "jacobian_relative_error": ("error of J", 1, 2),
    "calibration_error": ("ECE %", 100, 1),
    "noisy_accuracy": ("under noise %", 100, 1),
}
"""Measures of a student besides accuracy: heading, factor, digits."""


def fidelity(document: Document) -> Table:
    """The table of agreement, calibration and robustness: every measure of every row and column."""
    measures = [name for name in FIDELITY if any(name in cell["measures"] for cell in document["cells"])]
    results = {name: spreads(document, name) for name in measures}
    rows = [
        (f"n = {column}: {row}", *(entry(results[name].get((row, column)), *FIDELITY[name][1:]) for name in measures))
        for column in names(document, "column")
        for row in names(document, "row")
    ]
    notes = (
        "Agreement: fraction of test images with the teacher's top class. Cosine: of the two Jacobian rows of the "
        "teacher's top class; error: ‖J_S − J_T‖ / ‖J_T‖ over all rows. ECE: expected calibration error, 15 bins. "
        "Noise: Gaussian, with a standard deviation of 0.2 of that of the data.",
        origin(document),
    )
    head = ("n and row", *(FIDELITY[name][0] for name in measures))
    return Table("fidelity", "What is transferred besides accuracy", head, tuple(rows), notes)


def seeds_of(document: Document) -> str:
    """Return the number of seeds of the cells as text: `5` or `3 to 5`."""
    counts = sorted({len(value["values"]) for value in spreads(document, _any_measure(document)).values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def origin(document: Document) -> str:
    """Data and size of a document, and all machines and versions that its cells were measured with, as sentences."""
    made = [cell.get("made", document["environment"]) for cell in document["cells"]] or [document["environment"]]
    machines = [each["cuda"] or f"CPU, one thread ({each['platform'].partition('-')[0]})" for each in made]
    versions = [f"{name} {_distinct([each[name] for each in made])}" for name in ("torch", "jacmatch")]
    return (
        f"Data: {document['settings']['data']}. Size: {document['size']}. Seeds: {seeds_of(document)}. "
        f"{_distinct(machines)}, {', '.join(versions)}."
    )


def _distinct(values: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))


def _any_measure(document: Document) -> str:
    first: str = next(iter(document["cells"][0]["measures"]))
    return first
