"""What a benchmark claims, and the rows that say whether it holds. Data only."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jacmatch_research.bench.method import Conditions, NotMeasured, Spread


@dataclass(frozen=True)
class Claim:
    """A ratio of two costs and its bounds. A report of ratios without a bound is a claim without `must`.

    Attributes:
        text: What ÷ what.
        must: Largest ratio allowed (smallest, where higher is better); None: reported without a bound.
        aim: The ratio that is hoped for.
        better: Which ratios are good.
        of_floor: The bounds are multiples of the floor that the row states.
    """

    text: str
    must: float | None = None
    aim: float | None = None
    better: Literal["lower", "higher"] = "lower"
    of_floor: bool = False


@dataclass(frozen=True)
class Measured:
    """What one case gave.

    Attributes:
        spread: Median and quartiles of the ratio.
        floor: What the arithmetic allows at best, where it is known.
        details: Sizes and other numbers that belong to the ratio, by name.
    """

    spread: Spread
    floor: float | None = None
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Attributes:
        claim: What the row is about.
        name: Networks, sizes and modes: what tells it from the other rows of the claim.
        measure: Gives the numbers, or raises `NotMeasured` with the reason.
        devices: Where it is measured: those named that the machine has; on the others its row is empty.
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
    """A file of claims.

    Attributes:
        about: What is measured, in a line.
        cases: The rows, in the order in which they are measured and shown.
    """

    about: str
    cases: tuple[Case, ...]
