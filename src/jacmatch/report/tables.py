"""The rows of a result as tables: Markdown, CSV and aligned text. Accuracies in percent, mean ± standard deviation."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of a comparison.

    Args:
        result: The result of `jacmatch distill`, with `rows`.
    """
    rows = result["rows"]
    accuracy = "accuracy" in rows[0]
    heads = ["student learns from", "test accuracy %" if accuracy else "test RMSE"]
    heads += ["agreement %"] if accuracy else []
    heads += ["Jacobian cosine", "Jacobian error", "steps", "seconds"]
    body = []
    for row in rows:
        agreement = row["agreement"]
        line = [str(row["label"]), percent(row["accuracy"]) if accuracy else spread(row["rmse"])]
        line += [percent(agreement["top1"]) if "top1" in agreement else "–"] if accuracy else []
        line += [spread(agreement[key]) if key in agreement else "–" for key in _JACOBIAN]
        body.append([*line, str(row["steps"]), f"{row['seconds']['mean']:.1f}"])
    return heads, body


_JACOBIAN = ("jacobian_cosine", "jacobian_relative_error")


def percent(numbers: Mapping[str, Any]) -> str:
    """Mean ± standard deviation of shares, in percent.

    Example:
        >>> percent({"mean": 0.9123, "std": 0.004, "values": [0.9, 0.92]})
        '91.2 ± 0.4'
    """
    return _plus_minus(100 * numbers["mean"], None if numbers["std"] is None else 100 * numbers["std"], 1)


def spread(numbers: Mapping[str, Any]) -> str:
    """Mean ± standard deviation; without the latter for a single seed.

    Example:
        >>> spread({"mean": 0.5, "std": None, "values": [0.5]})
        '0.500'
    """
    return _plus_minus(numbers["mean"], numbers["std"], 3)


def _plus_minus(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def comma_separated(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text of a fixed width: the first column left, the others right.

    Example:
        >>> print(aligned(["a", "b"], [["long", "2"]]))
        a     b
        long  2
    """
    widths = [max(len(line[column]) for line in [heads, *rows]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in [heads, *rows])
    )
