"""The rows of a result as tables: Markdown, CSV and aligned text."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

_JACOBIAN = ("jacobian_cosine", "jacobian_relative_error")


def cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of a comparison: accuracies in percent, mean ± standard deviation over the seeds.

    Args:
        result: The result of `jacmatch distill`, with `rows`.
    """
    rows = result["rows"]
    accuracy = measure(result) == "accuracy"
    heads = ["student learns from", "test accuracy %" if accuracy else "test RMSE"]
    heads += ["agreement %"] if accuracy else []
    heads += ["Jacobian cosine", "Jacobian error", "steps", "seconds"]
    body = []
    for row in rows:
        agreement = row["agreement"]
        line = [str(row["label"]), percent(row["accuracy"]) if accuracy else significant(row["rmse"])]
        line += [percent(agreement.get("top1"))] if accuracy else []
        line += [spread(agreement.get(key)) for key in _JACOBIAN]
        body.append([*line, str(row["steps"]), f"{row['seconds']['mean']:.1f}"])
    return heads, body


def seeds(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of each seed, with the difference to the row above, taken seed by seed.

    Seeds share subset, initial weights and batches between methods, so the differences spread less than the values.

    Args:
        result: The result of `jacmatch distill`, with `rows`.
    """
    key = measure(result)
    scale, digits = (100.0, 1) if key == "accuracy" else (1.0, None)
    values = [[scale * value for value in row[key]["values"]] for row in result["rows"]]
    heads = ["student learns from", *(f"seed {result['seed'] + index}" for index in range(len(values[0])))]
    body = [
        [str(row["label"]), *(_number(value, digits) for value in own)]
        for row, own in zip(result["rows"], values, strict=True)
    ]
    for line, own, above in zip(body, values, [None, *values], strict=False):
        gains = [] if above is None else [a - b for a, b in zip(own, above, strict=True)]
        line.append(", ".join(_number(gain, digits, "+") for gain in gains) if gains else "–")
    return [*heads, "difference to the row above"], body


def measure(result: Mapping[str, Any]) -> str:
    """`accuracy`, or `rmse` in a regression."""
    return "accuracy" if "accuracy" in result["rows"][0] else "rmse"


def percent(numbers: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation of shares, in percent; a dash for what was not measured.

    Example:
        >>> percent({"mean": 0.9123, "std": 0.004, "values": [0.9, 0.92]})
        '91.2 ± 0.4'
    """
    return _plus_minus(numbers, 100.0, 1)


def spread(numbers: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation with three decimals; without the latter for a single seed.

    Example:
        >>> spread({"mean": 0.5, "std": None, "values": [0.5]})
        '0.500'
    """
    return _plus_minus(numbers, 1.0, 3)


def significant(numbers: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation of values of any magnitude, with four significant digits.

    Example:
        >>> significant({"mean": 0.00042, "std": 0.00003, "values": []})
        '0.00042 ± 3e-05'
    """
    return _plus_minus(numbers, 1.0, None)


def _plus_minus(numbers: Mapping[str, Any] | None, scale: float, digits: int | None) -> str:
    if numbers is None:
        return "–"
    mean = _number(scale * numbers["mean"], digits)
    return mean if numbers["std"] is None else f"{mean} ± {_number(scale * numbers['std'], digits)}"


def _number(value: float, digits: int | None, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if digits is None else f"{value:{sign}.{digits}f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_literal(cell) for cell in line) + " |" for line in lines)


def _literal(cell: str) -> str:
    """The cell as Markdown that is neither HTML nor the end of a cell or line."""
    return " ".join(cell.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def comma_separated(result: Mapping[str, Any]) -> str:
    """The rows as CSV for a program: plain numbers at full precision, shares not in percent, empty if not measured.

    Args:
        result: The result of `jacmatch distill`, with `rows`.
    """
    key = measure(result)
    heads = ["method", "label", "seeds", "steps"]
    columns = (key, "top1", *_JACOBIAN, "seconds")
    heads += [f"{column}_{part}" for column in columns for part in ("mean", "std")]
    lines: list[list[Any]] = [[*heads, f"{key}_values"]]
    for row in result["rows"]:
        found = [row.get(column) or row["agreement"].get(column) or {} for column in columns]
        numbers = [entry.get(part) for entry in found for part in ("mean", "std")]
        whole = [row[head] for head in ("method", "label", "seeds", "steps")]
        lines.append([*whole, *numbers, " ".join(str(value) for value in row[key]["values"])])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
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
