"""Metrics in the tools that draw curves: each row of a run's metrics is also one call of the tool's own logger."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Literal, TypeAlias

from jacmatch.errors import UnsupportedError
from jacmatch.runs import Run

Logger: TypeAlias = Literal["csv", "tensorboard", "wandb", "mlflow"]
LOGGERS: Final = ("csv", "tensorboard", "wandb", "mlflow")
FOLDER: Final = "logs"
"""Where the files of a logger lie in a run folder."""

_PROJECT = "jacmatch"
_Write = Callable[[Mapping[str, float], int], None]
_Close = Callable[[], None]


@contextmanager
def logged(name: Logger | None, run: Run | None) -> Iterator[Run | None]:
    """Within the context, the metrics of the run also go to a logger; the run as it is without one."""
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
