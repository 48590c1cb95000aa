"""The training loop over seeds and methods of every job, its progress on stderr, and the schema of its result.

A cell is one trained network: one method with one seed. It has a run folder inside the run of the job, and is finished
if its `result.json` exists. A job that was stopped skips finished cells and resumes the next one from its checkpoint.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch import nn

from jacmatch.datasets import Data, Split
from jacmatch.jacobian import unverified
from jacmatch.jobs import networks
from jacmatch.jobs.settings import JobFields
from jacmatch.models import count_parameters
from jacmatch.report import Table, write_report
from jacmatch.runs import Run, spread, threads
from jacmatch.training import Fitted, Training, evaluate, fit
from jacmatch.training.distributed import ProcessGroup
from jacmatch.training.loop import OnStep
from jacmatch.version import __version__

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
        self._now, self._began = "The job", time.monotonic()
        self._last = self._began  # the time of the last line
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

    def elapsed(self) -> float:
        """Return the seconds since this was made."""
        return time.monotonic() - self._began

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


Result = dict[str, Any]
NO_AGREEMENT: Mapping[str, None] = dict.fromkeys(("top1", "jacobian_cosine", "jacobian_relative_error"))
"""The agreement of a network that has no teacher."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One network of a study."""

    seed: int  # seed of subset, initial weights and batches
    method: str  # name of the method in folders and results; empty for a job of a single network
    label: str  # name of the method in tables and progress bars
    training: Training  # settings of the training loop
    network: networks.Description | None  # how the network is built; None if the cell saves no network
    # what decides the cell besides the settings of the run, the seed and the method
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: str = ""  # folder between those of seed and method, where there are several sizes
    others: tuple[str, ...] = ()  # other layouts that may be selected instead of the network's

    def folder(self, run: Run) -> Run:
        """Return the run folder of the cell: new, unfinished or finished."""
        name = "/".join(filter(None, (f"seed{self.seed}", self.size, self.method)))
        return run.child(name, {**run.settings, "seed": self.seed, "method": self.method, **self.settings})

    def load(self, run: Run) -> nn.Module:
        """Return the trained network of the cell."""
        assert self.network is not None
        folder = self.folder(run).path
        saved = networks.describe(folder).spec if self.others else ""
        return networks.load_own(folder, saved if saved in self.others else self.network.spec)


Done = Sequence[tuple[Cell, Result]]
"""The finished cells of a study and their results."""


@dataclass(frozen=True)
class Task:
    """The objective and student of a cell, and the functions that are called after the training.

    Attributes:
        objective: The objective; its `student` is trained.
        train: The training samples.
        validation: The samples of the learning curve.
        finish: Returns the network to save and the fields of the result that differ between jobs. Called after the last
            step, in the process that writes.
        solve: Fits the network instead of the training loop; it restarts if it was stopped.
    """

    objective: nn.Module
    train: Split
    validation: Split | None
    finish: Callable[[], tuple[nn.Module, Mapping[str, Any]]]
    solve: Callable[[OnStep], Fitted] | None = None


def run_cells(
    run: Run,
    cells: Iterable[Cell],
    prepare: Callable[[Cell], Task],
    conclude: Callable[[Done], Result],
    *,
    device: str,
    progress: Progress,
    tables: Callable[[Result], list[Table]] = lambda result: [],
) -> Result:
    """Train all cells that are not finished, then write the result and the report of the run.

    `conclude` returns what is not in every result; `tables` receives the whole.
    """
    done, steps = [], 0
    # The pre-flight check of a smoke run verifies the derivatives once, on few samples.
    with unverified() if run.settings.get("smoke") else nullcontext():
        for cell in cells:
            child, steps = cell.folder(run), cell.training.steps
            if not child.finished:
                reached = train_cell(cell, child, prepare(cell), device, progress)
                if reached is not None:
                    return unfinished(run, reached)
            elif cell.network is not None:
                cell.load(run)  # a damaged network stops the job before it trains others
            if not run.follows:
                done.append((cell, child.result))
        if run.follows:
            return unfinished(run, steps)
        result = {**head(run, done[0][0].seed), **conclude(done)}
        result |= {"seconds": progress.elapsed(), "settings": run.settings}
        result |= {"tables": [table.plain() for table in shown]} if (shown := tables(result)) else {}
    report = write_report(run.path, result)
    run.write_result(result)
    return {**result, "out": str(run.path), "report": str(report)}


def train_cell(cell: Cell, child: Run, task: Task, device: str, progress: Progress) -> int | None:
    """Train one cell and write its result; return the steps so far if it stopped before the last one."""
    seed = f", seed {cell.seed}" if cell.method else ""
    on_step = progress.training(f"{cell.label}{seed}", cell.training.steps)
    if task.solve is not None:
        fitted = task.solve(on_step)
    else:
        fitted = fit(
            task.objective,
            task.train,
            cell.training,
            seed=cell.seed,
            device=device,
            run=child,
            validation=task.validation,
            on_step=on_step,
        )
    if not fitted.finished or child.follows:
        return None if fitted.finished else fitted.steps
    network, fields = task.finish()
    fields = dict(fields)
    spec = fields.pop("spec", None)
    if cell.network is not None:
        networks.save(child, network, cell.network if spec is None else replace(cell.network, spec=spec))
    child.write_result(
        {
            **head(child, cell.seed),
            **({"method": cell.method} if cell.method else {}),
            **fields,
            **{name: value for name, value in vars(fitted).items() if name != "finished"},
            "settings": child.settings,
        }
    )
    return None


def unfinished(run: Run, steps: int) -> Result:
    """Return the result of a job that stopped at `--max-steps`."""
    return {"job": run.job, "finished": False, "steps": steps, "out": str(run.path)}


def head(run: Run, seed: int) -> Result:
    """Return the fields that begin every result."""
    return {"job": run.job, "version": __version__, "threads": threads(), "seed": seed}


def write_measurement(job: JobFields, run: Run, data: Data, start: float, **fields: Any) -> Result:
    """Write the result of a job that only measures, and return it with its folder."""
    result = {**head(run, job.seed), **fields, "data": data.name}
    result |= {"seconds": time.perf_counter() - start, "settings": job.settings()}
    run.write_result(result)
    return {**result, "out": str(run.path)}


def measured(network: nn.Module, test: Split, device: str | torch.device) -> Result:
    """Return accuracy or RMSE of a network on test samples, and its number of parameters."""
    return {**evaluate(network, test, device=device), "parameters": count_parameters(network)}


def quality(network: Mapping[str, Any]) -> str:
    """Return the name of the metric of a network: `accuracy`, or `rmse` in a regression."""
    return "accuracy" if "accuracy" in network else "rmse"


def save_main(run: Run, cell: Cell, loaded: nn.Module | None = None) -> nn.Module:
    """Save the network of a cell, which may be loaded already, as the network of the run, and return it."""
    network = cell.load(run) if loaded is None else loaded
    networks.save(run, network, networks.describe(cell.folder(run).path))
    return network


def of_method(done: Done, method: str) -> list[Result]:
    """Return the results of one method, in the order of the seeds."""
    return [result for cell, result in done if cell.method == method]


def over_seeds(values: Sequence[float | None]) -> Result | None:
    """Return mean and standard deviation of the values that exist; None if none does."""
    known = [value for value in values if value is not None]
    return spread(known) if known else None


def row(label: str, results: Sequence[Result], **fields: Any) -> Result:
    """Return the row of one method: means and standard deviations over the seeds."""
    measures = [name for name in ("accuracy", "miou", "rmse") if name in results[0]["student"]]
    return {
        "method": results[0]["method"],
        "label": label,
        "seeds": len(results),
        "steps": results[0]["steps"],
        **{name: spread([result["student"][name] for result in results]) for name in measures},
        **fields,
        "seconds": spread([result["seconds"] for result in results]),
    }


def main_fields(results: Sequence[Result], main: Mapping[str, Any]) -> Result:
    """Return the fields of a run's result that come from the one method whose network is saved in the run folder."""
    measures = [name for name in ("accuracy", "miou", "rmse") if name in results[0]["student"]]
    agreement = main.get("agreement", {})
    return {
        "student": {**results[0]["student"], **{name: main[name]["mean"] for name in measures}},
        "agreement": {key: (agreement.get(key) or {"mean": None})["mean"] for key in results[0]["agreement"]},
        "samples_per_second": sum(result["samples_per_second"] for result in results) / len(results),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
    }
