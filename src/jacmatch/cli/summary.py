"""What a job found, as a person reads it."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jacmatch import plugins

_HEADINGS = {
    "accuracy": "accuracy %",
    "rmse": "rmse",
    "top1": "agreement %",
    "jacobian_cosine": "cosine of J",
    "jacobian_relative_error": "error of J",
    "largest_output_difference": "largest difference of outputs",
}
_PLACES = {"data": "at the data", "noise": "at noisy data", "mixed-pairs": "between pairs of the data"}
_FORMATS = {"accuracy": ".1%", "top1": ".1%", "jacobian_cosine": ".2f", "jacobian_relative_error": ".2f"}


def show(result: Mapping[str, Any]) -> None:
    """Prints the result of a job on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    if result.get("finished") is False:
        console.print(f"Stopped after {result['steps']} steps. The same command without --max-steps goes on.")
    else:
        job = result["job"]
        display = SHOWN[job] if job in SHOWN else plugins.load(plugins.verbs()[job].show)
        display(console, result)
    for key, what in (("out", "Run folder"), ("report", "Report"), ("figure", "Figure")):
        if key in result:
            console.print(f"{what}: {result[key]}", markup=False)


def _students(console: Console, result: Mapping[str, Any]) -> None:
    """One row for the teacher and one for each method, mean ± standard deviation over the seeds."""
    measure = _measure(result["teacher"])
    keys = [measure, *(key for key in _HEADINGS if key in result["rows"][0]["agreement"])]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    table.add_column("on the test part", no_wrap=True)
    for key in keys:
        table.add_column(_HEADINGS[key], justify="right")
    table.add_row("teacher", _number(measure, result["teacher"][measure]))
    for row in result["rows"]:
        spreads = {measure: row[measure], **row["agreement"]}
        table.add_row(row["label"], *(_spread(key, spreads[key]) for key in keys))
    console.print(table)
    where = _PLACES[result["resolved"]["point"]]
    size = f"{result['rows'][0]['seeds']} seed(s), {result['seconds']:.0f} s"
    console.print(f"{result['settings']['data']}, trained {where}, {size}")


def _network(console: Console, result: Mapping[str, Any]) -> None:
    measure = _measure(result["student"])
    size = f"{result['student']['parameters']:,} parameters, {result['seconds']:.1f} s"
    console.print(f"Test {_HEADINGS[measure]}: {_number(measure, result['student'][measure])} ({size})")


def _pair(console: Console, result: Mapping[str, Any]) -> None:
    measure = _measure(result["teacher"])
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, who in (("first", "teacher"), ("second", "student")):
        table.add_row(f"test {_HEADINGS[measure]}, {name}", _number(measure, result[who][measure]))
    for key, value in result["agreement"].items():
        if value is not None:
            table.add_row(_HEADINGS[key], _number(key, value))
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


def tables(console: Console, result: Mapping[str, Any]) -> None:
    """What an experiment is about, and the tables of a job."""
    if "about" in result:
        console.print(f"{result['about'][0].upper()}{result['about'][1:]}.\n", markup=False)
    for given in result["tables"]:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False, title_justify="left")
        for number, heading in enumerate(given["head"]):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not number, min_width=5)
        for row in given["rows"]:
            table.add_row(*row)
        console.print(f"[bold]{given['title']}[/bold]")
        console.print(table)
        for note in given["notes"]:
            console.print(note, markup=False)


def _cache(console: Console, result: Mapping[str, Any]) -> None:
    """What a cache holds, or how far it is from what the teacher says now."""
    if result["action"] == "check":
        console.print(f"{result['entries']:,} entries asked again, all within rounding ({result['seconds']:.1f} s).")
        for name, largest in result["absolute"].items():
            console.print(f"  {name}: largest difference {largest:.2g}, relative {result['relative'][name]:.2g}")
        return
    if result["action"] == "build":
        done = result["shards"]
        console.print(
            f"{done['written']} shards written, {done['found']} found whole, {done['mended']} mended, {done['left']} "
            f"left to other processes ({result['seconds']:.1f} s)."
        )
    for part in result["parts"]:
        console.print(f"\n[bold]seed {part['seed']}[/bold]: {part['entries']:,} entries, {_bytes(part['bytes'])}")
        views = part["views"] if isinstance(part["views"], str) else f"{part['views']} views"
        lines = {
            "samples": f"{part['samples']:,}, {views}, {part['bytes_per_entry']:,.0f} bytes an entry",
            "stored": ", ".join(f"{name} {what}" for name, what in part["fields"].items()),
            "shards": f"{part['shards']:,}, {len(part['missing']):,} files missing" if part["missing"] else "all there",
            "made with": ", ".join(f"{name} {value}" for name, value in part["made"].items()),
            **{name: value[:12] if len(value) == 64 else value for name, value in part["fingerprint"].items()},
        }
        if part["reading"]:
            lines["reading"] = ", ".join(f"{speed:,.0f}/s in {order}" for order, speed in part["reading"].items())
        for name, value in lines.items():
            console.print(f"  {name:<22} {value}", markup=False)


def _bytes(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:,.3g} {units[0]}"


def _nothing(console: Console, result: Mapping[str, Any]) -> None:
    """The path of the report says it all."""


SHOWN = {
    "distill": _students,
    "train": _network,
    "robust": tables,
    "transfer": tables,
    "surrogate": tables,
    "cache": _cache,
    "evaluate": _network,
    "compare": _pair,
    "doctor": _diagnosis,
    "report": _nothing,
    "list": _names,
}


def _measure(network: Mapping[str, Any]) -> str:
    return "accuracy" if "accuracy" in network else "rmse"


def _number(key: str, value: float) -> str:
    return format(value, _FORMATS.get(key, ".3g")).rstrip("%")


def _spread(key: str, spread: Mapping[str, Any]) -> str:
    mean, std = spread["mean"], spread["std"]
    return _number(key, mean) + ("" if std is None else f" ± {_number(key, std)}")
