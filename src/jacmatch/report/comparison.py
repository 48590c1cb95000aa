"""The page of a comparison: the table, the curves, the pictures."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jacmatch.errors import InputError
from jacmatch.files import inside, read
from jacmatch.report import figures, tables
from jacmatch.report.frame import mark, page, table, text
from jacmatch.runs import Run, read_metrics

_SHEET = 2**26  # bytes of the arrays of a sheet
_PICTURES = 900_000  # bytes of pictures on a page: a sheet of large images shows fewer rows


def comparison(run: Run, result: Mapping[str, Any]) -> str:
    """The page of a run of `distill`."""
    settings = run.settings
    title = f"{settings.get('teacher')} → {settings.get('student')} on {settings.get('data')}"
    return page(run, title, _summary(result), [_result(result), *_curves(run, result), *_sheet(run)])


def _quality(network: Mapping[str, Any]) -> str:
    return f"{100 * network['accuracy']:.1f}" if "accuracy" in network else f"{network['rmse']:.4g}"


def _size(network: Mapping[str, Any]) -> str:
    count = network["parameters"]
    return "size unknown" if count is None else f"{count:,} parameters"


def _summary(result: Mapping[str, Any]) -> str:
    sizes = f"Teacher {_size(result['teacher'])}, student {_size(result['student'])}"
    seeds = result["rows"][0]["seeds"]
    return f"{sizes}. {result['train_samples']} training samples, {seeds} seed{'s' if seeds > 1 else ''}."


def _result(result: Mapping[str, Any]) -> str:
    heads, rows = tables.cells(result)
    teacher = ["the teacher itself", _quality(result["teacher"]), *["–"] * (len(heads) - 2)]
    parts = ["<h2>Result</h2>", table(heads, [*rows, teacher], marked=len(rows))]
    parts.append(f"<p class=note>{text(_legend(result))}</p>")
    if result["rows"][0]["seeds"] > 1:
        parts += ["<h3>Each seed</h3>", table(*tables.seeds(result), marked=len(rows))]
    return "".join(parts)


def _legend(result: Mapping[str, Any]) -> str:
    seeds = result["rows"][0]["seeds"]
    amount = f"on {result['test_samples']:,} test samples, after the last step; nothing was chosen on the test set. "
    if seeds > 1:
        kind = f"Mean ± sample standard deviation over {seeds} seeds, {amount}"
        kind += "Seeds differ in subset, initial weights and batches, and are the same for each method. "
    else:
        kind = f"One seed, so no spread is known: differences between rows may be chance. Measured {amount}"
    measured = result.get("jacobian_samples")
    where = f"{measured} of these samples" if measured else "a fixed part of these samples"
    agreement = "Agreement: same top class as the teacher. " if tables.measure(result) == "accuracy" else ""
    rows = "the row of the teacher's top class" if agreement else "each row"
    return (
        f"{kind}{agreement}Jacobians, on {where}: cosine with the teacher's of {rows}, and relative error in the "
        "Frobenius norm of the full Jacobian. Seconds: training of one student."
    )


def _curves(run: Run, result: Mapping[str, Any]) -> list[str]:
    rows, measure = result["rows"], tables.measure(result)
    series = {
        row["method"]: [read_metrics(inside(run.path, folder)) for folder in _students(run, row["method"])]
        for row in rows
    }
    key = f"validation_{measure}"
    if not any(key in line for seeds in series.values() for lines in seeds for line in lines):
        return []
    legend = "".join(f"<span>{mark(index)} {text(row['label'])}</span>" for index, row in enumerate(rows))
    caption = "On training samples held out from training."
    if rows[0]["seeds"] > 1:
        caption = "Mean over seeds, on training samples held out; the band runs from the worst seed to the best."
    drawn = [
        f'<div class={name} role=img aria-label="Learning curves">{figures.curves(series, measure, width=width)}</div>'
        for name, width in (("roomy", 10.0), ("narrow", 5.2))
    ]
    return [
        "<h2>Learning curves</h2>",
        f"<figure class=curves><div class=legend>{legend}</div>{''.join(drawn)}</figure><p class=note>{caption}</p>",
    ]


def _students(run: Run, method: str) -> list[Path]:
    """The folders of the students of a method; a name with another path in it has none."""
    return sorted(
        folder / method
        for folder in run.path.glob("seed*")
        if (folder / method).name == method and (folder / method).is_dir()
    )


def _sheet(run: Run) -> list[str]:
    file = run.path / "sheet.npz"
    if not file.is_file():
        return []
    try:
        content = io.BytesIO(read(run.path, file, _SHEET))
        with zipfile.ZipFile(content) as members:
            if sum(member.file_size for member in members.infolist()) > _SHEET:
                raise ValueError("more than 64 MiB of pictures")
        with np.load(content, allow_pickle=False) as arrays:
            rows, heads = _pictures({name: arrays[name] for name in arrays.files})
    except (ValueError, KeyError, IndexError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        got = f"a damaged file ({error})"
        raise InputError(f"{file} must be a picture sheet.", got=got, do="Remove it, or run the job anew.") from error
    caption = (
        "Test images; beside each the row of the teacher's top class in the teacher's Jacobian, and the same row of "
        "each student of the first seed, with its cosine to the teacher's. Red raises the logit, blue lowers it; "
        "channels are summed, and each picture has its own scale."
    )
    top = "".join(f"<b>{text(head)}</b>" for head in heads)
    grid = f"<div class=sheet style='--columns: {len(heads)}'>{top}{''.join(rows)}</div>"
    return ["<h2>Slopes</h2>", f"<div class=wide>{grid}</div><p class=note>{caption}</p>"]


def _pictures(arrays: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The rows of the sheet as cells, as many as the page has room for, and the heads of its columns."""
    students, cosines = arrays["students"], arrays["cosines"]
    heads = ["image", "teacher", *(str(method) for method in arrays["methods"])]
    rows: list[str] = []
    for index, (pixels, teacher, label) in enumerate(
        zip(arrays["images"], arrays["teacher"], arrays["labels"], strict=True)
    ):
        name = f"class {label}"
        row = _picture(figures.image(pixels), name, name) + _picture(figures.signed(teacher), f"{name}, teacher", "")
        for method, head in enumerate(heads[2:]):
            picture = figures.signed(students[method, index])
            row += _picture(picture, f"{name}, {head}", f"cos {cosines[method, index]:.2f}")
        if rows and sum(map(len, rows)) + len(row) > _PICTURES:
            break
        rows.append(row)
    return rows, heads


def _picture(address: str, name: str, caption: str) -> str:
    return f'<figure><img alt="{text(name)}" src="{address}"><figcaption>{text(caption)}</figcaption></figure>'
