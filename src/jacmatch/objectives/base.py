"""What an objective returns, and weights that are given as shares of the gradient.

The terms of a loss have different scales, and these change while a network learns. A weight given as a share says what
the term is meant to contribute: the share of the norm of the parameter gradient. It is measured from time to time and
the factor in front of the term follows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import gradient_norms
from jacmatch.jacobian.trials import meets_once_differentiable
from jacmatch.objectives.parts import Part

Whole = Callable[[str, list[Tensor | None]], list[Tensor | None]]


class Share(float):
    """A weight as share of the gradient norm: 0 ≤ share < 1, share of term j = wⱼ‖∂ℓⱼ/∂θ‖ ÷ Σᵢ wᵢ‖∂ℓᵢ/∂θ‖.

    Example:
        >>> Share(0.3)
        Share(0.3)
    """

    def __new__(cls, share: float | int) -> "Share":
        """Checks the range."""
        if not 0 <= share < 1:
            raise InputError("A `Share` must be at least 0 and below 1.", got=share)
        return super().__new__(cls, share)

    def __repr__(self) -> str:
        return f"Share({float(self)})"


@dataclass
class Terms:
    """What an objective returns for a batch.

    Attributes:
        values: `loss`, and the weighted terms that add up to it. Means over the batch.
        student_outputs: (B, K), with graph.
        teacher_outputs: (B, K), None where the teacher was not asked.
        unweighted: The terms before weighting.
        shares: Share of each term in the gradient norm when it was last measured; empty before.
        firsts: Over how many samples, the first ones of the whole batch, a term is the mean, where not over all.
    """

    values: dict[str, Tensor]
    student_outputs: Tensor
    teacher_outputs: Tensor | None = None
    unweighted: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The term of this name; zero-weighted terms are not there."""
        return self.values[name]

    def keys(self) -> list[str]:
        """The names, `loss` first."""
        return list(self.values)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


def between_measurements(measure_every: int, every: int) -> int:
    """Calls between two measurements of shares: at least as many as asked for, and each a call with slopes.

    Example:
        >>> between_measurements(100, 3)
        102
    """
    return -(-measure_every // every) * every


class Balance:
    """Turns weights, some of them shares, into factors, and remembers the measured shares.

    Args:
        weights: Weight of each term: a number ≥ 0, or a `Share`.

    Attributes:
        part: Which part of each batch this process has, where several processes train together.

    Raises:
        InputError: a weight is negative or not finite, or the shares add up to 1 or more.
    """

    def __init__(self, weights: dict[str, float | int]) -> None:
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"The weight of `{name}` must be at least 0 and finite.", got=weight)
        if sum(weight for weight in weights.values() if isinstance(weight, Share)) >= 1:
            raise InputError("The shares of all terms must add up to less than 1.", got=weights)
        self.weights = weights
        self.factors = {name: 1.0 if isinstance(weight, Share) else weight for name, weight in weights.items()}
        self.shares: dict[str, float] = {}
        self.part: Part | None = None

    def measure(
        self,
        unweighted: dict[str, Tensor],
        parameters: list[nn.Parameter],
        schedules: Mapping[str, float | int] | None = None,
        firsts: Mapping[str, int] | None = None,
    ) -> None:
        """Measures the gradient norm of each term and sets the factors of those given as shares.

        With N the total of all weighted norms, the factor of a term with share s and norm n is s N / n. A schedule
        lessens a weight after that; the remembered shares have it in them. Norms that are not finite change nothing.

        Args:
            unweighted: The terms.
            parameters: θ.
            schedules: What a schedule leaves of the weight of a term, 1 where it says nothing.
            firsts: See `Terms`.

        Raises:
            UnsupportedError: a derivative is cut off: a term has no gradient, or not all of it, while its value is
                large enough for one.
        """
        if self.part is not None and not self.part.measured:
            return
        found = _norms(unweighted, parameters, self._whole(parameters, firsts or {}))
        norms = {name: float(found.get(name, 0.0)) for name in unweighted}
        for name in unweighted:  # a gradient that is there and 0 is true: of units that are off for the whole batch
            if name not in found and _counts(unweighted[name]) and self.weights[name] > 0:
                raise UnsupportedError(
                    f"The term `{name}` is {float(unweighted[name].detach()):.3g} but has no gradient with respect to "
                    "the student: something cuts it off (detach, no_grad). Ask jacmatch.doctor(student, x)."
                )
        if not all(map(math.isfinite, norms.values())):  # of a bad batch: what was measured before stays
            return
        fixed = sum(self.factors[name] * norm for name, norm in norms.items() if not self._shared(name))
        asked = sum(self.weights[name] for name, norm in norms.items() if self._shared(name) and norm > 0)
        total = fixed / (1 - asked) if fixed > 0 else 1.0
        for name, norm in norms.items():
            if self._shared(name) and norm > 0:
                self.factors[name] = self.weights[name] * total / norm
        schedules = schedules or {}
        weighted = {name: self.factors[name] * norm * schedules.get(name, 1.0) for name, norm in norms.items()}
        whole = sum(weighted.values())
        self.shares = {name: value / whole if whole > 0 else 0.0 for name, value in weighted.items()}

    def whole(self, here: int) -> int:
        """Samples of the whole batch, of which so many are here."""
        return here if self.part is None else self.part.samples

    def own(self, first: int) -> int:
        """How many of the first so many samples of the whole batch are here."""
        return first if self.part is None else self.part.own(first)

    def _whole(self, parameters: list[nn.Parameter], firsts: Mapping[str, int]) -> Whole | None:
        """What makes gradients over the whole batch from those over the samples that are here."""
        if (part := self.part) is None:
            return None
        return lambda name, gradients: part.whole(gradients, parameters, firsts.get(name, part.samples))

    def _shared(self, name: str) -> bool:
        return isinstance(self.weights[name], Share)


def _counts(term: Tensor) -> bool:
    """Whether a value is so large that a gradient of 0 is no underflow: the type holds it with digits to spare."""
    numbers = torch.finfo(term.dtype)
    return float(term.detach()) > numbers.tiny / numbers.eps


def _norms(terms: dict[str, Tensor], parameters: list[nn.Parameter], whole: Whole | None) -> dict[str, Tensor]:
    """Gradient norms of terms whose derivatives can all be taken."""
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
