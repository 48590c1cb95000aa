"""Settings that several jobs share. Data only: a recipe takes them over and adds its own."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from jacmatch.errors import InputError
from jacmatch.runs import Run
from jacmatch.runs.files import disk
from jacmatch.training import Training, find_device
from jacmatch.training.distributed import ProcessGroup
from jacmatch.training.loggers import Logger
from jacmatch.version import __version__


@dataclass(frozen=True)
class JobFields:
    """Settings of every job."""

    group: ClassVar[str] = "run"
    """The heading of these fields in the help."""

    no_settings: ClassVar[tuple[str, ...]] = (
        *("out", "devices", "max_steps", "workers", "prefetch", "resident_mib"),
        *("allow_code", "doctor", "logger"),
    )
    """Fields that do not decide the result, so they are not among the settings of a run."""

    out: Path | None = None
    """Run folder. Without it, runs/JOB-NUMBER with the next free number."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same run."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto: a GPU if there is one."""
    smoke: bool = False
    """A tiny version of the job, to see that it runs; its numbers mean nothing."""
    allow_code: bool = False
    """Run code outside the package, a PACKAGE.MODULE:CALLABLE, that a --config, a run folder or a cache names."""

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values for a run folder."""
        plain = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in self.no_settings:
                plain[field.name] = str(value) if isinstance(value, Path) else value
        return plain

    def begin(self, job: str, again: bool = False) -> Run:
        """The run of this job: new, or taken up where it stopped; with `again` also if it is finished."""
        place = find_device(self.device)
        gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else None
        ranks, told = ProcessGroup.current(), self.settings()
        if getattr(self, "devices", 1) not in (1, ranks.size):
            rule = f"`devices` of `{job}` must be the number of processes that were started."
            do = (
                "The command line starts them; in Python start torchrun, and call torch.distributed.init_process_group."
            )
            raise InputError(rule, got=f"{getattr(self, 'devices', 1)}, and {ranks.size} process(es)", do=do)
        folder = self.out or Path(ranks.broadcast(str(claimed_folder(job)) if ranks.first else ""))
        if ranks.first:
            run = Run.create(folder, job, told, __version__, cuda=gpu, again=again)
        ranks.barrier()
        if not ranks.first:
            run = replace(Run.open(folder, finished=False), follows=True)
        return run

    def folder(self, job: str) -> Path:
        """The run folder of this job; without `out` one that is made now, and is nobody else's."""
        return self.out or claimed_folder(job)


@dataclass(frozen=True)
class TrainingFields(JobFields):
    """Settings of every job that trains."""

    group: ClassVar[str] = "training"

    together: ClassVar[bool] = True
    """Whether several processes can do the job together."""

    devices: int = 1
    """Processes on this machine that train together, each on its part of every batch: on GPUs as many of them, else on
    the CPU. The result is the same up to rounding. Leave it out under torchrun, which starts processes itself."""
    shard: bool = False
    """Each process keeps a part of the weights, their gradients and the optimiser's state (FSDP2); for slopes of
    --probe random-inputs."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 128
    """Samples in a step; a smaller training set is used whole in each step."""
    lr: float = 1e-3
    """Learning rate at its highest."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimiser."""
    weight_decay: float = 0.0
    """Weight decay."""
    momentum: float = 0.9
    """Momentum of sgd."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """How the learning rate falls."""
    milestones: tuple[float, ...] = (0.8,)
    """Shares of the steps at which schedule=step divides the rate by ten."""
    warmup: int = 0
    """Steps in which the rate rises."""
    clip: float | None = None
    """Largest norm of the gradient; none if left out."""
    accumulate: int = 1
    """Batches in an optimiser step."""
    ema: float | None = None
    """Decay of an exponential average of the weights, which is then the student."""
    precision: Literal["32", "bf16", "fp16"] = "32"
    """Autocast type of the networks; Jacobian terms are summed in float32."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What comes of a step whose loss or gradient is NaN or Inf: the run stops, or goes on without that step."""
    skip_at_most: int = 10
    """With --on-not-finite skip, how many such steps a run may have."""
    augment: tuple[Literal["crop", "flip"], ...] = ()
    """Augmentation of the training images."""
    views: int = 0
    """In how many ways a sample is seen at most: augmentation, partner, point and directions return after so many
    epochs. 0 draws anew in each."""
    doctor: bool = True
    """Look for silent wrongs before the first step: gradients against differences of the loss, teacher, terms."""
    logger: Logger | None = None
    """Log the metrics to this tool as well: csv and tensorboard in RUN/logs, wandb and mlflow where the tool's own
    settings say. No result depends on it."""
    compile: bool = False
    """Compile the objective: student, slopes and losses as one graph. If that cannot be, a warning says why."""
    cuda_graphs: bool = False
    """Launch compiled steps as CUDA graphs (needs --compile and a GPU)."""
    channels_last: bool = False
    """Lay images out with the channels of a pixel side by side, in student and teacher: faster for deep convolutional
    networks, the same up to rounding."""
    validation: float = 0.1
    """Share (below 1) or number of training samples held out for the learning curves."""
    validate_every: int = 100
    """Steps between two points of the learning curve."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    max_steps: int | None = None
    """Stop after so many steps; the same command without it goes on."""
    workers: int = 2
    """Threads that read and decode images which are not in memory; 0 reads them in the loop itself. No result depends
    on it."""
    prefetch: int = 2
    """How many batches they are ahead."""
    resident_mib: int = 256
    """A streamed data set that decoded fills no more MiB is read into memory once."""

    def training(self, **changes: Any) -> Training:
        """The settings of the training loop; `changes` replace some of them."""
        names = {field.name for field in fields(Training)}
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names if hasattr(self, name)}
        chosen.update(changes)
        if self.smoke:
            chosen.update(
                steps=min(int(chosen["steps"]), 20), batch_size=min(self.batch_size, 32), validate_every=10, warmup=0
            )
        return Training(**chosen)


def claimed_folder(job: str) -> Path:
    """Make runs/JOB-NUMBER with the next free number. Of several processes that ask at once each gets another one.

    Raises:
        InputError: The operating system refuses.
    """
    number, place = 1, Path("runs")
    with disk(place):
        while True:
            place.mkdir(exist_ok=True)
            path = place / f"{job}-{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            except FileNotFoundError:  # a process that has begun nothing has removed `runs` again
                continue
            else:
                return path


def positive(job: str, **numbers: int) -> None:
    """Refuses numbers below 1, naming the flag."""
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"`--{name.replace('_', '-')}` of `{job}` must be at least 1.", got=number)
