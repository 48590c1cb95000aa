"""What a benchmark claims, and the rows that say whether it holds. Data only."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jacmatch_research.bench.method import Conditions, NotMeasured, Spread


@dataclass(frozen=True)
class Claim:
    """A ratio of two costs (`text`: what ÷ what) and its bounds.

    `must` is the largest ratio allowed (smallest, where higher is better), None where none is claimed; `aim` is hoped
    for. With `of_floor`, they are multiples of the floor that the row states.
    """

    text: str
    must: float | None = None
    aim: float | None = None
    better: Literal["lower", "higher"] = "lower"
    of_floor: bool = False


@dataclass(frozen=True)
class Measured:
    """What one case gave: median and quartiles, what the arithmetic allows at best, and numbers that belong to it."""

    spread: Spread
    floor: float | None = None
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: networks, sizes and modes as its name, and the function that gives its numbers.

    It is measured on those of its devices that the machine has, and empty on the others, or where `NotMeasured` is
    raised.
    """

    claim: Claim
    name: str
    measure: Callable[[Conditions], Measured]
    devices: tuple[str, ...] = ("cpu", "cuda")

    def row(self, conditions: Conditions) -> dict[str, Any]:
        """The row of the result file; without numbers, and with the reason, where nothing could be measured."""
        try:
            if conditions.missing:
                raise NotMeasured(conditions.missing)
            measured, reason = self.measure(conditions), None
        except NotMeasured as why:
            measured, reason = None, str(why)
        return {
            "claim": self.claim.text,
            "case": self.name,
            "device": conditions.kind,
            "better": self.claim.better,
            **self._bounds(measured),
            **(dataclasses.asdict(measured.spread) if measured else dict.fromkeys(("median", "low", "high"))),
            **({} if measured else {"n": 0}),
            "why_empty": reason,
            "details": dict(measured.details) if measured else {},
        }

    def _bounds(self, measured: Measured | None) -> dict[str, Any]:
        """Bounds, floor, and whether the median keeps them; None where there is no bound or no number."""
        floor = measured.floor if measured else None
        unit = floor if self.claim.of_floor else 1.0
        results: dict[str, Any] = {"floor": None if floor is None else round(floor, 3)}
        for name, verdict in (("must", "met"), ("aim", "reached")):
            factor = getattr(self.claim, name)
            bound = None if factor is None or unit is None else factor * unit
            sign = 1 if self.claim.better == "lower" else -1
            results[name] = None if bound is None else round(bound, 3)
            retained = bound is not None and measured is not None and sign * measured.spread.median <= sign * bound
            results[verdict] = None if bound is None or measured is None else retained
        return results


@dataclass(frozen=True)
class Benchmark:
    """A file of claims: what is measured, in a line, and the rows in the order in which they are measured and shown."""

    about: str
    cases: tuple[Case, ...]
