"""Rows of metrics that are copied to the host asynchronously.

The terms of each step stay on the device. When a row is due, its copy to the host is queued, and the loop continues;
the row is written when it has arrived. On the CPU this is immediate.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from jacmatch.errors import InputError
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
