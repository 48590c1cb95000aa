"""Two run folders compared field by field, and small runs of every job that trains several networks.

python -m tests.jobs.equal_runs make FOLDER        writes a small run of each job into FOLDER
python -m tests.jobs.equal_runs compare ONE OTHER  lists what differs; the exit status is 1 if anything does

Times, memory, paths and commits are left out, and of pages only their presence counts.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jacmatch.jobs import Distill, Robust, Surrogate, Transfer

SMALL: dict[str, Any] = {"device": "cpu", "batch_size": 32, "validate_every": 2, "checkpoint_every": 2}
JOBS = {
    "distill": Distill(per_class=5, steps=6, teacher_steps=6, seeds=2, **SMALL),
    "robust": Robust(penalty_weight=(0.0, 0.1), noise_levels=(0.2,), draws=2, steps=4, per_class=5, seeds=2, **SMALL),
    "transfer": Transfer(steps=4, teacher_steps=6, per_class=5, seeds=2, **SMALL),
    "surrogate": Surrogate(samples=(8, 16), test_samples=40, steps=10, seeds=2, onnx="never", **SMALL),
}
"""Each with two seeds, at least two methods, and several checkpoints and points of the learning curve."""

MEASURED = re.compile(r"seconds|samples_per_second|memory|commit|^started$|^resumed$|^cpu|^threads$|^speed$")
"""Keys whose values differ between two runs of the same command."""
TIMES = re.compile(r"\b\d+(\.\d+)? s\b")
TIMED_ROWS = ("seconds", "µs", "speed-up", "slow-down")
PRESENT = (".html", ".pt", ".lock")
"""Files of which only the presence is compared."""


def differences(one: Path, other: Path) -> Iterator[str]:
    """The files and fields in which two run folders differ."""
    names = [{str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()} for root in (one, other)]
    for name in sorted(names[0] ^ names[1]):
        yield f"{name}: only in {one if name in names[0] else other}"
    for name in sorted(names[0] & names[1]):
        if not name.endswith(PRESENT):
            yield from (f"{name}: {line}" for line in _fields(content(one / name), content(other / name)))


def content(file: Path) -> Any:
    """What a file says, without what two runs of the same command may differ in."""
    data = file.read_bytes()
    if file.suffix == ".json":
        return _plain(json.loads(data))
    if file.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in data.splitlines()]
    if file.suffix in {".md", ".csv"}:
        split = "|" if file.suffix == ".md" else ","
        lines = [line.split(split) for line in data.decode().splitlines()]
        timed = {number for number, head in enumerate(lines[0]) if "seconds" in head}
        return [[cell for number, cell in enumerate(line) if number not in timed] for line in lines]
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files if not MEASURED.search(name)}
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if not MEASURED.search(key)}
    if isinstance(value, list):
        rows = [each for each in value if not (isinstance(each, list) and each and _is_timed(each[0]))]
        return [_plain(each) for each in rows]
    return TIMES.sub("… s", value) if isinstance(value, str) else value


def _is_timed(name: object) -> bool:
    return isinstance(name, str) and any(word in name for word in TIMED_ROWS)


def _fields(one: Any, other: Any, where: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from _fields(one.get(key, "nothing"), other.get(key, "nothing"), f"{where}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from _fields(*pair, f"{where}[{number}]")
    elif one != other:
        yield f"{where} {str(one)[:80]} / {str(other)[:80]}"


def make(folder: Path) -> None:
    """Write a small run of each job."""
    from dataclasses import replace

    for name, job in JOBS.items():
        replace(job, out=folder / name).run()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        lines = list(differences(*map(Path, sys.argv[2:4])))
        print("\n".join(lines) or "equal")
        sys.exit(bool(lines))
