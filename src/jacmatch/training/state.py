"""A training run under way."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.training.augmentation import Batch
from jacmatch.training.distributed import Ranks, Shared
from jacmatch.training.layout import contiguous
from jacmatch.training.metrics import Metrics
from jacmatch.training.schedules import Training
from jacmatch.training.sharding import gather

_FREE = (
    "max_steps",
    "validate_every",
    "checkpoint_every",
    "workers",
    "prefetch",
    "resident_mib",
    "skip_at_most",
    "doctor",
)  # settings that change no weight


@dataclass
class State:
    """A training run under way: what is set up once, and what changes from step to step.

    Attributes:
        settings: What the loop was told.
        place: The device.
        fabric: Runs the model on the device in the precision asked for.
        precision: Fabric's plugin for it, with the loss scale of fp16.
        objective: The objective as given.
        model: The same as Fabric runs it.
        student: The network that is trained.
        average: The running average of its weights, if one is kept.
        optimizer: As Fabric runs it.
        identity: What else a checkpoint must agree with.
        shown: Samples at which the student is asked, to know it again.
        metrics: Terms of the loss in the steps since the last logged row, and rows on their way to the host.
        ranks: The processes that train together.
        shared: The objective as they run it; None where there is one.
        step: Steps made.
        skipped: Steps made undone, as far as they were accounted for.
        bad: What `not_finite.json` says.
        kept: The step of the last checkpoint.
        shares: Share of each term in the gradient norm, as last measured.
        teacher_outputs: A few samples, and what the teacher said of them before the first step.
        seconds: Wall time of earlier parts of the run.
        aside: Seconds spent on validation and checkpoints, those of earlier parts included.
        began: When this part began, on the clock of `time.perf_counter`.
    """

    settings: Training
    place: torch.device
    fabric: Any
    precision: Any
    objective: nn.Module
    model: nn.Module
    student: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    shown: Tensor
    metrics: Metrics
    ranks: Ranks = field(default_factory=Ranks)
    shared: nn.Module | None = None
    step: int = 0
    skipped: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    kept: int | None = None
    shares: dict[str, float] = field(default_factory=dict)
    teacher_outputs: tuple[Batch, Tensor] | None = None
    seconds: float = 0.0
    aside: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Wall time of the run so far, in seconds."""
        return self.seconds + time.perf_counter() - self.began

    def scale(self) -> Tensor | None:
        """The loss scale of fp16, on the device; None in other precisions."""
        scaler = getattr(self.precision, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.place))

    def compared(self, batch: Batch, samples: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The loss and its terms for the part of a batch of so many samples that is here; shares of the gradient."""
        progress = self.step / self.settings.steps
        if self.shared is None:
            terms = self.objective(batch.x, batch.y, **batch.keywords(), progress=progress)
            return terms.values, terms.shares
        values: dict[str, Tensor] = self.shared(batch, samples, progress)
        shared: Any = self.shared
        return values, getattr(shared, "module", shared).shares

    def gather(self) -> None:
        """Brings objective and average to what was trained, where several processes did. All of them call it."""
        if self.settings.shard and isinstance(self.shared, Shared):
            gather(self.shared, self.objective)
        self.ranks.level((self.objective, self.average))

    def settle(self) -> None:
        """Gives the student the weights that the run ends with, in torch's usual layout."""
        if self.average is not None:
            self.student.load_state_dict(self.average.state_dict())
        if self.settings.channels_last:
            contiguous(self.student)

    def told(self) -> dict[str, Any]:
        """All that decides the weights and that a checkpoint can say of itself."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _FREE}
        return settings | self.identity | {"processes": self.ranks.size}
