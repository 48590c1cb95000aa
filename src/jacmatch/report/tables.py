"""Tables of results as text, Markdown and CSV: means ± standard deviations over seeds."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spread = Mapping[str, Any]
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        name: Stem of its files.
        title: Title of the table, in one line.
        head: Headings; the first is that of the rows.
        rows: As many entries as there are headings.
        notes: Notes below the table, a sentence or two each.
    """

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return the table in Markdown, with title and notes.

        Example:
            >>> print(Table("t", "Accuracy", ("row", "n = 1"), (("labels", "5.0"),)).markdown())
            **Accuracy**
            <BLANKLINE>
            | row | n = 1 |
            | --- | ---: |
            | labels | 5.0 |
            <BLANKLINE>
        """
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"**{self.title}**", "", markdown(self.head, self.rows, "---:"), *notes, ""])

    def plain(self) -> dict[str, Any]:
        """Return the table as plain values, as in a result."""
        return {"title": self.title, "head": self.head, "rows": self.rows, "notes": self.notes}

    def csv(self) -> str:
        """Return the table as comma-separated values, headings first."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.rows])
        return text.getvalue()


def entry(value: Spread | None, scale: float | int = 100, digits: int | None = 1) -> str:
    """Return mean ± standard deviation as text, or a dash if nothing was measured."""
    if value is None:
        return NOTHING
    mean = _number(scale * value["mean"], digits)
    return mean if value["std"] is None else f"{mean} ± {_number(scale * value['std'], digits)}"


def _number(value: float, digits: int | None, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if digits is None else f"{value:{sign}.{digits}f}"


def speed(ratio: float) -> tuple[str, str]:
    """Return the word for a ratio of times (speed-up, or slow-down below 1), and its value."""
    return ("speed-up", f"{ratio:.3g} ×") if ratio >= 1 else ("slow-down", f"{1 / ratio:.3g} ×")


_JACOBIAN = ("jacobian_cosine", "jacobian_relative_error")


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of a comparison: accuracies in %, mean ± std over the seeds."""
    rows = result["rows"]
    accuracy = measure(result) == "accuracy"
    headings = ["student learns from", "test accuracy %" if accuracy else "test RMSE"]
    headings += ["mIoU %"] * ("miou" in rows[0]) + ["agreement %"] * accuracy
    headings += ["Jacobian cosine", "Jacobian error", "steps", "seconds"]
    body = []
    for row in rows:
        agreement = row["agreement"]
        line = [str(row["label"]), entry(row["accuracy"]) if accuracy else entry(row["rmse"], 1, None)]
        line += [entry(row["miou"])] if "miou" in row else []
        line += [entry(agreement.get("top1"))] if accuracy else []
        line += [entry(agreement.get(key), 1, 3) for key in _JACOBIAN]
        body.append([*line, str(row["steps"]), f"{row['seconds']['mean']:.1f}"])
    return headings, body


def seeds(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of each seed, with the difference to the row above, seed by seed.

    Seeds share subset, initial weights and batches between methods, so the differences spread less than the values.
    """
    key = measure(result)
    scale, digits = (100.0, 1) if key == "accuracy" else (1.0, None)
    values = [[scale * value for value in row[key]["values"]] for row in result["rows"]]
    headings = ["student learns from", *(f"seed {result['seed'] + index}" for index in range(len(values[0])))]
    body = [
        [str(row["label"]), *(_number(value, digits) for value in own)]
        for row, own in zip(result["rows"], values, strict=True)
    ]
    for line, own, above in zip(body, values, [None, *values], strict=False):
        gains = [] if above is None else [a - b for a, b in zip(own, above, strict=True)]
        line.append(", ".join(_number(gain, digits, "+") for gain in gains) if gains else NOTHING)
    return [*headings, "difference to the row above"], body


def measure(result: Mapping[str, Any]) -> str:
    """Return the quality that is compared: `accuracy`, or `rmse` in a regression."""
    return "accuracy" if "accuracy" in result["rows"][0] else "rmse"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], alignment: str = "---") -> str:
    """Return a Markdown table; columns after the first are aligned as `alignment` says."""
    lines = [headings, ["---", *[alignment] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(_literal(cell) for cell in line) + " |" for line in lines)


def _literal(cell: str) -> str:
    """The cell as Markdown that is neither HTML nor the end of a cell or line."""
    return " ".join(cell.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def comma_separated(result: Mapping[str, Any]) -> str:
    """Return the rows as CSV for a program: numbers at full precision, shares not in %, empty if not measured."""
    key = measure(result)
    headings = ["method", "label", "seeds", "steps"]
    columns = (key, "top1", *_JACOBIAN, "seconds")
    headings += [f"{column}_{part}" for column in columns for part in ("mean", "std")]
    lines: list[list[Any]] = [[*headings, f"{key}_values"]]
    for row in result["rows"]:
        spreads = [row.get(column) or row["agreement"].get(column) or {} for column in columns]
        numbers = [each.get(part) for each in spreads for part in ("mean", "std")]
        whole = [row[name] for name in ("method", "label", "seeds", "steps")]
        lines.append([*whole, *numbers, " ".join(str(value) for value in row[key]["values"])])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
