"""The claims of a benchmark, the rows that test them, and the measurement.

The compared methods alternate in one process with one thread, and ratios are reported. On the CPU, the time is that of
the processor, without the time in which the process waits for it. Each round gives the ratio of two consecutive runs,
so that other load on the machine affects both. The median over the rounds and the quartiles are reported.
"""

import contextlib
import dataclasses
import io
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from jacmatch.cli.launch import python


class NotMeasured(Exception):
    """Why a row has no numbers."""


@dataclass(frozen=True)
class Conditions:
    """The device (cpu or cuda) and the size of a measurement.

    `quick` means a few rounds on small networks, whose numbers mean nothing; `missing` is the reason if nothing can be
    measured. A long benchmark stores finished measurements in `folder`. `clock` replaces the clock of a test.
    """

    kind: str = "cpu"
    quick: bool = False
    seed: int = 0
    missing: str = ""
    folder: Path = Path()
    clock: Callable[[], float] | None = None

    def now(self) -> float:
        """Return the seconds of CPU time of the process; of wall-clock time on a GPU."""
        return (self.clock or (time.process_time if self.kind == "cpu" else time.perf_counter))()

    @property
    def device(self) -> torch.device:
        """The device of tensors and networks."""
        return torch.device(self.kind)

    def rounds(self, full: int) -> int:
        """The number of rounds."""
        return 3 if self.quick else full

    def wait(self) -> None:
        """Wait until the device has finished its queue."""
        if self.kind == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` ratios."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Spread":
        """The spread of these ratios; a single ratio is its own median and quartiles."""
        values = list(ratios) if len(ratios) > 1 else [*ratios] * 2
        low, median, high = (float(f"{each:.4g}") for each in statistics.quantiles(values, n=4, method="inclusive"))
        return cls(median, low, high, len(ratios))


@dataclass(frozen=True)
class Times:
    """The result of a comparison: the ratios of the rounds, and the seconds of the baseline."""

    spread: Spread
    baseline_seconds: float


def compare(
    conditions: Conditions, contestant: Callable[[], object], baseline: Callable[[], object], rounds: int
) -> Times:
    """Time of the method ÷ time of the baseline, after a warm-up; each goes first in every other round.

    Each runs `rounds` times, except in a quick run.
    """
    ratios, seconds = [], []
    for run in (contestant, baseline):
        timed(conditions, run)
    for number in range(conditions.rounds(rounds)):
        order = (contestant, baseline) if number % 2 else (baseline, contestant)
        times = {run: timed(conditions, run) for run in order}
        ratios.append(times[contestant] / times[baseline])
        seconds.append(times[baseline])
    return Times(Spread.of(ratios), float(f"{statistics.median(seconds):.4g}"))


def timed(conditions: Conditions, run: Callable[[], object]) -> float:
    """Seconds of a run; the device is synchronized before and after it."""
    conditions.wait()
    start = conditions.now()
    run()
    conditions.wait()
    return conditions.now() - start


def peak_memory(conditions: Conditions, script: str, environment: Mapping[str, str] | None = None) -> int:
    """Largest memory in bytes that this Python text needs in a new process.

    On the CPU the largest resident memory (Linux), on a GPU the largest that torch had allocated. The text finds the
    device under the name `device`. In a smoke run, the text runs in this process, and the number means nothing.
    `environment` holds variables of the process besides those of this one.
    """
    if conditions.kind == "cuda":
        script += "\nprint(torch.cuda.max_memory_allocated() // 1024)"
    else:  # Not getrusage: its maximum is inherited from the process that started this one.
        script += "\nimport pathlib\nprint(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    return int(output(conditions, script, environment)) * 1024


def output(conditions: Conditions, script: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the last word that this Python program prints in a new process; in a quick run, in this process."""
    text = f"import torch\ntorch.set_num_threads(1)\ndevice = {conditions.kind!r}\n{script}\n"
    if conditions.quick:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(text, {"__name__": "__main__"})
        return printed.getvalue().split()[-1]
    variables = {**os.environ, **(environment or {})}
    command = python(text, "-W", "ignore")
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout.split()[-1]


def compare_memory(
    conditions: Conditions,
    contestant: str,
    baseline: str,
    rounds: int = 3,
    environment: Mapping[str, str] | None = None,
) -> Spread:
    """Peak memory of one Python text ÷ that of another, each time in new processes."""
    turns = range(1 if conditions.quick else rounds)
    pairs = [[peak_memory(conditions, script, environment) for script in (contestant, baseline)] for _ in turns]
    return Spread.of([mine / other for mine, other in pairs])


@dataclass(frozen=True)
class Claim:
    """A ratio of two costs (`text`: what ÷ what) and its bounds.

    `must` is the largest ratio that the project claims (the smallest, where higher is better), or None; `aim` is its
    goal. With `of_floor`, they are multiples of the lower limit of the row.
    """

    text: str
    must: float | None = None
    aim: float | None = None
    better: Literal["lower", "higher"] = "lower"
    of_floor: bool = False


@dataclass(frozen=True)
class Measured:
    """The result of one case: median, quartiles, the lower limit by number of operations, and further numbers."""

    spread: Spread
    floor: float | None = None
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: networks, sizes and modes as its name, and the function that gives its numbers.

    It is measured on those of its devices that the machine has. It is empty on other devices, and if `NotMeasured` is
    raised.
    """

    claim: Claim
    name: str
    measure: Callable[[Conditions], Measured]
    devices: tuple[str, ...] = ("cpu", "cuda")

    def row(self, conditions: Conditions) -> dict[str, Any]:
        """The row of the result file; without numbers, but with the reason, if nothing could be measured."""
        try:
            if conditions.missing:
                raise NotMeasured(conditions.missing)
            measured, reason = self.measure(conditions), None
        except NotMeasured as why:
            measured, reason = None, str(why)
        return {
            "claim": self.claim.text,
            "case": self.name,
            "device": conditions.kind,
            "better": self.claim.better,
            **self._bounds(measured),
            **(dataclasses.asdict(measured.spread) if measured else dict.fromkeys(("median", "low", "high"))),
            **({} if measured else {"n": 0}),
            "why_empty": reason,
            "details": dict(measured.details) if measured else {},
        }

    def _bounds(self, measured: Measured | None) -> dict[str, Any]:
        """Bounds, lower limit, and whether the median meets them; None where there is no bound or no number."""
        floor = measured.floor if measured else None
        unit = floor if self.claim.of_floor else 1.0
        results: dict[str, Any] = {"floor": None if floor is None else round(floor, 3)}
        for name, verdict in (("must", "met"), ("aim", "reached")):
            factor = getattr(self.claim, name)
            bound = None if factor is None or unit is None else factor * unit
            sign = 1 if self.claim.better == "lower" else -1
            results[name] = None if bound is None else round(bound, 3)
            retained = bound is not None and measured is not None and sign * measured.spread.median <= sign * bound
            results[verdict] = None if bound is None or measured is None else retained
        return results


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its description in a line, and the rows in the order in which they are measured and shown."""

    about: str
    cases: tuple[Case, ...]
