"""The schema of `result.json`."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jacmatch.errors import InputError

TRAINING_JOBS = frozenset({"train", "distill", "robust", "transfer", "surrogate"})
_GENERAL = ("job", "version", "seed", "seconds", "settings")
_TRAINING = ("teacher", "student", "agreement", "samples_per_second", "peak_memory_bytes")
# Lowest, highest, may it be null. An accuracy above 1 is a percentage that somebody forgot to divide.
_RANGES = {
    "seed": (-math.inf, math.inf, False),
    "seconds": (0.0, math.inf, False),
    "samples_per_second": (0.0, math.inf, True),
    "peak_memory_bytes": (0.0, math.inf, True),
    "accuracy": (0.0, 1.0, False),
    "rmse": (0.0, math.inf, False),
    "parameters": (0.0, math.inf, True),
    "top1": (0.0, 1.0, True),
    "jacobian_cosine": (-1.0, 1.0, True),
    "jacobian_relative_error": (0.0, math.inf, True),
}
_WHOLE = ("seed", "peak_memory_bytes", "parameters")
_SHOWN = 120  # letters of a value in a message
_ROUNDING = 1e-5  # a cosine of float32 vectors may lie this far outside its range


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean, the sample standard deviation (n − 1; None for one value) and the values.

    Example:
        >>> spread([0.5, 1.0])
        {'mean': 0.75, 'std': 0.3535533905932738, 'values': [0.5, 1.0]}

    Raises:
        InputError: There is no value.
    """
    if not values:
        raise InputError("`values` of `spread` must have at least one value.", got="none")
    plain = [float(value) for value in values]
    std = statistics.stdev(plain) if len(plain) > 1 else None
    return {"mean": statistics.fmean(plain), "std": std, "values": plain}


def check(result: Mapping[str, Any], job: str, version: str, settings: Mapping[str, Any]) -> None:
    """Refuse a result that lacks a key of its job, has a number out of range, or belongs to another run."""
    training = job in TRAINING_JOBS
    _have(result, _GENERAL + _TRAINING if training else _GENERAL, "result")
    for key, own in (("job", job), ("version", version), ("settings", settings)):
        if result[key] != own:
            raise InputError(f"`result.{key}` must be the {key} of its run, {own!r}.", got=repr(result[key])[:_SHOWN])
    for key in ("seed", "seconds", "samples_per_second", "peak_memory_bytes"):
        if key in result:
            _in_range(result, key, "result")
    if not training:
        return
    for who in ("teacher", "student"):
        _network(result[who], f"result.{who}")
    if result["teacher"] is None and result["student"] is None:
        raise InputError("`result` must have a `teacher` or a `student`.", got="null for both")
    rows = result.get("rows")
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        _row(row, f"result.rows[{number}]")
    agreement = result["agreement"]
    if agreement is not None:
        keys = ("top1", "jacobian_cosine", "jacobian_relative_error")
        _have(agreement, keys, "result.agreement")
        for key in keys:
            _in_range(agreement, key, "result.agreement")


def _have(value: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"`{where}` must be an object.", got=repr(value)[:_SHOWN])
    missing = [key for key in keys if key not in value]
    if missing:
        do = f"Give all of: {', '.join(keys)}."
        raise InputError(f"`{where}` must have every key of its schema.", got=f"none of the name '{missing[0]}'", do=do)


def _row(row: object, where: str) -> None:
    """Refuse a row of a comparison with a mean, deviation or value that is no number or out of range."""
    if not isinstance(row, Mapping):
        raise InputError(f"`{where}` must be an object.", got=repr(row)[:_SHOWN])
    inner = row.get("agreement")
    for values in (row, inner if isinstance(inner, Mapping) else {}):
        for key in _RANGES.keys() & values.keys():
            numbers = values[key]
            if isinstance(numbers, Mapping):
                _have(numbers, ("mean", "std", "values"), f"{where}.{key}")
                listed = numbers["values"] if isinstance(numbers["values"], list) else [numbers["values"]]
                for value in (numbers["mean"], *listed):
                    _in_range({key: value}, key, f"{where}.{key}", whole=False)
                _in_range({"seconds": numbers["std"] or 0.0}, "seconds", f"{where}.{key}.std")


def _network(network: object, where: str) -> None:
    if network is None:
        return
    _have(network, ("parameters",), where)
    assert isinstance(network, Mapping)
    measures = [key for key in ("accuracy", "rmse") if key in network]
    if not measures:
        raise InputError(
            f"`{where}` must have `accuracy` (classes) or `rmse` (regression).", got=repr(sorted(network))[:_SHOWN]
        )
    for key in (*measures, "parameters"):
        _in_range(network, key, where)


def _in_range(values: Mapping[str, Any], key: str, where: str, *, whole: bool = True) -> None:
    low, high, null = _RANGES[key]
    value = values[key]
    if value is None and null:
        return
    whole = whole and key in _WHOLE
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low - _ROUNDING <= value <= high + _ROUNDING:
        kind = "a whole number" if whole else "a number"
        span = "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" in [{low:g}, {high:g}]"
        raise InputError(f"`{where}.{key}` must be {kind}{span}{' or null' if null else ''}.", got=repr(value)[:_SHOWN])
