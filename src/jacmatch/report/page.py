"""One self-contained page for a run: what was done, the table, the curves, the pictures. It loads nothing."""

import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jacmatch.errors import InputError
from jacmatch.report import figures, tables
from jacmatch.runs import Run, read_metrics

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tbody tr:last-child { font-weight: 600; }
.plain td { text-align: left; font-weight: 400; white-space: normal; } .plain tr:last-child { font-weight: 400; }
figure { margin: 1rem 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: .4rem; }
figure img, figure svg { max-width: 100%; height: auto; display: block; margin: auto; }
small, .note { color: color-mix(in srgb, currentColor 70%, transparent); }
"""


def write_report(run_dir: str | Path) -> Path:
    """The path of `report.html` in a finished run folder, written from what the folder holds.

    Raises:
        InputError: the folder holds no finished run, or one of a job without a page.
    """
    run = Run.open(run_dir)
    result = run.result
    if "rows" not in result:
        raise InputError(
            f"{run.path} must hold a comparison.", got=f"a run of `{run.job}`", do="Run `jacmatch distill`."
        )
    heads, rows = tables.cells(result)
    run.write_bytes("table.md", (tables.markdown(heads, rows) + "\n").encode())
    run.write_bytes("table.csv", tables.comma_separated(heads, rows).encode())
    return run.write_bytes("report.html", _page(run, result, heads, rows).encode())


def _page(run: Run, result: Mapping[str, Any], heads: list[str], rows: list[list[str]]) -> str:
    settings = result["settings"]
    title = f"{settings.get('teacher')} → {settings.get('student')} on {settings.get('data')}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=note>jacmatch {_text(result['version'])} · {_text(_summary(result))}</p>",
        "<h2>Result</h2>",
        f"<div class=wide>{_table(heads, rows)}</div>",
        f"<p><small>{_text(_legend(result))}</small></p>",
        *_curves(run, result),
        *_sheet(run),
        "<h2>Settings</h2>",
        f"<div class=wide>{_pairs(settings)}</div>",
        "<h2>Machine and versions</h2>",
        f"<div class=wide>{_pairs({k: v for k, v in run.environment.items() if k != 'resumed'})}</div>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )


def _summary(result: Mapping[str, Any]) -> str:
    teacher = result["teacher"]
    if "accuracy" in teacher:
        quality = f"accuracy {100 * teacher['accuracy']:.1f} %"
    else:
        quality = f"RMSE {teacher['rmse']:.4g}"
    amount = f"{result['train_samples']} training samples"
    return (
        f"{amount}; teacher {teacher['parameters']:,} parameters, {quality}; "
        f"student {result['student']['parameters']:,} parameters"
    )


def _legend(result: Mapping[str, Any]) -> str:
    return (
        f"Mean ± standard deviation over {result['rows'][0]['seeds']} seeds, on {result['test_samples']} test samples, "
        "after the last step; nothing was chosen on the test set. Seeds differ in subset, initial weights and batches, "
        "and are the same for each method. Jacobian cosine: with the teacher's row of its top class; Jacobian error: "
        "relative, in the Frobenius norm of the full Jacobian of the logits."
    )


def _curves(run: Run, result: Mapping[str, Any]) -> list[str]:
    series = {
        row["label"]: [read_metrics(folder) for folder in sorted(run.path.glob(f"seed*/{row['method']}"))]
        for row in result["rows"]
    }
    measure = "accuracy" if "accuracy" in result["rows"][0] else "rmse"
    if not any(f"validation_{measure}" in row for seeds in series.values() for rows in seeds for row in rows):
        return []
    caption = "Mean over seeds on held-out training samples; the band runs from the worst seed to the best."
    return [
        "<h2>Learning curves</h2>",
        f"<figure>{figures.curves(series, measure)}</figure><p><small>{caption}</small></p>",
    ]


def _sheet(run: Run) -> list[str]:
    file = run.path / "sheet.npz"
    if not file.is_file():
        return []
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            picture = figures.sheet({name: arrays[name] for name in arrays.files})
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{file} must be a picture sheet.", got=f"a damaged file ({error})") from error
    caption = (
        "Test images; beside each the teacher's Jacobian of its top class and the same row of each student (first "
        "seed): red raises the logit, blue lowers it. Under each its cosine with the teacher's."
    )
    image = f'<img alt="Jacobians of teacher and students" src="data:image/png;base64,{picture}">'
    return ["<h2>Slopes</h2>", f"<figure>{image}</figure><p><small>{caption}</small></p>"]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(key)}</td><td>{_text(value if isinstance(value, str) else json.dumps(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<table class=plain>{rows}</table>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
