"""Loggers, which receive the rows of metrics of a training, and images of Jacobians at each evaluation."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from jacmatch.datasets import Split
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import vjp_products
from jacmatch.objectives import Objective
from jacmatch.objectives.base import networks_of
from jacmatch.runs import Run
from jacmatch.teachers import Question, as_teacher
from jacmatch.teachers.base import query
from jacmatch.training.configuration import Logger
from jacmatch.training.identity import undisturbed
from jacmatch.training.state import State

FOLDER: Final = "logs"
"""Subfolder of a run for the files of a logger."""
IMAGES: Final = "jacobian_images"
"""Name of the images of Jacobians in a logger; `jacobians` is that of a term of the loss."""

_PROJECT = "jacmatch"
_SAMPLES, _SIDE, _GAP = 8, 64, 2  # images of Jacobians: samples, smallest side in pixels, gap in pixels
_Image = UInt8[np.ndarray, "tall wide 3"]


@dataclass(frozen=True)
class _Opened:
    """A logger in use."""

    row: Callable[[Mapping[str, float], int], None]
    close: Callable[[], None]
    image: Callable[[_Image, int], None] | None = None  # None: it stores numbers only


@contextmanager
def logged(name: Logger | None, run: Run | None, state: State, split: Split) -> Iterator[tuple[Run | None, Any]]:
    """Also send the metrics of the run to a logger inside the block; without one, leave the run unchanged.

    Yields the run, and a function that sends the images of Jacobians of some samples of the split at this step.
    """
    if name is None or run is None or run.follows:
        yield run, lambda: None
        return
    try:
        opened = _OPENED[name](run)
    except ModuleNotFoundError as error:
        package = name if name in ("wandb", "mlflow") else "tensorboard"
        rule = f"The logger {name} needs the package {package}, which is not installed. Run: pip install {package}."
        raise UnsupportedError(rule) from error

    def observe(row: Mapping[str, Any]) -> None:
        opened.row({key: value for key, value in row.items() if key != "step"}, int(row["step"]))

    def show() -> None:
        start = time.perf_counter()
        if opened.image is not None and (image := jacobian_image(state, split)) is not None:
            opened.image(image, state.step)
        state.aside += time.perf_counter() - start

    try:
        yield replace(run, observer=observe), show
    finally:
        opened.close()


def _csv(run: Run) -> _Opened:
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(run.path / FOLDER, name="csv", flush_logs_every_n_steps=1)
    return _Opened(logger.log_metrics, lambda: logger.finalize("success"))


def _tensorboard(run: Run) -> _Opened:
    from lightning_fabric.loggers import TensorBoardLogger

    logger = TensorBoardLogger(run.path / FOLDER, name="tensorboard", version="")

    def image(pixels: _Image, step: int) -> None:
        logger.experiment.add_image(IMAGES, pixels, step, dataformats="HWC")

    return _Opened(logger.log_metrics, lambda: logger.finalize("success"), image)


def _wandb(run: Run) -> _Opened:
    import wandb

    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    number = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:12]
    settings = {"name": str(run.path), "id": number, "resume": "allow", "dir": str(folder)}
    tracked = wandb.init(project=_PROJECT, config=dict(run.settings), **settings)

    def image(pixels: _Image, step: int) -> None:
        tracked.log({IMAGES: wandb.Image(pixels, caption="input, teacher, student")}, step=step)

    return _Opened(lambda row, step: tracked.log(dict(row), step=step), tracked.finish, image)


def _mlflow(run: Run) -> _Opened:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment(_PROJECT).experiment_id
    tracked = client.create_run(experiment, run_name=str(run.path)).info.run_id
    for key, value in run.settings.items():
        client.log_param(tracked, key, value)

    def row(numbers: Mapping[str, float], step: int) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [mlflow.entities.Metric(key, value, now, step) for key, value in numbers.items()]
        client.log_batch(tracked, metrics=metrics)

    def image(pixels: _Image, step: int) -> None:
        client.log_image(tracked, pixels, key=IMAGES, step=step)

    return _Opened(row, lambda: client.set_terminated(tracked), image)


_OPENED: Final[dict[str, Callable[[Run], _Opened]]] = {
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def first_of_classes(split: Split, count: int = _SAMPLES) -> Int64[Tensor, "chosen"]:
    """Return the row of the first sample of each class, for the first `count` classes; of numbers the first rows."""
    if split.y.is_floating_point():
        return torch.arange(min(count, len(split)))
    present = torch.unique(split.y)[:count].tolist()
    return torch.tensor([int((split.y == number).nonzero()[0]) for number in present])


def jacobian_image(state: State, split: Split) -> _Image | None:
    """Draw input, teacher's row and student's row of the Jacobian, one column for each sample; None without images.

    The row is that of the largest output: the teacher's, if both networks have the same outputs. Derivatives are summed
    over channels: zero is white, the largest magnitude of a row full red if positive and full blue if negative. If the
    teacher cannot compute vᵀJ, the second line is left out. The training is not changed.
    """
    if len(split.x.shape) != 4 or split.y.dim() > 1 + split.y.is_floating_point():
        return None
    student, teacher = state.student if state.average is None else state.average, networks_of(state.objective)[1]
    x = split.inputs(first_of_classes(split)).to(state.device)
    known = state.objective if isinstance(state.objective, Objective) else None
    tops: dict[int, Tensor] = {}  # the top output of each sample, by the number of outputs

    def top_row(values: Tensor) -> Tensor:
        top = tops.setdefault(values.shape[1], values.argmax(1))
        return functional.one_hot(top, values.shape[1]).to(values.dtype)[None]

    lines = [_pixels(x)]
    with undisturbed(student, state.device), nullcontext() if known is None else known.selected_outputs(student):
        if teacher is not None and as_teacher(teacher).answers_vjp:
            with suppress(InputError, UnsupportedError):  # a cache on disk has only its own samples
                products = query(as_teacher(teacher), x, Question(cotangents=top_row)).products
                lines += [] if products is None else [_signed(products[0])]
        try:
            lines.append(_signed(vjp_products(student, x, top_row).products[0]))
        except (InputError, UnsupportedError):  # outputs of positions, or no derivative
            return None
    return _tiled(lines)


def _pixels(x: Float[Tensor, "sample channel height width"]) -> Float[Tensor, "sample height width 3"]:
    """Images in [0, 1]; others are scaled to it."""
    low, high = (getattr(x, name)((1, 2, 3), keepdim=True) for name in ("amin", "amax"))
    x = x if bool((low >= 0).all() and (high <= 1).all()) else (x - low) / (high - low).clamp_min(1e-12)
    return (x if x.shape[1] == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)).movedim(1, -1)


def _signed(rows: Float[Tensor, "sample channel height width"]) -> Float[Tensor, "sample height width 3"]:
    """Red for positive, blue for negative, white for zero."""
    flat = rows.detach().float().sum(1)
    share = flat / flat.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)
    return torch.stack([1 - (-share).clamp_min(0), 1 - share.abs(), 1 - share.clamp_min(0)], -1)


def _tiled(lines: list[Float[Tensor, "sample height width 3"]]) -> _Image:
    """One image of all, with white between them; small ones are enlarged."""
    times = -(-_SIDE // max(lines[0].shape[1:3]))
    parts = torch.stack(lines).repeat_interleave(times, 2).repeat_interleave(times, 3)
    parts = functional.pad(parts, (0, 0, 0, _GAP, 0, _GAP), value=1.0)
    line, sample, height, width, _ = parts.shape
    whole = parts.permute(0, 2, 1, 3, 4).reshape(line * height, sample * width, 3)[:-_GAP, :-_GAP]
    return (255 * whole.clamp(0, 1)).round().byte().cpu().numpy()
