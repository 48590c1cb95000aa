"""The HTML page of a run: tables, learning curves, Jacobians and figures. A page loads no other file."""

import base64
import html
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jacmatch.errors import InputError, converted_errors
from jacmatch.files import inside, read
from jacmatch.report import figures, tables
from jacmatch.report.figures import PALETTE, Style, styles
from jacmatch.runs import Run, read_metrics
from jacmatch.runs.files import plain

FIGURE, SMALL_FIGURE = "figure.svg", "figure-small.svg"
"""Files of the figure of a run; the second, which need not exist, is for a page of 400 pixels."""
PICTURES, SMALL_PICTURES = "pictures.svg", "pictures-small.svg"
"""Files of the pictures of a surrogate: predictions, sensitivities and slices."""
JACOBIANS = ("jacobian_figure.npz", "sheet.npz")
"""File of the arrays of the figure of Jacobians; runs of version 0.1 have the second name."""
_LARGEST_FIGURE, _LARGEST_ARRAYS = 2**24, 2**26  # bytes
_IMAGES = 900_000  # bytes of images on a page: of large images fewer rows are shown
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_SMOKE = "A smoke run: it only shows that the job runs. Its sizes are tiny, and its numbers mean nothing."


def _variables(scheme: int) -> str:
    return " ".join(f"--{name}: {pair[scheme]};" for name, pair in PALETTE.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; --ground: #fff; --text: #1b1e23; --soft: #5b626c; --line: #d9dde2; --card: #f6f7f9;
  {_variables(0)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ground: #14161a; --text: #e8eaed; --soft: #a2a9b3; --line: #343942; --card: #1c1f25;
    {_variables(1)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h1, h2, .note, tbody th, dd { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.note { color: var(--soft); font-size: .9rem; margin: .7rem 0 0; max-width: 46rem; }
.warning { border-left: .25rem solid var(--orange); background: var(--card); padding: .6rem .9rem; margin: 1rem 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-size: .82rem; font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; min-width: 9rem; }
tbody th { font-weight: 500; white-space: normal; } td:last-child, thead th:last-child { padding-right: 0; }
.mark { width: 28px; height: 10px; margin-right: .35rem; vertical-align: middle; }
.mark path { fill: none; stroke-width: 3; }
figure { margin: 0; } .drawn { background: #fff; border-radius: .6rem; padding: 1rem; }
.drawn img { display: block; width: 100%; height: auto; } .drawn .whole { min-width: 42rem; }
.curves { background: var(--card); border-radius: .6rem; padding: 1rem; }
.curves svg { display: block; width: 100%; height: auto; } .curves .mark { display: inline; width: 28px; height: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin-bottom: .5rem; }
.on-phone { display: none; }
.jacobians { display: grid; grid-template-columns: repeat(var(--columns), minmax(3.2rem, 9rem)); gap: .7rem; }
.jacobians b { align-self: end; font-size: clamp(.68rem, 2vw, .82rem); font-weight: 500; line-height: 1.25; }
.jacobians b, .jacobians figcaption { color: var(--soft); text-align: center; }
.jacobians img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line);
  border-radius: .25rem; }
.jacobians figcaption { font-size: clamp(.7rem, 2vw, .82rem); font-variant-numeric: tabular-nums; min-height: 1.5em; }
code { background: var(--card); padding: .15rem .4rem; border-radius: .3rem; font-size: .9rem;
  overflow-wrap: anywhere; } .flag { white-space: nowrap; }
details { border-top: 1px solid var(--line); padding: .7rem 0; } summary { cursor: pointer; font-weight: 500; }
dl { columns: 19rem; column-gap: 2.5rem; margin: .8rem 0 0; font-size: .88rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .25rem 0; break-inside: avoid; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { .on-desk { display: none; } .on-phone { display: block; } .curves { padding: .7rem .3rem; }
  .drawn { padding: .5rem; } main { padding-top: 1.5rem; } .jacobians { gap: .3rem; } }
@media print { details > * { display: block; } }
"""
)


def write_report(run_dir: str | Path, result: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` in a run folder from the files in the folder, and return its path.

    For a run of `distill`, `table.md` and `table.csv` are written beside it.

    Args:
        run_dir: The run folder.
        result: The result that the run will have; None for a finished run.

    Raises:
        InputError: The folder has no finished run, or its job has no report.
    """
    run = Run.open(run_dir, finished=result is None)
    result = run.result if result is None else plain(result, "result")
    unreadable = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
    rule = f"{run.path}/result.json must have the rows or tables of its job."
    with converted_errors(rule, "Run the job again.", of=unreadable):
        if result.get("tables"):
            page = _tables_page(run, result)
        elif result.get("rows"):
            page = _comparison_page(run, result)
            listed, numbers = tables.markdown(*tables.cells(result)), tables.comma_separated(result)
            run.write_bytes("table.md", (listed + "\n").encode("utf-8", "replace"))
            run.write_bytes("table.csv", numbers.encode("utf-8", "replace"))
        else:
            rule = f"{run.path} must contain a comparison or tables."
            do = "Give a run of distill, robust, transfer, surrogate or reproduce."
            raise InputError(rule, got=f"a run of `{run.job}`", do=do)
    return run.write_bytes("report.html", page.encode("utf-8", "replace"))


def _page(run: Run, result: Mapping[str, Any], title: str, parts: Sequence[str]) -> str:
    """The page of a run as one file: a title, what was run, parts in HTML, settings and machine."""
    environment = run.environment
    times = len(environment.pop("resumed", []))
    machine = environment | ({"interrupted and resumed": f"{times} ×"} if times else {})
    header = f"<h1>{_text(title)}</h1><p class=note>{_text(_what_was_run(run, result))}</p>"
    if run.settings.get("smoke"):
        header += f"<p class=warning>{_SMOKE}</p>"
    whole = [
        f"<header>{header}</header>",
        *parts,
        "<h2>How to repeat it</h2>",
        f"<p><code>jacmatch {_text(run.job)} --config settings.json "
        "<span class=flag>--out NEW_FOLDER</span></code></p>",
        _pairs(f"All {len(run.settings)} settings", run.settings),
        _pairs("Machine and versions", {"jacmatch": run.version, **machine}),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(whole)}</main></body></html>\n"
    )


def _what_was_run(run: Run, result: Mapping[str, Any]) -> str:
    """The subtitle: what the job is about, networks, data and sizes, steps and seeds, as far as the result has them."""
    settings, about = run.settings, result.get("about")
    rows = result.get("rows") or result.get("variants") or []
    sentences = [f"{about[0].upper()}{about[1:]}."] if about else []
    names = ("teacher", settings.get("teacher")), ("student", settings.get("student") or settings.get("model"))
    for who, name in names:
        network = result.get(who)
        if network and network.get("parameters") is not None:
            sentences.append(f"{who.capitalize()} {name or 'network'}: {network['parameters']:,} parameters.")
    sizes = sorted({curve["samples"] for curve in result.get("curves", ())})
    training = f"{result['train_samples']:,}" if "train_samples" in result else _range(sizes)
    test = result.get("test_samples", result.get("test_points"))
    data = settings.get("data") or ("" if about else settings.get("teacher", ""))
    amounts = [f"{training} training samples"] if training else []
    amounts += [f"{test:,} test samples"] if test else []
    if data or amounts:
        sentences.append(f"Data: {', '.join(filter(None, (str(data), ' and '.join(amounts))))}.")
    steps = sorted({row["steps"] for row in rows}) or [settings.get("steps")]
    if steps[0] is not None:
        known = "batch_size" in settings and not settings.get("smoke")  # a smoke run has smaller batches
        batch = f" with batches of {settings['batch_size']:,}" if known else ""
        sentences.append(f"{_range(steps)} optimizer steps{batch}.")
    seeds = result.get("seeds") or (rows[0]["seeds"] if rows else None)
    if seeds:
        sentences.append(f"{seeds} seed{'s' if seeds > 1 else ''}.")
    if "size" in settings:
        sentences.append(f"Size: {'smoke' if settings.get('smoke') else settings['size']}.")
    return " ".join(sentences)


def _range(numbers: Sequence[int]) -> str:
    return " to ".join(f"{number:,}" for number in dict.fromkeys((*numbers[:1], *numbers[-1:])))


def _tables_page(run: Run, result: Mapping[str, Any]) -> str:
    """The page of a job that reports tables, and perhaps a figure."""
    settings = run.settings
    networks = " → ".join(str(settings[key]) for key in ("teacher", "student") if key in settings)
    subject = f" of {settings.get('teacher')}" if run.job == "surrogate" else f" on {settings.get('data')}"
    if run.job == "reproduce" and "data" not in result:
        subject = ""
    if run.job in {"robust", "transfer"}:
        subject = f": {settings.get('model') or networks}{subject}"
    parts = []
    for given in result["tables"]:
        parts += [f"<h2>{_text(given['title'])}</h2>", _table(given["head"], given["rows"])]
        parts += [f"<p class=note>{_text(note)}</p>" for note in given["notes"]]
    if run.job == "transfer" and result.get("rows"):
        parts += _curves(run, result, styles([row["method"] for row in result["rows"]]))
    parts += [*_drawn(run), *_drawn(run, PICTURES, SMALL_PICTURES)]
    return _page(run, result, f"{settings.get('name', run.job)}{subject}", parts)


def _drawn(run: Run, name: str = FIGURE, small_name: str = SMALL_FIGURE) -> list[str]:
    """The figure as HTML. Without a small version it scrolls in a box on a small page."""
    if not (run.path / name).is_file():
        return []
    title, about = ("Figure", "The first table, drawn") if name == FIGURE else ("Predictions", "As in its titles")
    wide = f'src="{_svg_address(run, name)}" alt="{about}"'
    if not (run.path / small_name).is_file():
        return [f"<h2>{title}</h2>", f"<figure class='drawn wide'><img class=whole {wide}></figure>"]
    small = f'<source media="(max-width: 40rem)" srcset="{_svg_address(run, small_name)}">'
    return [f"<h2>{title}</h2>", f"<figure class=drawn><picture>{small}<img {wide}></picture></figure>"]


def _svg_address(run: Run, name: str) -> str:
    content = read(run.path, run.path / name, _LARGEST_FIGURE)
    return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"


def _comparison_page(run: Run, result: Mapping[str, Any]) -> str:
    """The page of a run of `distill`."""
    settings = run.settings
    title = f"{settings.get('teacher')} → {settings.get('student')} on {settings.get('data')}"
    chosen = styles([row["method"] for row in result["rows"]])
    return _page(run, result, title, [*_result(result, chosen), *_curves(run, result, chosen), *_jacobians(run)])


def _result(result: Mapping[str, Any], marks: Sequence[Style]) -> list[str]:
    headings, rows = tables.cells(result)
    teacher = result["teacher"]
    own = [f"{100 * teacher[name]:.1f}" for name in ("accuracy", "miou") if name in teacher] or [
        f"{teacher['rmse']:.4g}"
    ]
    whole = [*rows, ["the teacher itself", *own, *[tables.NOTHING] * (len(headings) - 1 - len(own))]]
    parts = ["<h2>Result</h2>", _table(headings, whole, marks), f"<p class=note>{_text(_legend(result))}</p>"]
    if result["rows"][0]["seeds"] > 1:
        parts += ["<h3>Each seed</h3>", _table(*tables.seeds(result), marks)]
    return parts


def _legend(result: Mapping[str, Any]) -> str:
    seeds = result["rows"][0]["seeds"]
    amount = f"on {result['test_samples']:,} test samples, after the last step; nothing was chosen on the test set. "
    if seeds > 1:
        kind = f"Mean ± sample standard deviation over {seeds} seeds, {amount}"
        kind += "Seeds differ in subset, initial weights and batches, and are the same for each method. "
    else:
        kind = f"One seed, so the spread is not known: differences between rows may be chance. Measured {amount}"
    measured = result.get("jacobian_samples")
    where = f"{measured} of these samples" if measured else "a fixed part of these samples"
    agreement = "Agreement: same top class as the teacher. " if tables.measure(result) == "accuracy" else ""
    rows = "the row of the teacher's top class" if agreement else "each row"
    return (
        f"{kind}{agreement}Jacobians, on {where}: cosine with the teacher's of {rows}, and relative error in the "
        "Frobenius norm of the full Jacobian. Seconds: training of one student."
    )


def _curves(run: Run, result: Mapping[str, Any], marks: Sequence[Style]) -> list[str]:
    rows, measure = result["rows"], tables.measure(result)
    series = {
        row["method"]: [read_metrics(inside(run.path, folder)) for folder in _students(run, row["method"])]
        for row in rows
    }
    key = f"validation_{measure}"
    if not any(key in line for seeds in series.values() for lines in seeds for line in lines):
        return []
    legend = "".join(f"<span>{_mark(mark)} {_text(row['label'])}</span>" for mark, row in zip(marks, rows, strict=True))
    caption = "On training samples held out from training."
    if rows[0]["seeds"] > 1:
        caption = "Mean over seeds, on training samples held out; the band runs from the worst seed to the best."
    drawn = [
        f'<div class={name} role=img aria-label="Learning curves">{figures.curves(series, measure, width=width)}</div>'
        for name, width in (("on-desk", 10.0), ("on-phone", 5.2))
    ]
    return [
        "<h2>Learning curves</h2>",
        f"<figure class=curves><div class=legend>{legend}</div>{''.join(drawn)}</figure><p class=note>{caption}</p>",
    ]


def _students(run: Run, method: str) -> list[Path]:
    """The folders of the students of a method; none for a name that is a path."""
    return sorted(
        folder / method
        for folder in run.path.glob("seed*")
        if (folder / method).name == method and (folder / method).is_dir()
    )


def _jacobians(run: Run) -> list[str]:
    """Test images beside a row of the Jacobian of the teacher and of each student."""
    file = next((run.path / name for name in JACOBIANS if (run.path / name).is_file()), None)
    if file is None:
        return []
    rule = f"{file} must contain the arrays of the figure of Jacobians."
    with converted_errors(rule, "It is damaged. Remove it, or run the job again."):
        content = io.BytesIO(read(run.path, file, _LARGEST_ARRAYS))
        with zipfile.ZipFile(content) as members:
            if sum(member.file_size for member in members.infolist()) > _LARGEST_ARRAYS:
                raise ValueError("more than 64 MiB of arrays")
        with np.load(content, allow_pickle=False) as arrays:
            rows, headings = _images({name: arrays[name] for name in arrays.files})
    caption = (
        "Test images, and the Jacobian rows of the teacher's top class: of the teacher, and of each student of the "
        "first seed with its cosine to the teacher's. Red raises the logit, blue lowers it; channels are summed, and "
        "each image has its own scale."
    )
    top = "".join(f"<b>{_text(heading)}</b>" for heading in headings)
    grid = f"<div class=jacobians style='--columns: {len(headings)}'>{top}{''.join(rows)}</div>"
    return ["<h2>Jacobians</h2>", f"<div class=wide>{grid}</div><p class=note>{caption}</p>"]


def _images(arrays: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The rows of images as HTML, up to `_IMAGES` bytes, and the headings of their columns."""
    students, cosines = arrays["students"], arrays["cosines"]
    headings = ["image", "teacher", *(str(method) for method in arrays["methods"])]
    rows: list[str] = []
    for index, (pixels, teacher, label) in enumerate(
        zip(arrays["images"], arrays["teacher"], arrays["labels"], strict=True)
    ):
        name = f"class {label}"
        row = _image(figures.image(pixels), name, name) + _image(figures.signed(teacher), f"{name}, teacher", "")
        for method, heading in enumerate(headings[2:]):
            picture = figures.signed(students[method, index])
            row += _image(picture, f"{name}, {heading}", f"cos {cosines[method, index]:.2f}")
        if rows and sum(map(len, rows)) + len(row) > _IMAGES:
            break
        rows.append(row)
    return rows, headings


def _image(address: str, name: str, caption: str) -> str:
    return f'<figure><img alt="{_text(name)}" src="{address}"><figcaption>{_text(caption)}</figcaption></figure>'


def _mark(style: Style) -> str:
    """A stroke in the color and dash of a curve."""
    line = f'<path d="M0 5H28" style="stroke: var(--{style.color}); stroke-dasharray: {style.dash or "none"}"/>'
    return f'<svg class=mark viewBox="0 0 28 10" aria-hidden=true>{line}</svg>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[Style] = ()) -> str:
    """A table that scrolls in its own box; the first rows have the marks of their curves."""
    head = "".join(f"<th scope=col>{_text(cell)}</th>" for cell in headings)
    body = ""
    for index, (first, *rest) in enumerate(rows):
        stroke = _mark(marks[index]) if index < len(marks) else ""
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        body += f"<tr><th scope=row>{stroke} {_text(first)}</th>{cells}</tr>"
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    """Names and values that a click on the title shows."""
    rows = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_text(value if isinstance(value, str) else json.dumps(value))}</dd></div>"
        for key, value in values.items()
    )
    return f"<details><summary>{_text(title)}</summary><dl>{rows}</dl></details>"


def _text(value: object) -> str:
    """The value as escaped text."""
    return html.escape(str(value), quote=True)
