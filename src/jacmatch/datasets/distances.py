"""Distances between two sets of points, and the bound of a loss on one set by its values on the other.

Points are flattened; distances are Euclidean, in float64.
"""

from dataclasses import dataclass
from math import lcm

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from jacmatch.errors import InputError, UnsupportedError

_LARGEST = 4096  # points of each set in an assignment; for larger unequal sets a linear program is solved
_Matrix = Float64[Tensor, "one other"]


def pairwise(a: Shaped[Tensor, "one *input"], b: Shaped[Tensor, "other *input"]) -> _Matrix:
    """Return ‖aᵢ − bⱼ‖ for all pairs."""
    for name, points in (("a", a), ("b", b)):
        if not len(points):
            raise InputError(f"`{name}` of a distance between sets must not be empty.", got="none")
    if a.shape[1:] != b.shape[1:]:
        got = f"{tuple(a.shape[1:])} and {tuple(b.shape[1:])}"
        raise InputError("The points of two sets must have the same shape to compute a distance.", got=got)
    mode = "donot_use_mm_for_euclid_dist"  # a difference of large squares has no digits left for near points
    return torch.cdist(a.flatten(1).double(), b.flatten(1).double(), compute_mode=mode)


def _transport(cost: Float64[np.ndarray, "one other"]) -> float:
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise UnsupportedError("`Distances` needs the package scipy. Run: pip install scipy.") from error
    rows, columns = cost.shape
    size = lcm(rows, columns)
    if size > _LARGEST:
        return _linear_program(cost)
    copies = np.repeat(np.repeat(cost, size // rows, 0), size // columns, 1)  # equally many points of equal weight
    return float(copies[linear_sum_assignment(copies)].mean())


def _linear_program(cost: Float64[np.ndarray, "one other"]) -> float:
    """Solve the transport as a linear program over the masses that move from each point to each."""
    from scipy.optimize import linprog
    from scipy.sparse import eye, kron, vstack

    rows, columns = cost.shape
    leaving = kron(eye(rows), np.ones((1, columns)))
    arriving = kron(np.ones((1, rows)), eye(columns))
    mass = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    return float(linprog(cost.ravel(), A_eq=vstack([leaving, arriving]), b_eq=mass, method="highs").fun)


@dataclass(frozen=True)
class Distances:
    """Distances of a set A from a set B."""

    hausdorff: float  # H_a(A, B)
    mean_nearest: float  # mean distance of a point of A to the nearest of B
    wasserstein: float  # W₁(A, B)

    @classmethod
    def between(cls, a: Shaped[Tensor, "one *input"], b: Shaped[Tensor, "other *input"]) -> "Distances":
        """Return all three distances from one distance matrix. Raises as `pairwise`."""
        return cls._of(pairwise(a, b))

    @classmethod
    def _of(cls, matrix: _Matrix) -> "Distances":
        nearest = matrix.min(1).values
        return cls(float(nearest.max()), float(nearest.mean()), _transport(matrix.cpu().numpy()))


@dataclass(frozen=True)
class Bound:
    """Bounds of the mean of a loss ρ on a set A by its values on a set B and a Lipschitz constant K.

    All three right sides follow from |ρ(x) − ρ(x′)| ≤ K‖x − x′‖, where x′ is the nearest point of B or the partner of x
    in the transport. The loosest is mean_A ρ ≤ max_B ρ + K·H_a(A, B). The second is the mean of ρ over B, with each
    point weighted by its share of nearest neighbors in A, plus K times the mean nearest distance. The third is mean_B ρ
    + K·W₁(A, B).

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443, section 4 (the first form), as re-implementations report it.
        Kantorovich & Rubinstein (the last).
    """

    mean: float  # mean_A ρ, the left side
    largest: float  # max_B ρ
    weighted: float  # mean of ρ over the nearest points of B
    average: float  # mean_B ρ
    lipschitz: float  # K
    distances: Distances  # those of A from B

    @classmethod
    def of(
        cls,
        a: Shaped[Tensor, "one *input"],
        b: Shaped[Tensor, "other *input"],
        rho_a: Float[Tensor, "one"],
        rho_b: Float[Tensor, "other"],
        lipschitz: float | None = None,
    ) -> "Bound":
        """Return the bound for points of A and B and their losses."""
        if lipschitz is not None and not lipschitz >= 0:
            raise InputError("`lipschitz` of `Bound` must be at least 0.", got=lipschitz)
        matrix = pairwise(a, b)
        nearest = matrix.min(1).indices
        own, other = rho_a.double(), rho_b.double()
        return cls(
            float(own.mean()),
            float(other.max()),
            float(other[nearest].mean()),
            float(other.mean()),
            observed_lipschitz(matrix, own, other) if lipschitz is None else lipschitz,
            Distances._of(matrix),
        )

    @property
    def by_hausdorff(self) -> float:
        """max_B ρ + K·H_a(A, B)."""
        return self.largest + self.lipschitz * self.distances.hausdorff

    @property
    def by_nearest(self) -> float:
        """The weighted mean of ρ over B + K · mean nearest distance."""
        return self.weighted + self.lipschitz * self.distances.mean_nearest

    @property
    def by_transport(self) -> float:
        """mean_B ρ + K·W₁(A, B)."""
        return self.average + self.lipschitz * self.distances.wasserstein


def observed_lipschitz(matrix: _Matrix, rho_a: Float[Tensor, "one"], rho_b: Float[Tensor, "other"]) -> float:
    """Return the largest |ρ(a) − ρ(b)| / ‖a − b‖ over different points, a lower bound of the Lipschitz constant."""
    apart = matrix > 0
    ratios = (rho_a.double()[:, None] - rho_b.double()[None]).abs() / torch.where(apart, matrix, torch.inf)
    return float(ratios.max())
