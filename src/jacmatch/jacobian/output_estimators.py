"""Estimators with directions on the side of the outputs: products vᵀJ, one backward pass each."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacmatch.errors import InputError, class_axis, one_row_of_classes
from jacmatch.jacobian import probes
from jacmatch.jacobian.estimation import (
    Cost,
    Ids,
    Labels,
    Matrix,
    OnOutputs,
    Outputs,
    Side,
    check_count,
    check_positive,
    ids_of,
    law_variance,
    needed,
    random_directions,
)


@dataclass(frozen=True)
class EveryRow:
    """All rows: v = e₁ … e_K. Exact: mean tr A, variance 0."""

    side: ClassVar[Side] = "output"

    def directions(self, *, outputs: Outputs, **unused: object) -> OnOutputs:
        """The unit vectors, the same for all samples."""
        values = needed(outputs, "outputs", "EveryRow")
        one_row_of_classes("EveryRow", values.shape)
        unit = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        return unit[:, None, :].expand(-1, values.shape[0], -1)

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """0: nothing is random."""
        return 0.0

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ for each output."""
        return Cost(forward=0, backward=outputs)


@dataclass(frozen=True)
class TopClass:
    """The row c of the teacher's largest output. Paper's form: mean A_cc ≤ tr A, so it is biased low.

    The class is the teacher's for both networks: with the student's own, two different rows would be compared.

    Example:
        >>> TopClass().directions(outputs=torch.tensor([[1.0, 5.0, 2.0]]))
        tensor([[[0., 1., 0.]]])
    """

    side: ClassVar[Side] = "output"

    def directions(self, *, outputs: Outputs, **unused: object) -> OnOutputs:
        """The unit vector of the teacher's largest output."""
        values = needed(outputs, "outputs", "TopClass")
        one_row_of_classes("TopClass", values.shape)
        return _weighted_unit(values.argmax(dim=1)[:, None], values, 1.0)

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """0: nothing is random; the error is the bias A_cc − tr A."""
        return 0.0

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ."""
        return Cost(forward=0, backward=1)


@dataclass(frozen=True)
class LabelClass:
    """The row y of the label. Paper's form where labels may be used: mean A_yy ≤ tr A, so it is biased low.

    For mixed labels, with probabilities y, v = y: the mixture of the rows, as in the readout `LabelLogit`.
    """

    side: ClassVar[Side] = "output"

    def directions(self, *, outputs: Outputs, labels: Labels, **unused: object) -> OnOutputs:
        """The unit vector of the label."""
        values, given = needed(outputs, "outputs", "LabelClass"), needed(labels, "labels", "LabelClass")
        one_row_of_classes("LabelClass", values.shape)
        if given.is_floating_point():
            return given.to(values.dtype)[None]
        return _weighted_unit(given.long()[:, None], values, 1.0)

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """0: nothing is random; the error is the bias A_yy − tr A."""
        return 0.0

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ."""
        return Cost(forward=0, backward=1)


@dataclass(frozen=True)
class RandomOutputs:
    """P = `count` random output directions of a law of `probes.directions`, each divided by √P.

    The variance, with K outputs and r = P mod K, is 1/P of

    - `gaussian`: 2‖A‖²_F
    - `rademacher`: 2(‖A‖²_F − Σᵢ Aᵢᵢ²)
    - `sphere`: 2K/(K + 2)·(‖A‖²_F − (tr A)²/K)
    - `basis`: K Σᵢ Aᵢᵢ² − (tr A)²
    - `orthogonal`: 2Kr(K − r)/(P(K − 1)(K + 2))·(‖A‖²_F − (tr A)²/K), so 0 when P is a multiple of K

    Example:
        >>> RandomOutputs(count=2, law="rademacher").variance(torch.eye(3))
        0.0
    """

    count: int = 1
    law: str = "gaussian"
    side: ClassVar[Side] = "output"

    def __post_init__(self) -> None:
        check_count("RandomOutputs", self.count, self.law)

    def directions(self, *, outputs: Outputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnOutputs:
        """Directions of the law in the space of outputs, divided by √P."""
        values = needed(outputs, "outputs", "RandomOutputs")
        return random_directions("RandomOutputs", self.law, self.count, values, ids, seed, draw)

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """The formula of the law."""
        return law_variance(self.law, self.count, matrix)

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ for each direction."""
        return Cost(forward=0, backward=self.count)


@dataclass(frozen=True)
class SampledRows:
    """n = `count` different rows out of K, all choices equally likely, each weighed K/n (Horvitz and Thompson).

    With aᵢ = Aᵢᵢ the variance is K²(1 − n/K)·S²/n, S² = Σᵢ (aᵢ − ā)²/(K − 1): rows drawn without replacement.

    Example:
        >>> SampledRows(count=3).variance(torch.randn(3, 8))
        0.0
    """

    count: int
    side: ClassVar[Side] = "output"

    def __post_init__(self) -> None:
        check_count("SampledRows", self.count)

    def directions(self, *, outputs: Outputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnOutputs:
        """√(K/n)·e_i for n different i."""
        values = needed(outputs, "outputs", "SampledRows")
        one_row_of_classes("SampledRows", values.shape)
        total = values.shape[1]
        self._check_total(total)
        order = probes.permutation(seed, ids_of(ids, values, "SampledRows"), draw, total)
        return _weighted_unit(order[:, : self.count], values, math.sqrt(total / self.count))

    def variance(self, matrix: Matrix, **unused: object) -> float:
        """K²(1 − n/K)·S²/n."""
        rows = matrix.double().square().sum(dim=1)
        total = rows.shape[0]
        self._check_total(total)
        return total * (total - self.count) / self.count * rows.var().item() if total > self.count else 0.0

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ for each row."""
        self._check_total(outputs)
        return Cost(forward=0, backward=self.count)

    def _check_total(self, outputs: int) -> None:
        if self.count > outputs:
            what = "`count` of `SampledRows` must not exceed the number of outputs."
            raise InputError(what, got=f"{self.count} of {outputs}", do="Use EveryRow() for all rows.")


@dataclass(frozen=True)
class FisherRows:
    """P = `count` directions v = √p ⊙ s/√P, s random signs, p = softmax(teacher's outputs/τ), τ = `temperature`.

    Mean Σᵢ pᵢ ‖Mᵢ‖²: with M the difference of two log-probability Jacobians, the Fisher distance that belongs to soft
    targets. With B = diag(√p)·A·diag(√p) the variance is 2(‖B‖²_F − Σᵢ Bᵢᵢ²)/P. Leave τ = 1 where the readout is
    log-probabilities, at whatever temperature: softmax gives back the probabilities. For dense outputs the Fisher
    distance is summed over the positions; `class_dim` is their dimension of the classes.
    """

    count: int = 1
    temperature: float = 1.0
    class_dim: int | None = None
    side: ClassVar[Side] = "output"

    def __post_init__(self) -> None:
        check_count("FisherRows", self.count)
        check_positive("`temperature` of `FisherRows`", self.temperature)

    def directions(self, *, outputs: Outputs, ids: Ids, seed: int, draw: int, **unused: object) -> OnOutputs:
        """√p ⊙ s/√P."""
        values = needed(outputs, "outputs", "FisherRows").detach()
        signs = random_directions("FisherRows", "rademacher", self.count, values, ids, seed, draw)
        axis = class_axis("FisherRows", values.shape, self.class_dim)
        return signs * (values / self.temperature).softmax(dim=axis).sqrt()

    def variance(self, matrix: Matrix, *, outputs: Float[Tensor, "row"] | None = None) -> float:
        """2(‖B‖²_F − Σᵢ Bᵢᵢ²)/P, with the p of `outputs`."""
        values = needed(outputs, "outputs", "FisherRows", "variance").double()
        weights = (values / self.temperature).softmax(dim=0).sqrt()
        return law_variance("rademacher", self.count, matrix * weights[:, None])

    def passes(self, outputs: int) -> Cost:
        """One vᵀJ for each direction."""
        return Cost(forward=0, backward=self.count)


def _weighted_unit(index: Int[Tensor, "batch probe"], like: Float[Tensor, "batch out"], weight: float) -> OnOutputs:
    batch, probe = index.shape
    zeros = torch.zeros(batch, probe, like.shape[1], dtype=like.dtype, device=like.device)
    return zeros.scatter_(2, index[:, :, None], weight).transpose(0, 1)
