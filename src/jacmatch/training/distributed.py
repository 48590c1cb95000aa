"""Several processes that train one network: who they are, and the objective as the unit that is distributed.

Each process has every n-th sample of each batch. PyTorch's DDP averages the gradients; the terms are scaled so that
the average is the gradient of the whole batch, however unevenly it was dealt. What is random about a sample is a
function of its number, so it does not depend on how many processes there are.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.objectives.parts import Part
from jacmatch.training.augmentation import Batch

_LONG = timedelta(days=1)  # one process may evaluate, or train nothing, for hours while the others wait for it
_control: dict[str, Any] = {}


@dataclass(frozen=True)
class Ranks:
    """Which of the processes of a job this is.

    Attributes:
        rank: From 0.
        size: How many there are.
        group: What they talk by on the host, without a word to the GPUs; None where there is one.

    Example:
        >>> ranks = Ranks.here()
        >>> ranks.first, ranks.any(True), ranks.told({"lr": 0.1})
        (True, True, {'lr': 0.1})
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def here(cls) -> "Ranks":
        """This process, as `torch.distributed` has been told. The first call in a job is one for all processes."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls()
        world = distributed.group.WORLD
        if _control.get("world") is not world:
            _control.update(world=world, group=distributed.new_group(backend="gloo", timeout=_LONG))
        return cls(distributed.get_rank(), distributed.get_world_size(), _control["group"])

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self._reduced(int(flag), distributed.ReduceOp.MAX)) if self.size > 1 else flag

    def told(self, value: Any) -> Any:
        """What the first process says, a value that JSON has; the value of the others does not matter."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        length = torch.tensor(len(text))
        distributed.broadcast(length, 0, group=self.group)
        told = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            told = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        distributed.broadcast(told, 0, group=self.group)
        return json.loads(bytes(told.tolist()))

    def wait(self) -> None:
        """Returns once all processes are here."""
        self.any(False)

    def same(self, name: str, value: int | str) -> None:
        """Refuses what is not the same in all processes.

        Args:
            name: What it is, for the message.
            value: A number, or a text, of which a digest is compared.

        Raises:
            InputError: It differs.
        """
        if self.size == 1:
            return
        if isinstance(value, str):
            value = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        found = [self._reduced(value, kind) for kind in (distributed.ReduceOp.MIN, distributed.ReduceOp.MAX)]
        if found[0] != found[1]:
            rule = f"All {self.size} processes of a job must have the same {name}."
            do = "Give them the same files: --out, data and caches on a file system that all nodes share."
            raise InputError(rule, got=f"{found[0]} and {found[1]}", do=do)

    def total(self, table: Tensor) -> Tensor:
        """The sum over the processes, where the table is."""
        if self.size > 1:
            distributed.all_reduce(table, group=self.group if table.device.type == "cpu" else None)
        return table

    def gathered(self, row: Tensor) -> Tensor:
        """One row on the host for each process; with one process that row itself."""
        if self.size == 1:
            return row
        rows = [torch.empty_like(row) for _ in range(self.size)]
        distributed.all_gather(rows, row, group=self.group)
        return torch.stack(rows)

    def level(self, modules: Iterable[nn.Module | None]) -> None:
        """Gives the buffers of the modules (BatchNorm's running statistics) the values of the first process."""
        for module in modules if self.size > 1 else ():
            for buffer in [] if module is None else module.buffers():
                distributed.broadcast(buffer.detach(), 0)

    def _reduced(self, value: int, kind: Any) -> int:
        number = torch.tensor(value, dtype=torch.int64)
        distributed.all_reduce(number, kind, group=self.group)
        return int(number)


class Shared(nn.Module):
    """An objective on its part of each batch: the unit that is distributed.

    It returns tensors alone, of which the loss alone has a graph: what is not part of the loss gets no gradient, and
    the processes must not wait for one.
    """

    def __init__(self, objective: nn.Module, ranks: Ranks, measured: bool) -> None:
        super().__init__()
        self.objective, self.ranks, self.measured = objective, ranks, measured
        self.shares: dict[str, float] = {}

    def forward(self, batch: Batch, samples: int, progress: float) -> dict[str, Tensor]:
        """The terms: their mean over the processes is that over the batch, of `samples` samples."""
        part = Part(self.ranks.rank, self.ranks.size, samples, self.measured)
        balance = getattr(self.objective, "balance", None)
        if balance is not None:
            balance.part = part
        try:
            terms = self.objective(batch.x, batch.y, **batch.keywords(), progress=progress)
        finally:
            if balance is not None:
                balance.part = None
        self.shares, firsts = terms.shares, getattr(terms, "firsts", {})
        whole = part.scale(samples)
        scales = {name: part.scale(firsts.get(name, samples)) for name in terms.values if name != "loss"}
        if any(scale != whole for scale in scales.values()):
            loss = torch.stack([scale * terms.values[name] for name, scale in scales.items()]).sum()
        else:
            loss = whole * terms.values["loss"]
        values = {name: scale * terms.values[name].detach() for name, scale in scales.items()}
        return {"loss": loss, **values}


def distribute(objective: nn.Module, ranks: Ranks, place: torch.device) -> DistributedDataParallel:
    """The objective as DDP runs it, on its device.

    Raises:
        UnsupportedError: It has BatchNorm that is synchronised between processes, and derivatives by the input.
    """
    without_synchronised_statistics(objective)
    with warnings.catch_warnings():
        return DistributedDataParallel(
            Shared(objective, ranks, measured=True),
            device_ids=[place] if place.type == "cuda" else None,
            find_unused_parameters=True,  # a Jacobian term gives biases no gradient at all
        )


def unsynced(model: nn.Module | None, last: bool) -> AbstractContextManager[object]:
    """Within the context gradients stay in this process, unless it is the last part of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def without_synchronised_statistics(objective: nn.Module) -> None:
    """Refuses SyncBatchNorm under slopes.

    Raises:
        UnsupportedError: There is one, and the objective takes derivatives by the input.
    """
    names = [name for name, layer in objective.named_modules() if isinstance(layer, nn.SyncBatchNorm)]
    weights = getattr(getattr(objective, "balance", None), "weights", {})
    if names and any(weights.get(term) for term in ("jacobians", "penalty")) and not _values_alone(objective):
        raise UnsupportedError(
            f"`student` must not have SyncBatchNorm ({names[0]!r}) where its slopes are compared: it has no second "
            "derivative and no forward-mode rule. Use nn.BatchNorm2d, whose statistics are then those of each "
            "process's part, a network without BatchNorm, or --engine differences."
        )


def _values_alone(objective: nn.Module) -> bool:
    """Whether the slopes are differences of values."""
    slopes = getattr(objective, "slopes", None)
    probe = getattr(slopes, "probe", getattr(objective, "probe", None))
    return hasattr(probe, "step") or getattr(slopes, "engine", None) == "differences"
