"""Where values and derivatives are compared: at the data, at noisy data, or between two data points."""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.jacobian import Arguments, probes

Inputs: TypeAlias = Float[Tensor, "batch *input"]
Ids: TypeAlias = Int[Tensor, "batch"]
Moved: TypeAlias = tuple[Float[Tensor, "batch *input"], Float[Tensor, "batch"] | None]
_NOISE, _MIX = 1_000_003, 1_000_033
"""Offsets of the seed, so that noise and mixing are independent of the probes at the same sample and draw."""


@runtime_checkable
class Point(Protocol):
    """Moves the inputs of a batch; student and teacher both get the moved batch."""

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return the moved inputs, and the share of x in a mixture (None if nothing is mixed)."""
        ...


@dataclass(frozen=True)
class Batch:
    """A batch, moved to the points at which student and teacher are compared.

    For mixed pairs, `share` is the share λ of the first sample of each pair; readouts then get no label.
    """

    x: Tensor
    labels: Tensor | None
    partners: Tensor
    partner_labels: Tensor | None
    share: Tensor | None
    ids: Tensor
    draw: int
    arguments: Arguments | None = None

    def part(self, rows: slice) -> "Batch":
        """Return the batch restricted to these samples."""
        tensors: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, arguments=None if self.arguments is None else self.arguments.part(rows))

    @property
    def label(self) -> Tensor | None:
        """The labels, or None if they are mixed."""
        return self.labels if self.share is None else None


@dataclass(frozen=True)
class AtData:
    """At the data points themselves."""

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return x."""
        return x, None


@dataclass(frozen=True)
class AtNoise:
    """At x + ξ, ξ ~ N(0, σ²I), new noise for each sample and step.

    Attributes:
        sigma: σ > 0, in units of the raw input.
    """

    sigma: float | int

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise InputError("`sigma` of `AtNoise` must be positive and finite.", got=self.sigma)

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return x + ξ."""
        noise = probes.directions(
            "gaussian", seed=seed + _NOISE, ids=ids, draw=draw, count=1, shape=tuple(x.shape[1:]), dtype=x.dtype
        )
        return x + self.sigma * noise[0], None


@dataclass(frozen=True)
class AtMixedPairs:
    """At λx + (1 − λ)x′ with a partner x′ from the data and λ uniform on [0, 1] (mixup, arXiv:1710.09412, α = 1).

    A teacher can be evaluated at any input, so mixing adds points of comparison; labels are mixed with the same λ.
    """

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return the mixture and λ."""
        share = probes.uniform(seed + _MIX, ids, draw, 1)[:, 0].to(x.dtype)
        weight = share.view(-1, *[1] * (x.dim() - 1))
        return weight * x + (1 - weight) * partners, share


POINTS: dict[str, type[AtData] | type[AtNoise] | type[AtMixedPairs]] = {
    "data": AtData,
    "noise": AtNoise,
    "mixed-pairs": AtMixedPairs,
}
