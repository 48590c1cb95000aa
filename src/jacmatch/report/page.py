"""The page of a run, written from what its folder holds."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jacmatch.errors import InputError
from jacmatch.files import read
from jacmatch.report import tables
from jacmatch.report.comparison import comparison
from jacmatch.report.frame import page, table, text
from jacmatch.runs import Run
from jacmatch.runs.files import plain

FIGURE = "figure.svg"
_LARGEST = 2**24


def write_report(run_dir: str | Path, result: Mapping[str, Any] | None = None) -> Path:
    """The path of `report.html` in a run folder, written from what the folder holds.

    For a run of `distill`, `table.md` and `table.csv` are written beside it.

    Args:
        run_dir: The run folder.
        result: What will be its result; None for a finished run.

    Raises:
        InputError: The folder holds no finished run, or one of a job without a page.
    """
    run = Run.open(run_dir, finished=result is None)
    result = run.result if result is None else plain(result, "result")
    try:
        if result.get("tables"):
            html = _of_tables(run, result)
        elif result.get("rows"):
            html = comparison(run, result)
            listed, numbers = tables.markdown(*tables.cells(result)), tables.comma_separated(result)
            run.write_bytes("table.md", (listed + "\n").encode("utf-8", "replace"))
            run.write_bytes("table.csv", numbers.encode("utf-8", "replace"))
        else:
            rule = f"{run.path} must hold a comparison or tables."
            do = "Give a run of distill, robust, transfer, surrogate or reproduce."
            raise InputError(rule, got=f"a run of `{run.job}`", do=do)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        rule = f"{run.path}/result.json must have the rows or tables of its job."
        raise InputError(rule, got=f"{type(error).__name__}: {error}", do="Run the job anew.") from error
    return run.write_bytes("report.html", html.encode("utf-8", "replace"))


def _of_tables(run: Run, result: Mapping[str, Any]) -> str:
    """The page of a job that reports tables, and perhaps a figure."""
    about = f"of {run.settings.get('teacher')}" if run.job == "surrogate" else f"on {run.settings.get('data')}"
    title = f"{run.settings.get('name', run.job)} {about}"
    summary = f"{result['about'][0].upper()}{result['about'][1:]}." if result.get("about") else f"jacmatch {run.job}"
    parts = []
    for given in result["tables"]:
        parts += [f"<h2>{text(given['title'])}</h2>", table(given["head"], given["rows"])]
        parts += [f"<p class=note>{text(note)}</p>" for note in given["notes"]]
    figure = run.path / FIGURE
    if figure.is_file():
        address = f"data:image/svg+xml;base64,{base64.b64encode(read(run.path, figure, _LARGEST)).decode()}"
        parts += ["<h2>Figure</h2>", f'<figure class=drawn><img alt="The first table, drawn" src="{address}"></figure>']
    return page(run, title, summary, parts)
