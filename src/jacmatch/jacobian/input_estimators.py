"""Estimators with directions on the side of the inputs: products Jv, which even a black box can give."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import probes
from jacmatch.jacobian.estimation import (
    Cost,
    Ids,
    Inputs,
    Matrix,
    OnInputs,
    Side,
    check_count,
    check_positive,
    law_variance,
    needed,
    random_directions,
)


@dataclass(frozen=True)
class RandomInputs:
    """P = `count` random input directions of a law of `probes.directions`, each divided by √P.

    The variance is that of `RandomOutputs` with MᵀM for A and the number of input elements for K: for `gaussian` the
    same on both sides. The teacher needs no backward pass.
    """

    count: int = 1
    law: str = "gaussian"
    side: ClassVar[Side] = "input"

    def __post_init__(self) -> None:
        check_count("RandomInputs", self.count, self.law)

    def directions(self, *, x: Inputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnInputs:
        """Directions of the law in the space of inputs, divided by √P."""
        return random_directions("RandomInputs", self.law, self.count, needed(x, "x", "RandomInputs"), ids, seed, draw)

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """The formula of the law."""
        return law_variance(self.law, self.count, matrix.mT)

    def passes(self, outputs: int) -> Cost:
        """One Jv for each direction."""
        return Cost(forward=self.count, backward=0)


@dataclass(frozen=True)
class DataPairs:
    """The direction from each sample to its partner, scaled to norm √D: where the data vary, for D input elements.

    Mean D·E[uᵀMᵀMu] over the unit vectors u between data points: tr A only if those point everywhere alike.
    """

    side: ClassVar[Side] = "input"

    def directions(self, *, x: Inputs, partners: Inputs, **unused: object) -> OnInputs:
        """`probes.data_pairs` of the inputs and their partners."""
        given, others = needed(x, "x", "DataPairs"), needed(partners, "partners", "DataPairs")
        return probes.data_pairs(given.detach(), others.detach())[None]

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """None is known.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "`DataPairs` has no variance formula: its scatter depends on the data. Measure it over draws of partners, "
            "or use RandomInputs(), whose variance is known."
        )

    def passes(self, outputs: int) -> Cost:
        """One Jv."""
        return Cost(forward=1, backward=0)


@dataclass(frozen=True)
class AntitheticNoise:
    """P = `count` pairs of inputs x ± σz, z ~ N(0, I), σ = `sigma` in units of the input: values only, no derivatives.

    With M = ∂δ and v = z/√P, ‖Mv‖² is taken as Σᵢ ((δᵢ(x + hv) − δᵢ(x − hv))/2h)², h = σ√P = `step`. Mean tr A + O(σ²):
    the remainder starts with σ² Σᵢ ∇δᵢ·∇Δδᵢ, while the paper's form without pairs is off by Σᵢ δᵢΔδᵢ at any σ.
    Variance 2‖A‖²_F/P + O(σ²).

    References:
        Corrects Srinivas & Fleuret 2018, arXiv:1803.00443, Proposition 1, where a term of order σ² is dropped.
    """

    count: int = 1
    sigma: float = field(kw_only=True)
    side: ClassVar[Side] = "input"

    def __post_init__(self) -> None:
        check_count("AntitheticNoise", self.count)
        check_positive("`sigma` of `AntitheticNoise`", self.sigma)

    @property
    def step(self) -> float:
        """The step of the differences, h = σ√P: it turns a direction v = z/√P into the noise σz."""
        return self.sigma * math.sqrt(self.count)

    def directions(self, *, x: Inputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnInputs:
        """z/√P."""
        return random_directions(
            "AntitheticNoise", "gaussian", self.count, needed(x, "x", "AntitheticNoise"), ids, seed, draw
        )

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """2‖A‖²_F/P: exact for linear maps, else up to O(σ²)."""
        return law_variance("gaussian", self.count, matrix.mT)

    def passes(self, outputs: int) -> Cost:
        """Two values for each pair."""
        return Cost(forward=2 * self.count, backward=0)
