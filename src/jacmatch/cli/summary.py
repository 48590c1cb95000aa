"""What a job found, as a person reads it."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_MEASURES = {
    "top1": "agreement",
    "jacobian_cosine": "Jacobian cosine",
    "jacobian_relative_error": "Jacobian error",
    "largest_output_difference": "largest difference",
}


def show(result: Mapping[str, Any]) -> None:
    """Prints the result of a job on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    if result.get("finished") is False:
        console.print(f"Stopped after {result['steps']} steps. The same command without --max-steps goes on.")
    else:
        SHOWN[result["job"]](console, result)
    for key, what in (("out", "Run folder"), ("report", "Report")):
        if key in result:
            console.print(f"{what}: {result[key]}", markup=False)


def _students(console: Console, result: Mapping[str, Any]) -> None:
    """One row for the teacher and one for each method, mean ± standard deviation over the seeds."""
    measure = _measure(result["teacher"])
    seeds = result["rows"][0]["seeds"]
    table = Table(box=SIMPLE_HEAD, title=f"{result['settings']['data']}, {seeds} seed(s)", title_justify="left")
    table.add_column("")
    keys = [key for key in _MEASURES if key in result["rows"][0]["agreement"]]
    for heading in (f"test {measure}", *(_MEASURES[key] for key in keys), "seconds"):
        table.add_column(heading, justify="right")
    table.add_row("teacher", _number(result["teacher"][measure]), *([""] * (len(keys) + 1)))
    for row in result["rows"]:
        spreads = [row[measure], *(row["agreement"][key] for key in keys), row["seconds"]]
        table.add_row(row["label"], *map(_spread, spreads))
    console.print(table)


def _network(console: Console, result: Mapping[str, Any]) -> None:
    measure = _measure(result["student"])
    size = f"{result['student']['parameters']:,} parameters, {result['seconds']:.1f} s"
    console.print(f"Test {measure} {_number(result['student'][measure])} ({size})")


def _pair(console: Console, result: Mapping[str, Any]) -> None:
    measure = _measure(result["teacher"])
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, who in (("first", "teacher"), ("second", "student")):
        table.add_row(f"test {measure} of the {name}", _number(result[who][measure]))
    for key, value in result["agreement"].items():
        table.add_row(_MEASURES.get(key, key), "-" if value is None else _number(value))
    console.print(table)


def _diagnosis(console: Console, result: Mapping[str, Any]) -> None:
    for mode, found in result["modes"].items():
        console.print(f"In {mode} mode: {found['says']}", markup=False)


def _names(console: Console, result: Mapping[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for axis, names in result.items():
        if axis != "job":
            table.add_row(axis, ", ".join(names))
    Console(highlight=False).print(table, markup=False)


def _nothing(console: Console, result: Mapping[str, Any]) -> None:
    """The path of the report says it all."""


SHOWN = {
    "distill": _students,
    "train": _network,
    "evaluate": _network,
    "compare": _pair,
    "doctor": _diagnosis,
    "report": _nothing,
    "list": _names,
}


def _measure(network: Mapping[str, Any]) -> str:
    return "accuracy" if "accuracy" in network else "rmse"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _spread(spread: Mapping[str, Any]) -> str:
    mean, std = spread["mean"], spread["std"]
    return _number(mean) if std is None else f"{_number(mean)} ± {std:.2g}"
