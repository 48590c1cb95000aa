"""Rows of metrics that are copied to the host asynchronously, and the loggers that receive them.

The terms of each step stay on the device. When a row is due, its copy to the host is queued, and the loop continues;
the row is written when it has arrived. On the CPU this is immediate.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.runs import Run
from jacmatch.training.configuration import Logger
from jacmatch.training.distributed import ProcessGroup

GRADIENT, SKIPPED = "_gradient", "_skipped"
"""Columns of the table that no row shows: the norm of the gradient, and whether the step was made undone."""


@dataclass(frozen=True)
class Bad:
    """A step with a number that is not finite."""

    step: int  # counted from 1
    what: str  # the term, or the gradient
    value: float  # the number


class NotFinite(InputError):
    """A term or the gradient of a step is not finite."""

    def __init__(self, bad: Bad, do: str) -> None:
        """Composes the message."""
        self.bad, self.do = bad, do
        self.rule = f"{bad.what[0].upper()}{bad.what[1:]} must be finite in every step."
        self.got = f"{bad.value} in step {bad.step}"
        super().__init__(self.rule, got=self.got, do=do)


@runtime_checkable
class _Arrival(Protocol):
    """An event of the device."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True, eq=False)
class _UnderWay:
    """A row on its way to the host."""

    step: int
    names: list[str]
    table: Tensor
    arrival: _Arrival | None
    known: dict[str, float]


class Metrics:
    """The terms of the steps since the last row, and the rows that are being copied to the host.

    Attributes:
        skipped: Steps that were undone and not yet reported.

    Example:
        >>> metrics = Metrics(torch.device("cpu"))
        >>> for loss in (1.0, 2.0):
        ...     metrics.add({"loss": torch.tensor(loss)})
        >>> metrics.send(2, {"lr": 0.1})
        >>> metrics.arrived(do="Lower `lr`.")
        [(2, {'loss': 1.5, 'lr': 0.1})]
    """

    def __init__(self, device: torch.device, ranks: ProcessGroup = ProcessGroup()) -> None:  # noqa: B008 - frozen
        self._device, self._ranks = device, ranks
        self._steps: list[dict[str, Tensor]] = []
        self._under_way: deque[_UnderWay] = deque()
        self.skipped: list[Bad] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of one step; they stay on the device."""
        self._steps.append(terms)

    def send(self, step: int, known: dict[str, float]) -> None:
        """Queue the copy of a row to the host: the means of the terms since the last row."""
        if not self._steps:
            return
        names = list(dict.fromkeys(name for terms in self._steps for name in terms))
        absent = next(iter(self._steps[0].values())).new_zeros(())  # a term that a step leaves out is 0 there
        numbers = [terms.get(name, absent).float() for terms in self._steps for name in names]
        table, arrival = torch.stack(numbers).view(len(self._steps), len(names)), None
        if self._ranks.size > 1:
            table = self._ranks.all_reduce(table) / self._ranks.size
        if self._device.type == "cuda":
            table, arrival = _sent(table)
        self._under_way.append(_UnderWay(step, names, table, arrival, known))
        self._steps.clear()

    def arrived(self, do: str, *, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        """Return the rows that have arrived since the last call, each with its step."""
        rows = []
        while self._under_way:
            first = self._under_way[0]
            if first.arrival is not None:
                if not (wait or first.arrival.query()):
                    break
                first.arrival.synchronize()
            self._under_way.popleft()
            rows.append((first.step, self._row(first, do)))
        return rows

    def _row(self, sent: _UnderWay, do: str) -> dict[str, float]:
        """The means over the steps that were not made undone."""
        table, good = sent.table.double(), []
        for number, values in enumerate(table.tolist(), sent.step - len(table) + 1):
            step = dict(zip(sent.names, values, strict=True))
            wrong = {name: value for name, value in step.items() if not math.isfinite(value)}
            if wrong:
                first = min(wrong, key=lambda name: (name == GRADIENT, name == "loss"))
                what = "the gradient" if first == GRADIENT else f"the term `{first}` of the loss"
                bad = Bad(number, what, wrong[first])
                if not step.get(SKIPPED):
                    raise NotFinite(bad, do)
                self.skipped.append(bad)
            else:
                good.append(number - sent.step - 1)
        means = dict(zip(sent.names, table[good].mean(0).tolist(), strict=True)) if good else {}
        shown = {name: value for name, value in means.items() if name not in (GRADIENT, SKIPPED)}
        lost = {"skipped": float(len(table) - len(good))} if len(good) < len(table) else {}
        return {**shown, **lost, **sent.known}


def _sent(table: Tensor) -> tuple[Tensor, _Arrival]:
    """The table in memory that the GPU can write to by itself, and the event that says that it has."""
    target = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    target.copy_(table, non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record(torch.cuda.current_stream(table.device))
    return target, arrival


FOLDER: Final = "logs"
"""Subfolder of a run for the files of a logger."""

_PROJECT = "jacmatch"
_Write = Callable[[Mapping[str, float], int], None]
_Close = Callable[[], None]


@contextmanager
def logged(name: Logger | None, run: Run | None) -> Iterator[Run | None]:
    """Also send the metrics of the run to a logger inside the block; without one, leave the run unchanged."""
    if name is None or run is None or run.follows:
        yield run
        return
    try:
        write, close = _OPENED[name](run)
    except ModuleNotFoundError as error:
        package = name if name in ("wandb", "mlflow") else "tensorboard"
        raise UnsupportedError(
            f"The logger {name} needs the package {package}, which is not installed. Run: pip install {package}."
        ) from error

    def observe(row: Mapping[str, Any]) -> None:
        write({key: value for key, value in row.items() if key != "step"}, int(row["step"]))

    try:
        yield replace(run, observer=observe)
    finally:
        close()


def _csv(run: Run) -> tuple[_Write, _Close]:
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(run.path / FOLDER, name="csv", flush_logs_every_n_steps=1)
    return logger.log_metrics, lambda: logger.finalize("success")


def _tensorboard(run: Run) -> tuple[_Write, _Close]:
    from lightning_fabric.loggers import TensorBoardLogger

    logger = TensorBoardLogger(run.path / FOLDER, name="tensorboard", version="")
    return logger.log_metrics, lambda: logger.finalize("success")


def _wandb(run: Run) -> tuple[_Write, _Close]:
    import wandb

    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    number = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:12]
    settings = {"name": str(run.path), "id": number, "resume": "allow", "dir": str(folder)}
    tracked = wandb.init(project=_PROJECT, config=dict(run.settings), **settings)
    return lambda row, step: tracked.log(dict(row), step=step), tracked.finish


def _mlflow(run: Run) -> tuple[_Write, _Close]:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment(_PROJECT).experiment_id
    tracked = client.create_run(experiment, run_name=str(run.path)).info.run_id
    for key, value in run.settings.items():
        client.log_param(tracked, key, value)

    def write(row: Mapping[str, float], step: int) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [mlflow.entities.Metric(key, value, now, step) for key, value in row.items()]
        client.log_batch(tracked, metrics=metrics)

    return write, lambda: client.set_terminated(tracked)


_OPENED: Final[dict[str, Callable[[Run], tuple[_Write, _Close]]]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
