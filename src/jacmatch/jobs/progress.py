"""The progress of a job on stderr: bars on a terminal, lines in a log."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from jacmatch.training.distributed import ProcessGroup

LONGEST_SILENCE = 30.0
"""Seconds after which a log gets a line in any case."""
_SHORTEST_SILENCE = 2.0  # seconds between two lines: short trainings do not fill a log


class Progress:
    """The progress of a job: bars on a terminal, lines in a log.

    Outside a terminal a line is printed at each tenth of the steps, and after 30 seconds without one. With `quiet`
    nothing is shown.
    """

    def __init__(self, quiet: bool = False) -> None:
        shown = not quiet and ProcessGroup.current().first
        self._bars = Bars(
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f} {task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown or not sys.stderr.isatty(),
        )
        self._in_log = shown and not sys.stderr.isatty()
        self._now, self._last = (
            "The job",
            time.monotonic(),
        )  # the line that describes the present state; time of the last line
        self._end = threading.Event()
        self._watch = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> "Progress":
        self._bars.start()
        if self._in_log:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._end.set()
        if self._watch.is_alive():
            self._watch.join()

    def message(self, line: str) -> None:
        """Print a line on stderr, above the bars."""
        if ProcessGroup.current().first:
            self._bars.console.print(line, highlight=False, soft_wrap=True)

    def stage(self, name: str) -> None:
        """Name a part of the job of unknown length; a log repeats it every 30 seconds."""
        self._now = name
        if not self._bars.disable:
            self._bars.add_task(name, total=1, note="")

    def training(self, name: str, steps: int) -> Callable[[int, dict[str, float]], None]:
        """Return the function that a loop calls after each step, with the metrics of that step."""
        bar = self._bars.add_task(name, total=steps, note="")
        start, printed, note = time.monotonic(), 0, ""
        self._now = f"{name}: begins"

        def on_step(step: int, metrics: dict[str, float]) -> None:
            nonlocal printed, note
            for key in ("validation_accuracy", "validation_rmse"):
                if key in metrics:
                    note = f"{key.removeprefix('validation_')} {metrics[key]:.3f}"
                    self._bars.update(bar, note=note)
            self._bars.update(bar, completed=step)
            now = time.monotonic()
            self._now = f"{name}: {step}/{steps}{note and f', {note}'}, {now - start:.0f} s"
            tenth = step >= steps or 10 * (step - printed) >= steps
            if self._in_log and tenth and now - self._last >= _SHORTEST_SILENCE:
                printed = step
                self._print()

        return on_step

    def _print(self, more: str = "") -> None:
        self._last = time.monotonic()
        print(f"{self._now}{more}", file=sys.stderr, flush=True)

    def _repeat(self) -> None:
        """Print the state after each long silence, until the context ends."""
        silent = 0.0
        while not self._end.wait(LONGEST_SILENCE - silent):
            silent = time.monotonic() - self._last
            if silent >= LONGEST_SILENCE:
                self._print(" (running)")
                silent = 0.0
