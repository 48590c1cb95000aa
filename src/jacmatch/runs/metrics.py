"""The metrics of a run: one JSON object a line, appended while it goes on."""

import os
from pathlib import Path
from typing import Any

from jacmatch.runs.files import decoded, disk, inside

METRICS = "metrics.jsonl"
_LARGEST = 2**30


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of the `metrics.jsonl` in a folder, in order; empty without one. A last line that is cut off is skipped.

    Raises:
        InputError: Another line is damaged.
    """
    file = Path(folder) / METRICS
    with disk(file.parent, "read"):
        lines = inside(file.parent, file, _LARGEST).read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [decoded(line, f"line {number} of {file}") for number, line in enumerate(lines, 1)]


def mend(folder: Path) -> None:
    """Cuts a torn last line off: the next row would be glued to it."""
    file = folder / METRICS
    if file.is_file():
        with disk(folder), file.open("rb+") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)
