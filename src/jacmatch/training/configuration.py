"""Settings of the training loop, and the learning rate and EMA decay of each step."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

from jacmatch.errors import InputError, unknown_name, whole_number
from jacmatch.training.data import AUGMENTATIONS

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("32", "bf16", "fp16")
Logger: TypeAlias = Literal["csv", "tensorboard", "wandb", "mlflow"]
LOGGERS: tuple[Logger, ...] = get_args(Logger)


@dataclass(frozen=True)
class Training:
    """Settings of the training loop.

    The jobs of the command line extend this class, so its fields are their options.

    Raises:
        InputError: A setting is out of its range.

    Example:
        >>> Training(steps=100, optimizer="sgd", lr=0.1).momentum
        0.9
    """

    group: ClassVar[str] = "training"
    """The heading of these fields in the help of a job."""

    steps: int = 600
    """Number of optimizer steps."""
    batch_size: int = 128
    """Number of samples in a step. A training set smaller than this is used whole in each step."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam (weight decay as an L2 penalty), adamw (decoupled weight decay) or sgd."""
    weight_decay: float = 0.0
    """Weight decay, at least 0."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Learning rate after the warm-up. constant; cosine: falls to 0; step: divided by ten at each milestone."""
    milestones: tuple[float, ...] = (0.8,)
    """Fractions of the steps at which --schedule step divides the learning rate by ten, in ascending order."""
    warmup: int = 0
    """Number of steps in which the learning rate rises linearly."""
    clip: float | None = None
    """Maximum 2-norm of the gradient over all parameters; by default the gradient is not clipped."""
    accumulate: int = 1
    """Number of batches whose gradients are averaged for one step."""
    ema: float | None = None
    """Decay of a moving average of the weights, in (0, 1). The average is validated and saved. By default there is
    none."""
    precision: Literal["32", "bf16", "fp16"] = "32"
    """Autocast type of the networks. fp16 needs a GPU, and the loss is scaled. Jacobian terms are summed in float32."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What to do if the loss or the gradient is NaN or infinite. stop: end the run and keep the last checkpoint. skip:
    undo that step and continue."""
    skip_at_most: int = 10
    """Maximum number of steps that --on-not-finite skip may undo in a run."""
    augment: tuple[Literal["crop", "flip"], ...] = ()
    """Augmentation of the training images."""
    views: int = 0
    """Number of epochs after which the random choices for a sample (augmentation, mixing partner, noise, directions)
    repeat. 0: they never repeat. The order of the samples differs in every epoch."""
    validate_every: int = 100
    """Number of steps between two points of the learning curve."""
    checkpoint_every: int = 200
    """Number of steps between two checkpoints."""
    max_steps: int | None = None
    """Stop after this step, as if interrupted. Run the same command without this option to resume."""
    workers: int = 2
    """Number of threads that read and decode images that are not in memory. 0: the training loop reads them. Does not
    change results."""
    prefetch: int = 2
    """Number of batches that are read ahead. Does not change results."""
    resident_mib: int = 256
    """Keep a streamed data set in memory if its decoded size is at most this many MiB."""
    doctor: bool = True
    """Run the pre-flight check before the first step. It compares gradients with finite differences, and checks the
    teacher and all loss terms. Does not change results."""
    logger: Logger | None = None
    """Also log the metrics with this tool and, except csv, images of Jacobians. csv and tensorboard write to RUN/logs;
    wandb and mlflow use their own settings. Does not change results."""
    compile: bool = False
    """Compile the objective: student, Jacobian products and losses as one graph. If this fails, a warning gives the
    reason."""
    cuda_graphs: bool = False
    """Run compiled steps as CUDA graphs; needs --compile and a GPU."""
    channels_last: bool = False
    """Use the channels-last memory layout in student and teacher. Faster for deep convolutional networks; results are
    equal up to rounding."""
    shard: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP2). Needs --probe random-inputs, or no
    Jacobian term."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "checkpoint_every"):
            whole_number(f"`{name}` of `Training`", getattr(self, name))
        for name in ("warmup", "views", "skip_at_most", "workers", "prefetch", "resident_mib"):
            whole_number(f"`{name}` of `Training`", getattr(self, name), 0)
        if self.max_steps is not None:
            whole_number("`max_steps` of `Training`", self.max_steps)
        _within("lr", self.lr, "positive", self.lr > 0)
        _within("weight_decay", self.weight_decay, "at least 0", self.weight_decay >= 0)
        _within("momentum", self.momentum, "in [0, 1)", 0 <= self.momentum < 1)
        if self.clip is not None:
            _within("clip", self.clip, "positive", self.clip > 0, do="Use None not to clip.")
        if self.ema is not None:
            _within("ema", self.ema, "in (0, 1)", 0 < self.ema < 1, do="Use None for no average.")
        if self.warmup > self.steps:
            rule = f"`warmup` of `Training` must not be longer than `steps`, {self.steps}."
            raise InputError(rule, got=self.warmup, do="A tenth of the steps is usually enough.")
        if list(self.milestones) != sorted(set(self.milestones)) or not all(0 < m < 1 for m in self.milestones):
            rule = "`milestones` of `Training` must be ascending shares of the steps, each in (0, 1)."
            raise InputError(rule, got=self.milestones, do="Use for example (0.5, 0.75).")
        if self.cuda_graphs and not self.compile:
            raise InputError("`cuda_graphs` of `Training` must be used with `compile`.", do="Set compile=True as well.")
        names = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS, "augment": AUGMENTATIONS}
        for setting, known in {**names, "on_not_finite": ("stop", "skip"), "logger": LOGGERS}.items():
            given = getattr(self, setting)
            for name in given if setting == "augment" else () if given is None else (given,):
                if name not in known:
                    raise unknown_name(f"`{setting}` of `Training`", name, known)


def factor(step: int, settings: Training) -> float:
    """Return the learning rate of a step divided by `settings.lr`, in [0, 1].

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
    """Return the decay of the moving average after step number `step`: min(decay, (1 + step)/(10 + step)).

    Without the second bound, the average of a short run would consist mostly of the initial weights.
    """
    return min(decay, (1 + step) / (10 + step))


def _within(name: str, value: float, rule: str, holds: bool, do: str = "") -> None:
    if not (holds and math.isfinite(value)):
        raise InputError(f"`{name}` of `Training` must be finite and {rule}.", got=value, do=do)
