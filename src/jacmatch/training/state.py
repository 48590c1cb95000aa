"""The state of a training: the objective on its device, the optimizer, and everything that a step changes.

The terms of each step stay on the device. When a row of metrics is due, its copy to the host is queued, and the loop
continues; the row is written when it has arrived. On the CPU this is immediate.
"""

import copy
import math
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.objectives import Objective
from jacmatch.objectives.base import needs_partners, networks_of
from jacmatch.training.configuration import Training
from jacmatch.training.data import Batch, Batches
from jacmatch.training.distributed import ProcessGroup, Shared, check_shardable, distribute, gather, sharded

GRADIENT, SKIPPED = "_gradient", "_skipped"
"""Columns of the table that no row shows: the norm of the gradient, and whether the step was undone."""


@dataclass(frozen=True)
class Bad:
    """A step with a number that is not finite."""

    step: int  # counted from 1
    what: str  # the term, or the gradient
    value: float  # the number


class NotFinite(InputError):
    """A term or the gradient of a step is not finite."""

    def __init__(self, bad: Bad, do: str) -> None:
        """Compose the message."""
        self.bad, self.do = bad, do
        self.rule = f"{bad.what[0].upper()}{bad.what[1:]} must be finite in every step."
        self.got = f"{bad.value} in step {bad.step}"
        super().__init__(self.rule, got=self.got, do=do)


class _UnderWay(NamedTuple):
    """A row on its way to the host."""

    step: int
    names: list[str]
    table: Tensor
    arrival: Any  # the GPU event at the end of the copy; None on the CPU
    known: dict[str, float]


class Metrics:
    """The terms of the steps since the last row, and the rows that are being copied to the host.

    Attributes:
        steps: The terms of the steps since the last row.
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
        self.steps: list[dict[str, Tensor]] = []
        self._under_way: deque[_UnderWay] = deque()
        self.skipped: list[Bad] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of one step; they stay on the device."""
        self.steps.append(terms)

    def table(self) -> tuple[list[str], Tensor]:
        """Return names and values of the terms of `steps`, one row per step, as means over the processes."""
        if not self.steps:
            return [], torch.empty(0, 0)
        names = list(dict.fromkeys(name for terms in self.steps for name in terms))
        absent = next(iter(self.steps[0].values())).new_zeros(())  # a term that a step leaves out is 0 there
        numbers = [terms.get(name, absent).float() for terms in self.steps for name in names]
        table = torch.stack(numbers).view(len(self.steps), len(names))
        return names, self._ranks.all_reduce(table) / self._ranks.size if self._ranks.size > 1 else table

    def send(self, step: int, known: dict[str, float]) -> None:
        """Queue the copy of a row to the host: the means of the terms since the last row."""
        if not self.steps:
            return
        (names, table), arrival = self.table(), None
        if self._device.type == "cuda":
            table, arrival = _sent(table)
        self._under_way.append(_UnderWay(step, names, table, arrival, known))
        self.steps.clear()

    def check(self, step: int, do: str) -> None:
        """Refuse numbers that are not finite in the steps since the last row, which remain for the next row."""
        steps, skipped = [*self.steps], [*self.skipped]
        self.send(step, {})
        self.arrived(do, wait=True)
        self.steps, self.skipped = steps, skipped

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
        """Return the means over the steps that were not undone."""
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


def _sent(table: Tensor) -> tuple[Tensor, Any]:
    """Return the table, being copied to pinned memory, and the event that ends the copy."""
    target = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    target.copy_(table, non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record(torch.cuda.current_stream(table.device))
    return target, arrival


Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """Return the network in the channels-last memory layout.

    Results are the same up to rounding.
    """
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def contiguous(network: Network) -> Network:
    """Return the network in torch's default memory layout."""
    return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


_LARGEST = 1024.0
"""Products are of order 1 for each sample, not 1 ÷ batch as a loss is, and float16 ends at 65504."""


def scale_derivatives(objective: nn.Module, scale: Tensor | None) -> None:
    """Scale the inner backward pass of an objective by the loss scale, up to 2¹⁰, and unscale its products.

    If a product overflows anyway, the gradient is not finite. The scaler then skips the step and lowers its scale, as
    in PyTorch's recipe for gradient penalties.

    References:
        PyTorch, "Automatic Mixed Precision examples", section on gradient penalty.
    """
    if scale is not None and isinstance(objective, Objective):
        objective.scale_derivatives(scale.clamp(max=_LARGEST))


def lightning_fabric() -> Any:
    """Import Lightning Fabric. The import takes two seconds, so it is delayed until a network is trained.

    Fabric imports torchmetrics only to read its version, which takes another second. An empty module replaces it during
    the import, and the version is then read from the package metadata.
    """
    absent = "torchmetrics" not in sys.modules
    if absent:
        sys.modules["torchmetrics"] = ModuleType("torchmetrics")
    try:
        import lightning_fabric
    finally:
        if absent:
            del sys.modules["torchmetrics"]
    return lightning_fabric


def precision(settings: Training, device: torch.device) -> Any:
    """Return Fabric's plugin for the precision in the settings.

    The loop runs the objective under autocast and passes the batch unchanged: raw inputs and regression targets are not
    rounded to 16 bits. Jacobian terms have the dtype of the input, so they are computed in float32.
    """
    plugins = lightning_fabric().plugins.precision
    if settings.precision == "32":
        return plugins.Precision()
    if settings.precision == "bf16":
        return plugins.MixedPrecision("bf16-mixed", device.type)
    if device.type != "cuda":
        rule = "`precision='fp16'` of `Training` needs a GPU."
        raise InputError(rule, got=f"device {str(device)!r}", do="Use precision='bf16' or '32'.")
    return plugins.MixedPrecision("16-mixed", device.type)


_FREE = (  # settings that change no weight
    *("max_steps", "validate_every", "checkpoint_every", "workers", "prefetch", "resident_mib", "skip_at_most"),
    *("doctor", "logger"),
)


@dataclass
class State:
    """The state of a training: objects that are created once, and values that change in each step."""

    settings: Training  # settings of the loop
    device: torch.device  # device of the training
    fabric: Any  # runs the model on the device in the chosen precision
    precision: Any  # fabric's plugin for it, with the loss scale of fp16
    objective: nn.Module  # the objective as given
    model: nn.Module  # the objective as Fabric wraps it
    student: nn.Module  # the network that is trained
    average: nn.Module | None  # the running average of its weights, if there is one
    optimizer: torch.optim.Optimizer  # as Fabric runs it
    identity: dict[str, Any]  # what else a checkpoint must agree with
    shown: Tensor  # samples whose student outputs identify the student
    metrics: Metrics  # terms of the loss in the steps since the last logged row, and rows on their way to the host
    ranks: ProcessGroup = field(default_factory=ProcessGroup)  # the processes that train together
    shared: nn.Module | None = None  # the objective as several processes run it; None with one process
    step: int = 0  # steps made
    skipped: int = 0  # steps skipped, as far as they were reported
    bad: list[dict[str, Any]] = field(default_factory=list)  # the content of `not_finite.json`
    saved_step: int | None = None  # the step of the last checkpoint
    shares: dict[str, float] = field(default_factory=dict)  # share of each term in the gradient norm, as last measured
    # A few samples and the teacher's outputs there before the first step
    teacher_outputs: tuple[Batch, Tensor] | None = None
    seconds: float = 0.0  # wall time of earlier parts of the run
    aside: float = 0.0  # seconds spent on validation and checkpoints, earlier parts included
    began: float = field(default_factory=time.perf_counter)  # when this part began, on the clock of `time.perf_counter`

    def elapsed(self) -> float:
        """Wall time of the run so far, in seconds."""
        return self.seconds + time.perf_counter() - self.began

    def scale(self) -> Tensor | None:
        """The loss scale of fp16, on the device; None in other precisions."""
        scaler = getattr(self.precision, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def losses(self, batch: Batch, samples: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the loss and terms for this process's part of a batch of `samples`, and the gradient shares."""
        progress = self.step / self.settings.steps
        if self.shared is None:
            terms = self.objective(batch.x, batch.y, **batch.keywords(), progress=progress)
            return terms.values, terms.shares
        values: dict[str, Tensor] = self.shared(batch, samples, progress)
        shared: Any = self.shared
        return values, getattr(shared, "module", shared).shares

    def gather(self) -> None:
        """Update objective and average from the sharded or distributed copies. All processes must call this."""
        if self.settings.shard and isinstance(self.shared, Shared):
            gather(self.shared, self.objective)
        self.ranks.broadcast_buffers((self.objective, self.average))

    def finish(self) -> None:
        """Give the student the final weights, in the contiguous layout."""
        if self.average is not None:
            self.student.load_state_dict(self.average.state_dict())
        if self.settings.channels_last:
            contiguous(self.student)

    def described(self) -> dict[str, Any]:
        """Return the settings that affect the weights, as a checkpoint stores them."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _FREE}
        return settings | self.identity | {"processes": self.ranks.size}


def begin(
    objective: nn.Module,
    settings: Training,
    device: torch.device,
    identity: dict[str, Any],
    shown: Tensor,
    ranks: ProcessGroup,
) -> State:
    """Move the objective to its device, distribute it over the processes, and create its optimizer."""
    student, _ = networks_of(objective)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    if not isinstance(student, nn.Module) or not trained:
        rule = "`objective` of `fit` must have a `student` with parameters that require gradients."
        raise InputError(rule, got=type(objective).__name__, do="Do not freeze the student.")
    if settings.channels_last:
        channels_last(objective)
    plugin = precision(settings, device)
    devices: list[int] | int = 1 if device.index is None else [device.index]
    fabric = lightning_fabric().Fabric(accelerator=device.type, devices=devices, plugins=[plugin])
    unit: nn.Module | None = None
    if settings.shard:
        check_shardable(settings)
        unit = sharded(objective, ranks, device)
        model: nn.Module = unit
        optimizer = _optimizer([each for each in unit.parameters() if each.requires_grad], settings)
    else:
        model, optimizer = fabric.setup(objective.to(device).train(), _optimizer(trained, settings))
        unit = distribute(objective, ranks, device) if ranks.size > 1 else None
    average = None if settings.ema is None else copy.deepcopy(student).requires_grad_(False)
    return State(
        settings=settings,
        device=device,
        fabric=fabric,
        precision=plugin,
        objective=objective,
        model=model,
        student=student,
        average=average,
        optimizer=optimizer,
        identity=identity,
        shown=shown.to(device),
        metrics=Metrics(device, ranks),
        ranks=ranks,
        shared=unit,
    )


def make_batches(
    objective: nn.Module, train: Split, settings: Training, seed: int, device: torch.device, ranks: ProcessGroup
) -> Batches:
    """The batches of the objective, or of each the part that this process has."""
    return Batches(
        train,
        settings.batch_size,
        seed=seed,
        augment=settings.augment,
        partners=needs_partners(objective),
        views=settings.views,
        device=device,
        workers=settings.workers,
        prefetch=settings.prefetch,
        resident_bytes=settings.resident_mib * 2**20,
        rank=ranks.rank,
        ranks=ranks.size,
    )


def _optimizer(parameters: list[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        decay, momentum = settings.weight_decay, settings.momentum
        return torch.optim.SGD(parameters, settings.lr, momentum=momentum, weight_decay=decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    # To undo a step on the GPU, all its state must be there; only the fused optimizer keeps its step count there.
    fused = True if settings.on_not_finite == "skip" and parameters[0].is_cuda else None
    return kind(parameters, settings.lr, weight_decay=settings.weight_decay, fused=fused)
