"""Kills jobs and runs the same commands again: do they end as if nothing had happened?

python tests/reliability/kills.py --kills 100        at random moments
python tests/reliability/kills.py --points 40         before 40 disk operations of each job, evenly spaced
python tests/reliability/kills.py --points 40 --full  the disk is full at each of them; then it is not
"""

import argparse
import importlib
import json
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parent))
from processes import Board, Moment, begun, contents, ended

from jacmatch.datasets.streamed import spread

_LOOP = "--batch-size 32 --checkpoint-every 7 --validate-every 20 --data npz:data.npz --steps {steps} --out run"
_TAUGHT = f"{_LOOP} --teacher mlp:16 --teacher-steps {{steps}} --student mlp:8 --seeds 1 --augment crop"
_CACHE = f"{_TAUGHT} --views 3".replace("--out run", "--cache answers")
JOBS = {
    "train": (200, f"train {_LOOP} --model mlp:16 --ema 0.9 --augment crop flip --accumulate 2"),
    "distill": (80, f"distill {_TAUGHT}"),
    "cached": (80, f"cache build {_CACHE} --shard-megabytes 0.02", f"distill {_TAUGHT} --views 3 --cache answers"),
    "transfer": (
        30,
        f"transfer {_LOOP} --teacher cnn3 --teacher-steps 20 --student cnn3 --per-class 10 --seeds 1 "
        "--methods lwf lwf+attention+jacobians",
    ),
    "robust": (80, f"robust {_LOOP} --model mlp:8 --seeds 1 --draws 1 --noise-levels 0.2"),
}
"""Steps, and the commands."""
_IMPORTED = (
    *("jacmatch.cli.flags", "jacmatch.cli.summary", "jacmatch.jobs"),
    *("matplotlib.pyplot", "safetensors.torch", "tensordict"),
)
_FEW = 12  # steps where each disk operation is tried


def imported() -> None:
    """Imports what jobs import, once, before the forks."""
    for name in _IMPORTED:
        importlib.import_module(name)


def commands(job: str, few: bool) -> list[list[str]]:
    """The words of a job's commands, with its usual number of steps or with few."""
    steps, *texts = JOBS[job]
    return [shlex.split(text.format(steps=_FEW if few else steps)) for text in texts]


@contextmanager
def fresh() -> Iterator[str]:
    """A folder with a few of the digits in it."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "data.npz", **digits())
        yield folder


@cache
def digits() -> dict[str, np.ndarray]:
    """The arrays of a data set, 300 images to train on and 60 to test with."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32)[:360], labels.astype(np.int64)[:360]
    return {"x_train": x[:300], "y_train": y[:300], "x_test": x[300:], "y_test": y[300:]}


def differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """The files in which two folders differ."""
    return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]


class Job:
    """A job, and how it ends when nobody disturbs it."""

    def __init__(self, name: str, few: bool) -> None:
        self.name, self.commands = name, commands(name, few)
        with fresh() as text:
            board, start = Board(), time.perf_counter()
            code = ended(begun(Path(text), self.commands, board, Moment()))
            self.seconds, self.operations = time.perf_counter() - start, board.operations
            self.whole = contents(Path(text))
            if code:
                raise SystemExit((Path(text) / "log").read_text())

    def disturbed(self, moment: Moment, kill_after: float | None = None) -> tuple[str | None, list[str]]:
        """In which phase it was stopped (None: it was not), and how it differs once it was done again."""
        with fresh() as text:
            folder, board = Path(text), Board()
            code = ended(begun(folder, self.commands, board, moment), kill_after=kill_after)
            wanted = (-9, 2) if moment.deed == "full" else (-9,)
            if code == 0 and kill_after is not None:
                return None, []
            wrong = [] if code in (*wanted, 0) else [f"exit code {code}"]
            again = ended(begun(folder, self.commands, Board(), Moment()))
            wrong += [f"exit code {again} of the second: {(folder / 'log').read_text()[-300:]}"] if again else []
            return board.phase, wrong + differences(self.whole, contents(folder))


def main() -> int:
    """Prints what came of it as JSON; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=0)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    imported()
    choose, outcomes, start = random.Random(given.seed), [], time.perf_counter()
    jobs = [Job(name, bool(given.points)) for name in given.jobs]
    if given.points:
        deed = "full" if given.full else "kill"
        for job in jobs:
            for number in spread(job.operations, given.points).tolist():
                outcomes.append((job.name, f"operation {number}", *job.disturbed(Moment(number, deed))))
    while not given.points and len(outcomes) < given.kills:
        job = jobs[len(outcomes) % len(jobs)]
        after = choose.uniform(0.0, job.seconds)
        phase, wrong = job.disturbed(Moment(), kill_after=after)
        if phase is not None:
            outcomes.append((job.name, f"after {after:.4f} s", phase, wrong))
    report = {
        "stopped": len(outcomes),
        "jobs": Counter(each[0] for each in outcomes),
        "in": Counter(each[2] for each in outcomes),
        "ended as undisturbed": sum(not each[3] for each in outcomes),
        "otherwise": [each for each in outcomes if each[3]],
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    print(json.dumps(report, indent=2))
    return int(bool(report["otherwise"]))


if __name__ == "__main__":
    sys.exit(main())
