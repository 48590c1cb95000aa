"""Progress bars on stderr, one line for each network that is trained."""

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from jacmatch.training.distributed import ProcessGroup


class Progress:
    """A context that shows the trainings of a job.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._bars = Bars(
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f} {task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet or not sys.stderr.isatty() or not ProcessGroup.current().first,
        )

    def __enter__(self) -> "Progress":
        """Starts drawing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops drawing."""
        self._bars.stop()

    def say(self, line: str) -> None:
        """Prints a line on stderr, above the bars."""
        if ProcessGroup.current().first:
            self._bars.console.print(line, highlight=False, soft_wrap=True)

    def training(self, name: str, steps: int) -> Callable[[int, dict[str, float]], None]:
        """A new bar, as the function that the training loop calls."""
        bar = self._bars.add_task(name, total=steps, note="")

        def on_step(step: int, metrics: dict[str, float]) -> None:
            for key in ("validation_accuracy", "validation_rmse"):
                if key in metrics:
                    self._bars.update(bar, note=f"{key.removeprefix('validation_')} {metrics[key]:.3f}")
            self._bars.update(bar, completed=step)

        return on_step
