"""The result of a job, printed for a person: tables that fit the terminal, and where the files are."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from jacmatch import plugins
from jacmatch.cli.verbs import verbs

SMOKE = "Smoke run: the numbers mean nothing."
_HEADINGS = {
    "accuracy": "accuracy %",
    "miou": "mIoU %",
    "rmse": "rmse",
    "top1": "agreement %",
    "jacobian_cosine": "cosine of J",
    "jacobian_relative_error": "error of J",
    "largest_output_difference": "largest difference of outputs",
    "value_relative_error": "relative error of outputs",
}
_POINTS = {"data": "at the samples", "noise": "at noisy samples", "mixed-pairs": "at mixed pairs of samples"}
_FORMATS = {"accuracy": ".1%", "miou": ".1%", "top1": ".1%", "jacobian_cosine": ".2f", "jacobian_relative_error": ".2f"}
_GAP = 2  # characters between two columns


def show(result: Mapping[str, Any]) -> None:
    """Print the result of a job on stdout."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if result.get("finished") is False:
        console.print(f"Stopped after {result['steps']} steps. Run the same command without --max-steps to resume.")
    else:
        plugins.load(verbs()[result["job"]].show)(console, result)
        if result.get("settings", {}).get("smoke"):
            console.print(SMOKE)
    for key, label in (("out", "Run folder"), ("report", "Report"), ("figure", "Figure")):
        if key in result:
            console.print(f"{label}: {result[key]}")


def print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without truncating headings or cells, at any width of the terminal.

    Headings wrap between words. Columns that do not fit follow in another table below, as in pandas.
    """
    columns = [[str(row[index]) for row in rows] for index in range(len(head))]
    label = max(map(cell_len, [*head[0].split(), *columns[0], ""]))
    label = min(label, max(console.width // 2, *(cell_len(word) for text in columns[0] for word in text.split()), 0))
    widths = [max(map(cell_len, [*heading.split(), *cells, ""])) for heading, cells in zip(head, columns, strict=True)]
    blocks: list[list[int]] = [[]]
    left = console.width - label
    for index in range(1, len(head)):
        if blocks[-1] and widths[index] + _GAP > left:
            blocks.append([])
            left = console.width - label
        blocks[-1].append(index)
        left -= widths[index] + _GAP
    for number, block in enumerate(blocks):
        if number:
            console.print()
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
        table.add_column(head[0], width=label)
        for index in block:
            table.add_column(head[index], justify="right", min_width=widths[index])
        for row in rows:
            table.add_row(str(row[0]), *(str(row[index]) for index in block))
        console.print(table, soft_wrap=False)


def students(console: Console, result: Mapping[str, Any]) -> None:
    """Print one row for the teacher and one for each method, mean ± standard deviation over the seeds."""
    measures = _measures(result["teacher"])
    keys = [*measures, *(key for key in _HEADINGS if key in result["rows"][0]["agreement"])]
    own = [_number(name, result["teacher"][name]) for name in measures]
    rows = [["teacher", *own, *[""] * (len(keys) - len(own))]]
    for row in result["rows"]:
        spreads = {**{name: row[name] for name in measures}, **row["agreement"]}
        rows.append([row["label"], *(_spread(key, spreads[key]) for key in keys)])
    print_table(console, ["test split", *(_HEADINGS[key] for key in keys)], rows)
    point = _POINTS[result["resolved"]["point"]]
    size = f"seeds: {result['rows'][0]['seeds']}, {result['seconds']:.0f} s"
    console.print(f"{result['settings']['data']}, trained {point}, {size}")


def network(console: Console, result: Mapping[str, Any]) -> None:
    """Print the accuracy, or the error, of one network."""
    size = f"{result['student']['parameters']:,} parameters, {result['seconds']:.1f} s"
    measures = _measures(result["student"]).items()
    values = ", ".join(f"{_HEADINGS[name]}: {_number(name, value)}" for name, value in measures)
    console.print(f"Test {values} ({size})")


def pair(console: Console, result: Mapping[str, Any]) -> None:
    """Print how well two networks do, and how far they agree."""
    networks = (("first", "teacher"), ("second", "student"))
    measured = ((name, measure, value) for name, key in networks for measure, value in _measures(result[key]).items())
    lines = {f"test {_HEADINGS[measure]}, {name}": _number(measure, value) for name, measure, value in measured}
    agreement = {key: value for key, value in result["agreement"].items() if value is not None}
    lines |= {_HEADINGS[key]: _number(key, value) for key, value in agreement.items()}
    width = max(map(len, lines))
    for label, text in lines.items():
        console.print(f"{label:<{width}}  {text}")
    for sample in result.get("worst", [])[:3]:
        console.print(f"test sample {sample['sample']}: cosine of J {sample['jacobian_cosine']:.2f}")


def exported(console: Console, result: Mapping[str, Any]) -> None:
    """Print the files of an export, and how much they differ from the network."""
    for name, check in result["files"].items():
        values = f"value error {check['value_relative_error']:.1e}, " if "value_relative_error" in check else ""
        cosine = f"cosine of J {check['jacobian_cosine']:.4f}, " if "jacobian_cosine" in check else ""
        console.print(f"{name}: {values}{cosine}{_bytes(float(check['bytes']))}")


def diagnosis(console: Console, result: Mapping[str, Any]) -> None:
    """Print the doctor's findings in training and in evaluation mode."""
    for mode, diagnosed in result["modes"].items():
        console.print(f"In {mode} mode: {diagnosed['says']}")


def names(console: Console, result: Mapping[str, Any]) -> None:
    """Print the names of each axis."""
    axes = {axis: ", ".join(names) for axis, names in result.items() if axis != "job"}
    indent = max(map(len, axes)) + _GAP
    for axis, text in axes.items():
        lines = textwrap.wrap(text, max(console.width - indent, 20), break_long_words=False, break_on_hyphens=False)
        for number, line in enumerate(lines or [""]):
            console.print(f"{'' if number else axis:<{indent}}{line}")


def tables(console: Console, result: Mapping[str, Any]) -> None:
    """Print what an experiment is about, and the tables of a job."""
    if "about" in result:
        console.print(f"{result['about'][0].upper()}{result['about'][1:]}.\n")
    for given in result["tables"]:
        console.print(given["title"], style="bold")
        print_table(console, given["head"], given["rows"])
        for note in given["notes"]:
            console.print(note)


def cache(console: Console, result: Mapping[str, Any]) -> None:
    """Print what a cache contains, or how much it differs from the teacher's present outputs."""
    if result["action"] == "check":
        console.print(f"{result['entries']:,} entries recomputed, equal up to rounding ({result['seconds']:.1f} s).")
        for name, largest in result["absolute"].items():
            console.print(f"  {name}: largest difference {largest:.2g}, relative {result['relative'][name]:.2g}")
        return
    if result["action"] == "build":
        done = result["shards"]
        console.print(
            f"{done['written']} shards written, {done['found']} already complete, {done['mended']} repaired, "
            f"{done['left']} left to other processes ({result['seconds']:.1f} s)."
        )
    for part in result["parts"]:
        console.print(f"\nseed {part['seed']}: {part['entries']:,} entries, {_bytes(part['bytes'])}")
        views = part["views"] if isinstance(part["views"], str) else f"{part['views']} views"
        lines = {
            "samples": f"{part['samples']:,}, {views}, {part['bytes_per_entry']:,.0f} bytes per entry",
            "stored": ", ".join(f"{name} {what}" for name, what in part["fields"].items()),
            "shards": f"{part['shards']:,}, {len(part['missing']):,} files missing" if part["missing"] else "all there",
            "made with": ", ".join(f"{name} {value}" for name, value in part["made"].items()),
            **{name: value[:12] if len(value) == 64 else value for name, value in part["fingerprint"].items()},
        }
        if part["reading"]:
            lines["reading"] = ", ".join(f"{speed:,.0f}/s in {order}" for order, speed in part["reading"].items())
        for name, value in lines.items():
            console.print(f"  {name:<22} {value}")


def _bytes(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:,.3g} {units[0]}"


def nothing(console: Console, result: Mapping[str, Any]) -> None:
    """Print nothing: `show` prints the path of the report."""


def _measures(network: Mapping[str, Any]) -> dict[str, float]:
    return {name: network[name] for name in ("accuracy", "miou", "rmse") if name in network}


def _number(key: str, value: float) -> str:
    return format(value, _FORMATS.get(key, ".3g")).rstrip("%")


def _spread(key: str, spread: Mapping[str, Any]) -> str:
    mean, std = spread["mean"], spread["std"]
    return _number(key, mean) + ("" if std is None else f" ± {_number(key, std)}")
