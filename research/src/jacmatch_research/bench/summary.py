"""The results of `jacmatch bench` as tables for the terminal."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def benchmarks(console: Console, result: Mapping[str, Any]) -> None:
    """Print a table for each claim with a row for each case; cases without a measurement are listed below."""
    for name, document in result["benchmarks"].items():
        console.print(f"[bold]{name}[/bold]: {document['about']} ({document['seconds']:.0f} s)\n")
        if document["quick"]:
            console.print("Smoke run: the numbers mean nothing.\n")
        for claim, rows in groupby(document["rows"], lambda row: row["claim"]):
            _claim(console, claim, list(rows))


def _claim(console: Console, claim: str, rows: Sequence[Mapping[str, Any]]) -> None:
    measured = [row for row in rows if row["why_empty"] is None]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for heading in ("", "median", "quartiles", "n", "bound", "aim", "lower limit", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for row in measured:
        median, low, high, *bounds = (
            "" if row[key] is None else _ratio(row[key]) for key in ("median", "low", "high", "must", "aim", "floor")
        )
        verdict = {None: "", True: "met", False: "not met"}[row["met"]]
        table.add_row(f"{row['case']}, {row['device']}", median, f"{low}–{high}", str(row["n"]), *bounds, verdict)
    console.print(claim, markup=False)
    if measured:
        console.print(table)
    for (device, reason), empty in groupby(
        sorted((row["device"], row["why_empty"]) for row in rows if row["why_empty"] is not None)
    ):
        console.print(f"{device}: {len(list(empty))} row(s) empty: {reason}", markup=False)
    console.print()


def _ratio(value: float) -> str:
    """Two decimals, or two digits of a small number."""
    return format(value, ".2f" if value >= 0.1 else ".2g")
