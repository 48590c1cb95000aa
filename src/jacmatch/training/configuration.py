"""Settings of the training loop, and what follows from them for each step: learning rate and averaging."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from jacmatch.errors import InputError, unknown_name
from jacmatch.training.data import AUGMENTATIONS
from jacmatch.training.loggers import LOGGERS, Logger

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("32", "bf16", "fp16")


@dataclass(frozen=True)
class Training:
    """Settings of the training loop.

    Attributes:
        steps: Steps of the optimizer.
        batch_size: Samples in a batch.
        lr: Learning rate after the warm-up.
        optimizer: `adam` (weight decay as L2 penalty), `adamw` (decoupled weight decay) or `sgd`.
        weight_decay: Its coefficient, at least 0.
        momentum: Of `sgd`, in [0, 1).
        schedule: Learning rate after the warm-up; see `factor`.
        milestones: Of schedule `step`: shares of `steps`, ascending, at each of which the rate falls to a tenth.
        warmup: Steps in which the learning rate rises linearly to `lr`.
        clip: Largest gradient norm (2-norm over all parameters); None does not clip.
        accumulate: Batches whose gradients are averaged for one step.
        ema: Decay of a running average of the weights, in (0, 1), which is then validated and returned; None
            returns the trained weights. See `ema_decay`.
        precision: `32`, or 16-bit autocast in `bf16`, or `fp16` with loss scaling (CUDA only).
        on_not_finite: What to do with a step whose loss or gradient is not finite: `stop` ends the run and keeps the
            last checkpoint; `skip` restores the state before that step.
        skip_at_most: With `skip`, the largest number of skipped steps in a run; one more stops it.
        augment: Augmentations of images.
        views: Number of different views of a sample: its augmentation, partner, point and directions repeat after
            so many epochs; 0 draws new ones in every epoch. The order of the samples is always new.
        validate_every: Steps between two evaluations on the validation split.
        checkpoint_every: Steps between two checkpoints.
        max_steps: Stop after this step, as if interrupted; None goes on to `steps`.
        workers: Threads that read and decode data which is not on the device; 0 reads in the loop itself.
        prefetch: Batches read ahead. Neither changes a result.
        resident_mib: A streamed data set that fits, decoded, into so many MiB is read into memory once.
        doctor: Run `jacmatch.diagnostics.preflight_check` before the first step. It changes no result.
        logger: Where the metrics are logged besides the run folder; see `training.loggers`. It changes no result.
        compile: Compile the steps of the objective; see `objectives.CompiledSteps`.
        cuda_graphs: Launch compiled steps as CUDA graphs.
        shard: Shard weights, gradients and the optimizer's state over the processes (FSDP2).
        channels_last: Use the channels-last memory format for the student while it is trained.

    Raises:
        InputError: A setting is out of its range.

    Example:
        >>> Training(steps=100, optimizer="sgd", lr=0.1).momentum
        0.9
    """

    steps: int = 600
    batch_size: int = 128
    lr: float = 1e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = (0.8,)
    warmup: int = 0
    clip: float | None = None
    accumulate: int = 1
    ema: float | None = None
    precision: Literal["32", "bf16", "fp16"] = "32"
    on_not_finite: Literal["stop", "skip"] = "stop"
    skip_at_most: int = 10
    augment: tuple[Literal["crop", "flip"], ...] = ()
    views: int = 0
    validate_every: int = 100
    checkpoint_every: int = 200
    max_steps: int | None = None
    workers: int = 2
    prefetch: int = 2
    resident_mib: int = 256
    doctor: bool = True
    logger: Logger | None = None
    compile: bool = False
    cuda_graphs: bool = False
    channels_last: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "checkpoint_every"):
            _whole(name, getattr(self, name), 1)
        for name in ("warmup", "views", "skip_at_most", "workers", "prefetch", "resident_mib"):
            _whole(name, getattr(self, name), 0)
        if self.max_steps is not None:
            _whole("max_steps", self.max_steps, 1)
        _within("lr", self.lr, "positive", self.lr > 0)
        _within("weight_decay", self.weight_decay, "at least 0", self.weight_decay >= 0)
        _within("momentum", self.momentum, "in [0, 1)", 0 <= self.momentum < 1)
        if self.clip is not None:
            _within("clip", self.clip, "positive", self.clip > 0, do="Use None not to clip.")
        if self.ema is not None:
            _within("ema", self.ema, "in (0, 1)", 0 < self.ema < 1, do="Use None for no average.")
        if self.warmup > self.steps:
            rule = f"`warmup` of `Training` must not be longer than `steps`, {self.steps}."
            raise InputError(rule, got=self.warmup, do="A tenth of the steps is plenty.")
        if list(self.milestones) != sorted(set(self.milestones)) or not all(0 < m < 1 for m in self.milestones):
            rule = "`milestones` of `Training` must be ascending shares of the steps, each in (0, 1)."
            raise InputError(rule, got=self.milestones, do="Use for example (0.5, 0.75).")
        if self.cuda_graphs and not self.compile:
            raise InputError("`cuda_graphs` of `Training` must come with `compile`.", do="Set compile=True as well.")
        _known("optimizer", self.optimizer, OPTIMIZERS)
        _known("schedule", self.schedule, SCHEDULES)
        _known("precision", self.precision, PRECISIONS)
        _known("on_not_finite", self.on_not_finite, ("stop", "skip"))
        if self.logger is not None:
            _known("logger", self.logger, LOGGERS)
        for name in self.augment:
            _known("augment", name, AUGMENTATIONS)


def factor(step: int, settings: Training) -> float:
    """The learning rate of a step as a share of `settings.lr`, in [0, 1].

    With s = `step`, w = `warmup` and S = `steps`: (s + 1)/w while s < w, and then for the schedule

    - `constant`: 1;
    - `cosine`: ½(1 + cos π(s − w)/(S − w));
    - `step`: 10⁻ᵏ, k the number of milestones m with s ≥ m·S.

    Args:
        step: From 0; the number of steps already made.
        settings: The schedule, its milestones, `warmup` and `steps`.

    References:
        Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5 (the cosine, here without restarts).

    Example:
        >>> [factor(step, Training(steps=4, schedule="cosine", warmup=2)) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - settings.warmup) / (settings.steps - settings.warmup))) / 2
    if settings.schedule == "step":
        return 0.1 ** sum(step >= milestone * settings.steps for milestone in settings.milestones)
    return 1.0


def ema_decay(step: int, decay: float) -> float:
    """The decay of the running average after step number `step`: min(decay, (1 + step)/(10 + step)).

    Without the second bound the average of a short run would consist of the weights it began with.

    Args:
        step: From 0.
        decay: The decay that is reached in the end.

    Example:
        >>> ema_decay(0, 0.999), ema_decay(100_000, 0.999)
        (0.1, 0.999)
    """
    return min(decay, (1 + step) / (10 + step))


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"`{name}` of `Training` must be a whole number, at least {least}.", got=repr(value))


def _within(name: str, value: float, rule: str, holds: bool, do: str = "") -> None:
    if not (holds and math.isfinite(value)):
        raise InputError(f"`{name}` of `Training` must be finite and {rule}.", got=value, do=do)


def _known(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise unknown_name(f"`{name}` of `Training`", value, known)
