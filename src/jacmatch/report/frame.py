"""What every page has: a title, parts, how to repeat the run, its settings and machine. It loads nothing."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jacmatch.report import figures
from jacmatch.report.style import STYLE
from jacmatch.runs import Run

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(run: Run, title: str, summary: str, parts: Sequence[str]) -> str:
    """The page of a run, as one file.

    Args:
        run: The run.
        title: Its title, as plain text.
        summary: A line below it, as plain text.
        parts: What the page is about, as HTML.
    """
    environment = run.environment
    times = len(environment.pop("resumed", []))
    machine = environment | ({"interrupted and resumed": f"{times} ×"} if times else {})
    whole = [
        f"<header><h1>{text(title)}</h1><p class=note>{text(summary)}</p></header>",
        *parts,
        "<h2>How to repeat it</h2>",
        f"<p><code>jacmatch {text(run.job)} --config settings.json --out NEW_FOLDER</code></p>",
        pairs(f"All {len(run.settings)} settings", run.settings),
        pairs("Machine and versions", {"jacmatch": run.version, **machine}),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(whole)}</main></body></html>\n"
    )


def mark(index: int) -> str:
    """A stroke in the colour and dash of a curve."""
    colour, dash = index % len(figures.DASHES) + 1, figures.DASHES[index % len(figures.DASHES)]
    line = f'<path d="M0 5H28" style="stroke: var(--s{colour}); stroke-dasharray: {dash or "none"}"/>'
    return f'<svg class=mark viewBox="0 0 28 10" aria-hidden=true>{line}</svg>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], marked: int = 0) -> str:
    """A table; its first `marked` rows have the mark of their curve."""
    head = "".join(f"<th scope=col>{text(cell)}</th>" for cell in heads)
    body = ""
    for index, (first, *rest) in enumerate(rows):
        stroke = mark(index) if index < marked else ""
        cells = "".join(f"<td>{text(cell)}</td>" for cell in rest)
        body += f"<tr><th scope=row>{stroke} {text(first)}</th>{cells}</tr>"
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def pairs(title: str, values: Mapping[str, Any]) -> str:
    """Names and values that open when the title is clicked."""
    rows = "".join(
        f"<div><dt>{text(key)}</dt><dd>{text(value if isinstance(value, str) else json.dumps(value))}</dd></div>"
        for key, value in values.items()
    )
    return f"<details><summary>{text(title)}</summary><dl>{rows}</dl></details>"


def text(value: object) -> str:
    """The value as text that HTML shows as it is."""
    return html.escape(str(value), quote=True)
