"""What an estimator is, and what the estimators share.

M is a matrix with a row for each output and a column for each input element: one sample's Jacobian, or the difference
of two. A = MMᵀ, so tr A = ‖M‖²_F. An estimator gives directions v₁ … v_P on one side; the estimate is Σₚ ‖vₚᵀM‖²
on the output side and Σₚ ‖Mvₚ‖² on the input side. The weights are in the directions: nothing is left to divide.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian import probes

Side = Literal["output", "input"]
Inputs: TypeAlias = Float[Tensor, "batch *input"] | None
Outputs: TypeAlias = Float[Tensor, "batch *out"] | None
Labels: TypeAlias = Int[Tensor, "batch *position"] | Float[Tensor, "batch *out"] | None
Ids: TypeAlias = Int[Tensor, "batch"] | None
Matrix: TypeAlias = Float[Tensor, "row column"]
OnOutputs: TypeAlias = Float[Tensor, "probe batch *out"]
OnInputs: TypeAlias = Float[Tensor, "probe batch *input"]


@dataclass(frozen=True)
class Cost:
    """How many passes through the student the products take, beside the one forward pass that every step has.

    The backward pass of the loss, which goes through all of them, is not counted. `forward` passes lead from inputs to
    outputs (a plain value, or a Jv in forward mode), `backward` passes from outputs to inputs (a vᵀJ).
    """

    forward: int
    backward: int


@runtime_checkable
class Estimator(Protocol):
    """What the `probe=` argument of an objective takes. An implementation names the keywords that it needs."""

    side: ClassVar[Side]

    def directions(
        self,
        *,
        x: Inputs,
        outputs: Outputs,
        labels: Labels,
        ids: Ids,
        seed: int,
        draw: int,
        partners: Inputs,
    ) -> Float[Tensor, "probe batch *shape"]:
        """The directions, weights included, shaped like outputs or like inputs, as `side` says.

        Args:
            x: The inputs; needed on the input side.
            outputs: The teacher's readout values; needed on the output side.
            labels: Class numbers, or the probabilities of mixed labels; only `LabelClass` uses them.
            ids: Number of each sample, int64; needed where anything is random.
            seed: Of the run.
            draw: Which of the independent draws, for example the number of the step.
            partners: The input of each sample's partner; only `DataPairs` uses them.
        """
        ...

    def variance(self, matrix: Matrix, *, outputs: Float[Tensor, "row"] | None = None) -> float:
        """The variance of the estimate for M = `matrix`, by its formula, in float64.

        `outputs`, the teacher's readout values for this sample, are used only by `FisherRows`.
        """
        ...

    def passes(self, outputs: int) -> Cost:
        """The cost of one step's products for a student with this many outputs."""
        ...


_WAY_OUT: Final = {
    "x": "Pass the inputs.",
    "outputs": "Pass the teacher's readout values.",
    "labels": "Pass the labels, or use TopClass().",
    "ids": "Pass the number of each sample, for example torch.arange(len(x)).",
    "partners": "Pass the inputs of the rows that probes.partners chooses.",
}


def needed(value: Tensor | None, name: str, caller: str, method: str = "directions") -> Tensor:
    """The value of a keyword that this estimator needs.

    Raises:
        InputError: it was left out.
    """
    if value is None:
        raise InputError(f"`{name}` of `{caller}.{method}` must be given.", do=_WAY_OUT[name])
    return value


def ids_of(ids: Tensor | None, values: Tensor, caller: str) -> Tensor:
    """The ids, one for each sample: a single one would be broadcast, and all samples would get one direction.

    Raises:
        InputError: they were left out, or there are more or fewer than samples.
    """
    given = needed(ids, "ids", caller)
    if given.shape[0] != values.shape[0]:
        what = f"`ids` of `{caller}.directions` must be one for each sample."
        raise InputError(what, got=f"{given.shape[0]} for {values.shape[0]} samples", do=_WAY_OUT["ids"])
    return given


def check_count(caller: str, count: int, law: str = "gaussian") -> None:
    """Refuses a number of directions below 1, and unknown laws."""
    if not isinstance(count, int) or count < 1:
        raise InputError(f"`count` of `{caller}` must be a whole number of at least 1.", got=count)
    if law not in probes.LAWS:
        raise unknown_name(f"`law` of `{caller}`", law, probes.LAWS)


def check_positive(what: str, value: float) -> None:
    """Refuses numbers that are not positive and finite."""
    if not 0 < value < math.inf:
        raise InputError(f"{what} must be positive and finite.", got=value)


def random_directions(
    caller: str, law: str, count: int, like: Float[Tensor, "batch *shape"], ids: Ids, seed: int, draw: int
) -> Float[Tensor, "probe batch *shape"]:
    """`count` directions of a law of `probes.directions` for samples shaped like `like`, each divided by √count."""
    given, shape = ids_of(ids, like, caller), tuple(like.shape[1:])
    v = probes.directions(law, seed=seed, ids=given, draw=draw, count=count, shape=shape, dtype=like.dtype)
    return v if count == 1 else v / math.sqrt(count)


def law_variance(law: str, count: int, matrix: Float[Tensor, "probed other"]) -> float:
    """Variance of the mean of ‖vᵀM‖² over `count` directions, v of the law on the side of the rows of M."""
    m = matrix.double()
    n = m.shape[0]
    # ‖MMᵀ‖ = ‖MᵀM‖: the smaller of the two, as one side may have as many elements as an image.
    squared = (m @ m.mT if n <= m.shape[1] else m.mT @ m).square().sum().item()
    diagonal = m.square().sum(dim=1)
    trace, diagonal_squared = diagonal.sum().item(), diagonal.square().sum().item()
    deviation = squared - trace**2 / n
    rest = count % n
    one = {
        "gaussian": 2 * squared,
        "rademacher": 2 * (squared - diagonal_squared),
        "sphere": 2 * n / (n + 2) * deviation,
        "basis": n * diagonal_squared - trace**2,
        "orthogonal": 2 * n * rest * (n - rest) / (count * max(n - 1, 1) * (n + 2)) * deviation,
    }[law]
    return max(one, 0.0) / count
