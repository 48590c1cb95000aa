"""Samples in a table: columns of inputs, outputs and partials in a frame, a CSV file or a Parquet file."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from jacmatch.datasets.files import check_memory, existing_file, reading
from jacmatch.errors import InputError, optional_package

_PARTIAL = re.compile(r"d(.+)/d(.+)")
_NUMBERS = "Convert dates to numbers, such as days since the first one."
_TEXT = "Write numbers like 1234.5, text as one column of 0 and 1 per value: pandas.get_dummies(frame, dtype=float)."


def split_frame(frame: Any, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> tuple[Any, Any, ndarray | None]:
    """Return the inputs, the outputs and the partials of a pandas frame.

    A column "dy/dx" has the partial of output y with respect to input x. Any such column may be missing, or NaN in some
    rows.

    Args:
        frame: The samples, one per row.
        inputs: Names of the input columns. By default those that begin with "x"; if `outputs` is given, all that are
            neither outputs nor partials.
        outputs: Names of the output columns. By default those that begin with "y".

    Returns:
        Inputs (N, D) and outputs (N, K) as frames, partials (N, K, D) as an array, or None where there are none.

    Raises:
        InputError: A column is missing or not numeric, an input or output is NaN, or a partial belongs to unknown
            columns.

    Example:
        >>> import pandas
        >>> frame = pandas.DataFrame({"x1": [0.0, 1.0], "x2": [2.0, 3.0], "y": [0.0, 3.0], "dy/dx1": [2.0, 3.0]})
        >>> x, y, j = split_frame(frame)
        >>> list(x.columns), j.shape
        (['x1', 'x2'], (2, 1, 2))
    """
    names = [str(name) for name in frame.columns]
    features, targets = _roles("the frame", names, inputs, outputs)
    columns = dict(zip(names, (frame.iloc[:, i].to_numpy() for i in range(len(names))), strict=True))
    _, _, j = _arrays("the frame", columns, features, targets)
    return frame[features], frame[targets], j


def check_columns(name: str, given: Any) -> None:
    """Refuse columns of equal names or without numbers, and NaN or infinity, by column and row.

    In other objects, only dates, NaN and infinity are refused.
    """
    if hasattr(given, "iloc") and hasattr(given, "columns"):
        _distinct(name, [str(each) for each in given.columns])
        each = [given.iloc[:, i] for i in range(given.shape[1])]
        each = [one.astype(object) if str(one.dtype) == "category" else one for one in each]
        columns = {str(column): one.to_numpy() for column, one in zip(given.columns, each, strict=True)}
    else:
        array = np.asarray(given)
        if array.dtype.kind == "c":
            raise InputError(f"{name} must be real numbers. Complex data not supported.", got=str(array.dtype))
        if not array.size or not array.ndim or array.dtype.kind not in "fmM":
            return
        columns = {str(i): column for i, column in enumerate(array.reshape(len(array), -1).T)}
    _matrix(name, columns, list(columns), missing=False)


def load_table(spec: str, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> dict[str, object]:
    """Return `x_train`, `y_train` and perhaps `j_train` of `csv:FILE` or `parquet:FILE`.

    Columns as in `split_frame`. Empty cells are NaN.
    """
    kind, _, argument = spec.partition(":")
    path = existing_file(argument, kind)
    check_memory(path.stat().st_size, f"The table {path}", "Choose fewer rows.")
    columns = _csv(path) if kind == "csv" else _parquet(path)
    x, y, j = _arrays(spec, columns, *_roles(spec, list(columns), inputs, outputs))
    return {"x_train": x, "y_train": y, **({} if j is None else {"j_train": j})}


def _csv(path: Path) -> dict[str, ndarray]:
    """Return the columns of a file with a header; text stays text."""
    how = "Write it with frame.to_csv(FILE, index=False)."
    with reading(path, "a CSV file with a header", how), path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.reader(file))
    rows = [row for row in lines if row]
    if rows and len(rows[0]) == 1 and {";", "\t"} & {*rows[0][0]}:
        raise InputError(f"The columns of {path} must be separated by commas.", got=repr(rows[0][0][:80]), do=how)
    if len(rows) < 2:
        raise InputError(f"{path} must have a header and at least one row.", got=f"{len(rows)} line(s)")
    header = [name.strip() for name in rows[0]]
    _distinct(str(path), header)
    for number, row in enumerate(lines, 1):
        if row and len(row) != len(header):
            rule = f"Each line of {path} must have {len(header)} cells, like its header."
            raise InputError(rule, got=f"{len(row)} in line {number}")
    return {name: _numbers([row[i] for row in rows[1:]]) for i, name in enumerate(header)}


def _numbers(cells: Iterable[str]) -> ndarray:
    """Return floats, or the text if a cell is not a number."""
    cells = list(cells)
    try:  # Python reads 1_5 as 15
        return np.array([float(cell.replace("_", "?")) if cell.strip() else np.nan for cell in cells])
    except ValueError:
        return np.array(cells)


def _parquet(path: Path) -> dict[str, ndarray]:
    """Return the columns of a Parquet file."""
    install = "pip install pandas pyarrow"
    pandas = optional_package("pandas", f"parquet:{path}", install)
    optional_package("pyarrow", f"parquet:{path}", install)
    with reading(path, "a Parquet file", "Write it with frame.to_parquet(FILE)."):
        frame = pandas.read_parquet(path)
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def _roles(source: str, names: list[str], inputs: Sequence[str], outputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the input and the output columns."""
    _distinct(source, names)
    for name in (*inputs, *outputs):
        if name not in names:
            raise InputError(f"{source} must have the column {name!r}.", got=", ".join(names[:20]))
    plain = [name for name in names if not _PARTIAL.fullmatch(name)]
    features, targets = list(inputs), list(outputs)
    if not features:
        rest = [name for name in plain if name not in targets]
        features = rest if targets else [name for name in plain if name.lower().startswith("x")]
    if not targets:
        rest = [name for name in plain if name not in features]
        targets = rest if inputs else [name for name in plain if name.lower().startswith("y")]
    if not features or not targets or set(features) & set(targets):
        rule = f"{source} must have columns of inputs (x…) and of outputs (y…), or they must be named."
        do = "Name them: inputs= and outputs=, or --x-columns and --y-columns."
        raise InputError(rule, got=", ".join(names[:20]), do=do)
    return features, targets


def _distinct(source: str, names: list[str]) -> None:
    """Refuse columns of the same name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Each column of {source} must have a unique name.", got=", ".join(twice[:8]))


def _arrays(
    source: str, columns: Mapping[str, ndarray], inputs: list[str], outputs: list[str]
) -> tuple[ndarray, ndarray, ndarray | None]:
    """Return inputs (N, D), outputs (N, K) and partials (N, K, D)."""
    x = _matrix(source, columns, inputs, missing=False)
    y = _matrix(source, columns, outputs, missing=False)
    partials = [name for name in columns if _PARTIAL.fullmatch(name) and name not in (*inputs, *outputs)]
    if not partials:
        return x, y, None
    entries = {f"d{output}/d{name}": (k, i) for k, output in enumerate(outputs) for i, name in enumerate(inputs)}
    j = np.full((len(x), len(outputs), len(inputs)), np.nan)
    for name in partials:
        if name not in entries:
            rule = f"The column {name!r} of {source} must be dOUTPUT/dINPUT of two existing columns."
            raise InputError(rule, got=f"outputs {', '.join(outputs[:8])}; inputs {', '.join(inputs[:8])}")
        k, i = entries[name]
        j[:, k, i] = _matrix(source, columns, [name], missing=True)[:, 0]
    return x, y, j


def _matrix(source: str, columns: Mapping[str, ndarray], names: list[str], *, missing: bool) -> ndarray:
    """Return some columns as floats; NaN only where `missing` allows it."""
    for name in names:
        if columns[name].dtype.kind not in "fiub":
            got, do = str(columns[name].dtype), _NUMBERS
            if columns[name].dtype.kind not in "mM":
                cells = (cell for cell in map(str, columns[name]) if _numbers([cell]).dtype.kind != "f")
                got, do = repr(next(cells, got)[:80]), _TEXT
            raise InputError(f"The column {name!r} of {source} must be numbers.", got=got, do=do)
    matrix = np.stack([columns[name].astype(np.float64) for name in names], 1)
    bad = ~np.isfinite(matrix)
    if missing:
        bad &= ~np.isnan(matrix)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        rule = f"The columns of inputs and outputs of {source} must be finite" + ("." if not missing else ", or NaN.")
        got = f"NaN or infinity in {int(bad.any(1).sum())} rows, first in row {row}, column {names[column]!r}"
        raise InputError(rule, got=got, do="Remove these rows; only a partial may be missing.")
    return matrix
