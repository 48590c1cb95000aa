"""Puts the measured tables into the pages: what stands between two marks is made of the file that the first one names.

<!-- table results/distillation-cifar10-cpu/accuracy.md -->
...
<!-- end of table -->

A Markdown file is taken as it is; of several (`results/defaults-*-cpu/settings.md`) the rows stand below each other and
the notes are joined. The result of a benchmark (`benchmarks/results/NAME.json`) becomes a table of its rows, the folder
of them a table of the claims, and `benchmarks/targets.json` a table of what was to be reached. The table of the sweep
(`tests/sweep/table.csv`) is counted. Run it after something was measured again: `python docs/tables.py`. A test holds
that it changes nothing.
"""

import csv
import json
import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- table (?P<file>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
ORDER = ("step", "products", "attention", "directions", "memory", "chunks", "cache", "scale", "loop", "peers")
Row = dict[str, Any]


def filled(page: str) -> str:
    """The page with its tables as they are in their files."""
    return MARKED.sub(lambda match: f"{match[1]}{_table(DOCS / match['file'])}{match[3]}", page)


def pages() -> list[Path]:
    """README and all pages of the documentation."""
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def _table(path: Path) -> str:
    if "*" in str(path):
        return _one_below_the_other(sorted(DOCS.glob(str(path.relative_to(DOCS)))))
    if not path.suffix:
        return _claims([row for name in ORDER for row in _rows(path / f"{name}.json")])
    if path.suffix == ".csv":
        return _sweep(path)
    if path.name == "surrogate-peers.json":
        return _surrogates(path)
    if path.name == "surrogate-coverage.json":
        return _coverage(path)
    if path.name == "surrogate-speed.json":
        return _speed(path)
    if path.name == "surrogate-solvers.json":
        return _solvers(path)
    if path.name == "surrogate-functions.json":
        return _functions(path)
    if path.name == "targets.json":
        return _targets(path)
    if path.name == "profile.json":
        return _profile(path)
    return _cases(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")


def _one_below_the_other(files: list[Path]) -> str:
    """One table of those in several Markdown files, which have the same title and head."""
    pages = [file.read_text(encoding="utf-8").splitlines() for file in files]
    body = [line for page in pages for line in [line for line in page if line.startswith("|")][2:]]
    first = next(number for number, line in enumerate(pages[0]) if line.startswith("|"))
    notes = dict.fromkeys(line for page in pages for line in page[first:] if line and not line.startswith("|"))
    return "\n".join([*pages[0][: first + 2], *body, *(f"\n{note}" for note in notes), ""])


def _rows(path: Path) -> list[Row]:
    """The rows of a result; those of a GPU are taken from `cuda/` beside it, where they were measured elsewhere."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    other = path.parent / "cuda" / path.name
    if other.is_file():
        rows = [row for row in rows if row["device"] != "cuda"] + json.loads(other.read_text(encoding="utf-8"))["rows"]
        rows.sort(key=lambda row, order=[row["claim"] for row in rows]: order.index(row["claim"]))
    return rows


def _claims(rows: list[Row]) -> str:
    """A line for each claim that has a bound: the bound, and the range of the medians of its rows by device."""
    measured = {row["device"] for row in rows if row["why_empty"] is None}
    devices = [device for device in ("cpu", "cuda") if device == "cpu" or device in measured]
    heads = [f"measured ({'CPU' if device == 'cpu' else 'GPU'})" for device in devices]
    lines = [f"| claim | bound | aim | {' | '.join(heads)} |", f"| --- | ---: | ---: |{' ---: |' * len(heads)}"]
    for claim, each in groupby(rows, lambda row: row["claim"]):
        mine = list(each)
        if any(row["must"] is not None for row in mine):
            sign = "≤" if mine[0]["better"] == "lower" else "≥"
            must, aim = (_range([row[key] for row in mine], sign) for key in ("must", "aim"))
            cells = [_summary([row for row in mine if row["device"] == device]) for device in devices]
            lines.append(f"| {claim} | {must} | {aim} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(values: list[float | None], sign: str = "") -> str:
    """The values from smallest to largest, without those that are not there."""
    numbers = sorted({value for value in values if value is not None})
    ends = dict.fromkeys(_shown(number) for number in (numbers[:1] + numbers[-1:]))
    return " ".join(filter(None, (sign, "–".join(ends)))) if ends else ""


def _shown(value: float) -> str:
    """Two decimals, or two digits of a small number."""
    return format(value, ".2f" if value >= 0.1 else ".2g")


def _summary(rows: list[Row]) -> str:
    measured = [row for row in rows if row["why_empty"] is None]
    if not measured:
        return "; ".join(dict.fromkeys(row["why_empty"] for row in rows)) or "–"
    met = sum(bool(row["met"]) for row in measured)
    count = "" if met == len(measured) == 1 else f" ({met} of {len(measured)} met)"
    return f"**{_range([row['median'] for row in measured])}**{count}"


def _surrogates(path: Path) -> str:
    """Errors of values / partials of each surrogate, means over the seeds of all; and how often `auto` is best."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = ("auto", "gekpls", "kriging", "genn", "jenn")
    heads = (*names, "fit, s", "partials, µs", "kriging's ÷", "gekpls's ÷")
    lines = [f"| function | points | seeds | {' | '.join(heads)} |", f"| --- | ---: | ---: |{' ---: |' * len(heads)}"]
    counted: dict[str, list[list[bool | float | None]]] = {}
    rows = dict.fromkeys(tuple(key.split("/")[:2]) for key in cells if key.endswith("/auto"))
    for problem, size in sorted(rows, key=lambda row: (int(row[1]), row[0])):
        seeds = [n for n in range(9) if all(f"{problem}/{size}/{n}/{name}" in cells for name in names)]
        means: dict[str, dict[str, float]] = {}
        failed: dict[str, str] = {}
        for name in names:
            mine = [cells[f"{problem}/{size}/{seed}/{name}"] for seed in seeds]
            known = [cell for cell in mine if "values" in cell]
            if known:
                means[name] = {what: sum(cell[what] for cell in known) / len(known) for what in known[0]}
            elif mine:
                failed[name] = mine[0]["failed"].partition(": ")[2]
        peers = [means[name] for name in names[1:] if name in means]
        if len(means) + len(failed) < len(names):
            continue
        auto, best = means["auto"], min(peers, key=lambda peer: peer["values"])
        speeds = [
            means[name]["partials_seconds"] / auto["partials_seconds"] if name in means else None
            for name in ("kriging", "gekpls")
        ]
        values, partials = (auto[what] <= min(peer[what] for peer in peers) for what in ("values", "partials"))
        jenn = all(auto[what] <= means["jenn"][what] for what in ("values", "partials"))
        fast = auto["fit_seconds"] <= max(10, best["fit_seconds"])
        counted.setdefault(size, []).append(
            [values, partials, jenn, fast, *(speed and speed >= 1000 for speed in speeds)]
        )
        entries = [
            " / ".join(
                format(means[name][what], ".0f" if means[name][what] >= 10 else ".2g")
                for what in ("values", "partials")
            )
            if name in means
            else failed[name]
            for name in names
        ]
        entries += [f"{auto['fit_seconds']:.1f}", f"{1e6 * auto['partials_seconds']:.2g}"]
        entries += ["–" if speed is None else f"{speed:,.0f}" for speed in speeds]
        lines.append(f"| {problem} | {size} | {len(seeds)} | {' | '.join(entries)} |")
    claims = ["values", "partials", "both not above JENN", "fit"]
    claims += [
        f"partials ≥ 1,000 times faster than {name}" for name in ("Kriging of values", "gradient-enhanced Kriging")
    ]
    lines += ["", f"| points | problems | {' | '.join(claims)} |", f"| ---: | ---: |{' ---: |' * len(claims)}"]
    for size, each in counted.items():
        known = [[bool(entry) for entry in column if entry is not None] for column in zip(*each, strict=True)]
        counts = [f"{sum(met)}" + (f" of {len(met)}" if len(met) < len(each) else "") for met in known]
        lines.append(f"| {size} | {len(each)} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def _speed(path: Path) -> str:
    """Microseconds of all partials of a point, their error, and how many times longer Kriging takes."""
    lines = ["| function | model | partials, µs | Kriging's ÷ | error, % |", "| --- | --- | ---: | ---: | ---: |"]
    for problem, models in json.loads(path.read_text(encoding="utf-8"))["cells"].items():
        for name, cell in models.items():
            ratio = models["kriging"]["microseconds"] / cell["microseconds"]
            time = format(cell["microseconds"], ".2f" if cell["microseconds"] < 10 else ",.0f")
            lines.append(f"| {problem} | {name} | {time} | {ratio:,.0f} | {cell['partials']:.2g} |")
    return "\n".join(lines) + "\n"


def _functions(path: Path) -> str:
    """Errors of values / partials, in %, means over the seeds, with and without partials."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    methods = ("estimator/values", "estimator/values + partials", "job/values", "job/values + partials")
    names = dict.fromkeys(key.split("/")[0] for key in cells)
    lines = [f"| function | seeds | {' | '.join(each.replace('/', ': ') for each in methods)} |"]
    lines.append(f"| --- | ---: |{' ---: |' * len(methods)}")
    for name in names:
        entries, counts = [], []
        for method in methods:
            mine = [cells[key] for n in range(9) if (key := f"{name}/{n}/{method}") in cells]
            means = [sum(cell[what] for cell in mine) / len(mine) for what in ("values", "partials") if mine]
            entries.append(" / ".join(format(each, ".0f" if each >= 10 else ".2g") for each in means) or "–")
            counts += [len(mine)] if mine else []
        lines.append(f"| {name} | {min(counts)} | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def _solvers(path: Path) -> str:
    """Errors of the values in %, means over the seeds, of each solver in the same time; the lowest is bold."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    solvers = {"scipy": "SciPy L-BFGS-B", "torch": "torch L-BFGS", "levenberg-marquardt": "Levenberg–Marquardt"}
    lines = [f"| function | width | seeds | seconds | {' | '.join(solvers.values())} |"]
    lines.append(f"| --- | ---: | ---: | ---: |{' ---: |' * len(solvers)}")
    for name, width in dict.fromkeys((cell["problem"], cell["width"]) for cell in cells):
        mine = [cell for cell in cells if (cell["problem"], cell["width"]) == (name, width)]
        means = [sum(cell["solvers"][solver]["values"] for cell in mine) / len(mine) for solver in solvers]
        shown = [f"**{mean:.2g}**" if mean == min(means) else f"{mean:.2g}" for mean in means]
        seconds = sum(cell["seconds"] for cell in mine) / len(mine)
        lines.append(f"| {name} | {width} | {len(mine)} | {seconds:.1f} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _coverage(path: Path) -> str:
    """Coverage of the 90 % interval, mean and range over the seeds, and the error in % of the standard deviation."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = ["| function | points | model | seeds | coverage, % | lowest–highest | error, % |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    keys = [key.split("/") for key in cells]
    for function, size, method in dict.fromkeys((key[0], key[1], key[3]) for key in keys):
        mine = [cells["/".join(key)] for key in keys if (key[0], key[1], key[3]) == (function, size, method)]
        coverage = [100 * cell["coverage"] for cell in mine]
        error = sum(cell["error"] for cell in mine) / len(mine)
        shown = f"{sum(coverage) / len(mine):.0f} | {min(coverage):.0f}–{max(coverage):.0f} | {error:.2g}"
        lines.append(f"| {function} | {size} | {method} | {len(mine)} | {shown} |")
    return "\n".join(lines) + "\n"


def _profile(path: Path) -> str:
    """Milliseconds of the longest operators of each step, the sum of all operators in the last line."""
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["why_empty"] is None]
    columns = {row["case"]: {name: ms for name, ms in row["details"].items() if name != "batch"} for row in rows}
    names = dict.fromkeys(name for column in reversed(columns.values()) for name in column if name != "all")
    lines = [f"| milliseconds in | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name in (*names, "all"):
        shown = f"`{name}`" if name != "all" else "all operators"
        cells = (format(column[name], ".0f") if name in column else "–" for column in columns.values())
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _targets(path: Path) -> str:
    """A line for each target: the ratio before the work on it, the one to reach, and what its row of a result says."""
    lines = [
        "| ratio | before | reach | measured | quartiles | n | met |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for target in json.loads(path.read_text(encoding="utf-8")):
        rows = _rows(path.parent / "results" / f"{target['file']}.json")
        mine = [row for row in rows if (row["claim"], row["case"]) == (target["claim"], target["case"])]
        measured = next((row for row in mine if row["device"] == "cpu" and row["median"] is not None), None)
        cells = " | ".join(_shown(target[key]) for key in ("before", "reach"))
        if measured is None:
            lines.append(f"| {target['work']} | {cells} | – | – | – | – |")
            continue
        median, low, high = (_shown(measured[key]) for key in ("median", "low", "high"))
        met = "yes" if measured["median"] <= target["reach"] else "no"
        lines.append(f"| {target['work']} | {cells} | {median} | {low}–{high} | {measured['n']} | {met} |")
    return "\n".join(lines) + "\n"


def _cases(path: Path) -> str:
    """A line for each row that was measured, and one for the reasons why others are empty."""
    lines = [
        "| ratio | median | quartiles | n | bound | lower limit | met |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    empty = []
    for claim, each in groupby(_rows(path), lambda row: row["claim"]):
        lines.append(f"| **{claim}** | | | | | | |")
        for row in each:
            if row["why_empty"] is not None:
                empty.append(f"{row['device']}: {row['why_empty']}")
                continue
            median, low, high, must, floor = (
                "" if row[key] is None else _shown(row[key]) for key in ("median", "low", "high", "must", "floor")
            )
            met = {None: "", True: "yes", False: "no"}[row["met"]]
            case = f"{row['case']}, {row['device']}"
            lines.append(f"| {case} | {median} | {low}–{high} | {row['n']} | {must} | {floor} | {met} |")
    counts = [f"{empty.count(reason)} ({reason})" for reason in dict.fromkeys(empty)]
    return "\n".join(lines) + "\n" + (f"\nEmpty rows: {', '.join(counts)}.\n" if counts else "")


VERDICTS = ("right", "refused", "wrong", "raw", "none")
DERIVATIVES = {
    "vjp": "`vjp`",
    "auto": "`jvp`, `auto`",
    "forward": "`jvp`, `forward`",
    "reverse": "`jvp`, `reverse`",
    "differences": "`jvp`, `differences`",
    "jacobian": "`jacobian`",
    "torch vjp": "plain torch: `autograd.grad` twice",
    "torch jvp": "plain torch: `torch.func.jvp`, then `grad`",
}


def _sweep(path: Path) -> str:
    """How often each derivative was right, in two tables; and how often the doctor was right, in a third."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    parts = {
        "Modules of `torch.nn`": [row for row in rows if row["configuration"].startswith("nn.")],
        "Operators": [row for row in rows if not row["configuration"].startswith("nn.")],
    }
    counted = [_counted(f"{title}: {len(some)} configurations", some) for title, some in parts.items()]
    return "\n".join([*counted, _confusion(rows)])


def _counted(title: str, rows: list[dict[str, str]]) -> str:
    lines = [
        f"| {title} | right | refused | wrong | raw error | no reference |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for column, name in DERIVATIVES.items():
        counts = Counter(row[column] for row in rows)
        lines.append(f"| {name} | " + " | ".join(str(counts[verdict]) for verdict in VERDICTS) + " |")
    return "\n".join(lines) + "\n"


def _confusion(rows: list[dict[str, str]]) -> str:
    """What the doctor says of an engine, and what the sweep measured; what has no reference is left out."""
    counts: dict[str, Counter[tuple[bool, bool]]] = {}
    for row in rows:
        for engine, _, state in (each.partition("=") for each in row["doctor"].split() if "=" in each):
            if row[engine] != "none":
                counts.setdefault(engine, Counter())[state == "right", row[engine] == "right"] += 1
    lines = [
        "| the doctor on an engine | says right, is right | says fault, is not right | miss | false alarm |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for engine, counted in counts.items():
        numbers = [counted[True, True], counted[False, False], counted[True, False], counted[False, True]]
        lines.append(f"| {DERIVATIVES[engine]} | " + " | ".join(map(str, numbers)) + " |")
    right = [row for row in rows if {row[name] for name in list(DERIVATIVES)[:6]} == {"right"}]
    codes = Counter(code for row in right for code in row["faults"].split())
    listed = ", ".join(f"`{code}` {count}" for code, count in codes.most_common()) or "none"
    return (
        "\n".join(lines)
        + f"\n\nFaults reported for the {len(right):,} networks whose derivatives are all correct: {listed}.\n"
    )


if __name__ == "__main__":
    for path in pages():
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
