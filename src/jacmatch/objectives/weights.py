"""Weights of the terms: plain numbers, shares of the gradient norm, and schedules; also over several processes.

The terms of a loss have different scales, and these change while a network learns. A weight given as a share is the
contribution of the term to the norm of the parameter gradient. The norms are measured from time to time, and the factor
of the term is set from them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import gradient_norms
from jacmatch.jacobian.engines import meets_once_differentiable

Whole = Callable[[str, list[Tensor | None]], list[Tensor | None]]


class GradientShare(float):
    """A weight as a share of the gradient norm: 0 ≤ share < 1, share of term j = wⱼ‖∂ℓⱼ/∂θ‖ ÷ Σᵢ wᵢ‖∂ℓᵢ/∂θ‖.

    It is the share in each call that computes the term; with `every=4`, three of four calls do not. A term whose share
    has not been measured yet is not part of the loss.

    Example:
        >>> GradientShare(0.3)
        GradientShare(0.3)
    """

    def __new__(cls, share: float | int) -> "GradientShare":
        """Check the range."""
        if not 0 <= share < 1:
            raise InputError("A `GradientShare` must be at least 0 and below 1.", got=share)
        return super().__new__(cls, share)

    def __repr__(self) -> str:
        return f"GradientShare({float(self)})"


@dataclass(frozen=True)
class WeightSchedule:
    """A factor in [0, 1] for the weight of the Jacobian term.

    As a function of the data size it is 1 / (1 + (n / `halves_at`)⁴), n images per class: in the paper's tables the
    term helps most at 5 to 10 images per class and costs accuracy from about 500 on (precursor, tables 1 and 2). With
    the exponent 2 instead of 4, the term lowered the accuracy by 0.6 points at 1,000 images per class of Fashion-MNIST.
    As a function of progress it is 1 until `fades_from`, and then falls to 0 at the end of training along a cosine.

    Attributes:
        samples_per_class: n, above 0; None is treated as scarce data.
        halves_at: n at which the factor is one half.
        fades_from: Progress in [0, 1] from which the factor decreases; with 1 it never does.
    """

    samples_per_class: float | int | None = None
    halves_at: float | int = 300.0
    fades_from: float | int = 1.0

    def __post_init__(self) -> None:
        if self.samples_per_class is not None and not self.samples_per_class > 0:
            raise InputError("`samples_per_class` of `WeightSchedule` must be positive.", got=self.samples_per_class)
        if not self.halves_at > 0:
            raise InputError("`halves_at` of `WeightSchedule` must be positive.", got=self.halves_at)
        if not 0 <= self.fades_from <= 1:
            raise InputError("`fades_from` of `WeightSchedule` must lie in [0, 1].", got=self.fades_from)

    def __call__(self, progress: float | int) -> float:
        """The factor at this progress, the fraction of the training that is done; values above 1 count as 1.

        Example:
            >>> WeightSchedule(samples_per_class=300)(0.0)
            0.5
        """
        size = 1.0 if self.samples_per_class is None else 1 / (1 + (self.samples_per_class / self.halves_at) ** 4)
        if progress <= self.fades_from or self.fades_from == 1:
            return size
        done = min(1.0, (progress - self.fades_from) / (1 - self.fades_from))
        return size * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Part:
    """The samples rank, rank + ranks, rank + 2 ranks, … of a batch: for any n the first n are spread evenly.

    Example:
        >>> part = Part(rank=1, ranks=2, samples=7)
        >>> part.own(7), part.own(3), part.scale(7)  # samples 1, 3 and 5; of the first three sample 1
        (3, 1, 0.8571428571428571)
    """

    rank: int  # rank of this process, from 0
    ranks: int  # number of processes
    samples: int  # number of samples of the whole batch
    measured: bool = True  # whether the shares of the gradient norm can be measured; not if parameters are sharded

    def own(self, first: int) -> int:
        """Return how many of the first `first` samples of the whole batch this process has."""
        return max(0, -(-(first - self.rank) // self.ranks))

    def scale(self, first: int) -> float:
        """Return the factor of the mean over own samples for which the mean over processes is that over `first`."""
        return self.ranks * self.own(first) / first

    def whole(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor], first: int) -> list[Tensor | None]:
        """Return the gradients of the mean over the first samples of the whole batch. Every process must call this.

        The gradients are those of the mean over own samples; None where there is none.
        """
        share = self.own(first) / first
        pieces = [
            (torch.zeros_like(tensor) if gradient is None else gradient * share).flatten()
            for gradient, tensor in zip(gradients, like, strict=True)
        ]
        table = torch.cat([*pieces, like[0].new_tensor([gradient is not None for gradient in gradients])])
        torch.distributed.all_reduce(table)
        *sums, counts = torch.split(table, [*map(torch.numel, like), len(like)])
        return [
            summed.view_as(tensor) if there else None
            for summed, tensor, there in zip(sums, like, counts.tolist(), strict=True)
        ]


class LossWeights:
    """Converts weights, some of them shares, into factors, and stores the measured shares.

    Args:
        weights: Weight of each term: a number ≥ 0, or a `GradientShare`.

    Attributes:
        factors: Factor of each term, without `every` and schedules; None for a `GradientShare` that is not measured
            yet.
        shares: Share of each term in the gradient norm at the last measurement.
        part: The part of each batch that this process has, if several processes train together.

    Raises:
        InputError: a weight is negative or not finite, or the shares add up to 1 or more.
    """

    def __init__(self, weights: dict[str, float | int]) -> None:
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"The weight of `{name}` must be at least 0 and finite.", got=weight)
        if sum(weight for weight in weights.values() if isinstance(weight, GradientShare)) >= 1:
            raise InputError("The shares of all terms must add up to less than 1.", got=weights)
        self.weights = weights
        self.factors = {name: weight for name, weight in weights.items() if not isinstance(weight, GradientShare)}
        self.shares: dict[str, float] = {}
        self.part: Part | None = None

    @property
    def unmeasured(self) -> set[str]:
        """Terms whose share has not been measured yet."""
        return {name for name, weight in self.weights.items() if weight and name not in self.factors}

    def weigh(self, unweighted: Mapping[str, Tensor], times: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Return the weighted terms; one whose share was never measured is left out.

        Args:
            unweighted: The terms.
            times: Further factors, from schedules and `every`; 1 for terms that are absent.
        """
        times = times or {}
        return {
            name: self.factors[name] * times.get(name, 1) * term
            for name, term in unweighted.items()
            if name in self.factors
        }

    def measure(
        self,
        unweighted: dict[str, Tensor],
        parameters: list[nn.Parameter],
        times: Mapping[str, float | int] | None = None,
        firsts: Mapping[str, int] | None = None,
    ) -> bool:
        """Measure gradient norms and set the factors of terms given as shares; return whether all norms are finite.

        With N the total of all weighted norms, the factor of a term with share s and norm n is s N / n. A schedule
        reduces a weight afterwards, and the measured shares include it. If a norm is not finite, nothing changes; where
        a norm is 0, the factor of that share is left unchanged.

        Args:
            unweighted: The terms.
            parameters: θ.
            times: Further factors of the terms, as in `weigh`.
            firsts: See `Terms`.

        Raises:
            UnsupportedError: the graph is cut: a term lacks all or part of its gradient, although its value is large
                enough to have one.
        """
        if self.part is not None and not self.part.measured:
            return True
        measured = _norms(unweighted, parameters, self._whole(parameters, firsts or {}))
        norms = {name: float(measured.get(name, 0.0)) for name in unweighted}
        for name in unweighted:  # a gradient of exactly 0 is valid: units may be inactive for the whole batch
            if name not in measured and _counts(unweighted[name]) and self.weights[name] > 0:
                raise UnsupportedError(
                    f"The term `{name}` has no gradient with respect to the student: something cuts it off (detach, "
                    "no_grad). Ask jacmatch.doctor(student, x)."
                )
        if not all(map(math.isfinite, norms.values())):  # a bad batch: earlier measurements are kept
            return False
        times = times or {}
        fixed = sum(
            self.factors[name] * times.get(name, 1) * norm for name, norm in norms.items() if not self._shared(name)
        )
        given = sum(self.weights[name] for name, norm in norms.items() if self._shared(name) and norm > 0)
        total = fixed / (1 - given) if fixed > 0 else 1.0
        for name, norm in norms.items():
            if self._shared(name) and norm > 0:
                self.factors[name] = self.weights[name] * total / norm
        weighted = {name: self.factors.get(name, 0.0) * times.get(name, 1) * norm for name, norm in norms.items()}
        whole = sum(weighted.values())
        self.shares = {name: value / whole if whole > 0 else 0.0 for name, value in weighted.items()}
        return True

    def whole(self, here: int) -> int:
        """Return the number of samples of the whole batch, of which this process has `here`."""
        return here if self.part is None else self.part.samples

    def own(self, first: int) -> int:
        """Return how many of the first `first` samples of the whole batch this process has."""
        return first if self.part is None else self.part.own(first)

    def _whole(self, parameters: list[nn.Parameter], firsts: Mapping[str, int]) -> Whole | None:
        """Return the function that computes gradients over the whole batch from those of this process."""
        if (part := self.part) is None:
            return None
        return lambda name, gradients: part.whole(gradients, parameters, firsts.get(name, part.samples))

    def _shared(self, name: str) -> bool:
        return isinstance(self.weights[name], GradientShare)


def _counts(term: Tensor) -> bool:
    """Whether a value is so large that a gradient of 0 is not an underflow of the type."""
    numbers = torch.finfo(term.dtype)
    return float(term.detach()) > numbers.tiny / numbers.eps


def _norms(terms: dict[str, Tensor], parameters: list[nn.Parameter], whole: Whole | None) -> dict[str, Tensor]:
    """Return the gradient norms, if all terms can be differentiated."""
    for name, term in terms.items():
        if meets_once_differentiable(term):
            raise _cut_off(name, "a backward in it is marked once_differentiable")
    try:
        return gradient_norms(terms, parameters, whole)
    except RuntimeError as error:
        if "once_differentiable" not in str(error) and "not implemented" not in str(error):
            raise
        raise _cut_off(", ".join(terms), str(error).strip().splitlines()[0]) from error


def _cut_off(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"The gradient of the term `{name}` cannot be taken: {reason}. Write that backward in torch operations; "
        "jacmatch.doctor(student, x) tells more."
    )
