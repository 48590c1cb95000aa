"""The metrics of a run: one JSON object a line, appended while it goes on."""

import os
from pathlib import Path
from typing import Any

from jacmatch.files import check_entry, read
from jacmatch.runs.files import decoded, disk, write_whole

METRICS = "metrics.jsonl"
_LARGEST = 2**30


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of the `metrics.jsonl` in a folder, in order; empty without one. A last line that is cut off is skipped.

    Raises:
        InputError: Another line is damaged.
    """
    file = Path(folder) / METRICS
    with disk(file.parent, "read"):
        check_entry(file.parent, file)
        lines = read(file.parent, file, _LARGEST).split(b"\n")[:-1] if file.is_file() else []
    return [decoded(line, f"line {number} of {file}") for number, line in enumerate(lines, 1)]


def mend(folder: Path) -> None:
    """Cut a torn last line off: the next row would be glued to it.

    A file that has another name elsewhere, as in a copy of the folder made of hard links, becomes one of its own: the
    rows that follow belong to this folder alone.
    """
    file = folder / METRICS
    with disk(folder):
        if file.is_file():
            content = read(folder, file, _LARGEST)
            end = content.rfind(b"\n") + 1
            if end < len(content) or file.is_symlink() or file.stat().st_nlink > 1:
                write_whole(folder, METRICS, content[:end])
