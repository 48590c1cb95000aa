"""Distances of sets against brute force and known values, and the bound on losses whose Lipschitz constant is known."""

import itertools

import pytest
import torch

from jacmatch.datasets.distances import Bound, Distances, observed_lipschitz, pairwise
from jacmatch.errors import InputError


def hausdorff(a, b):
    return Distances.between(a, b).hausdorff


def mean_nearest(a, b):
    return Distances.between(a, b).mean_nearest


def wasserstein(a, b):
    return Distances.between(a, b).wasserstein


def points(count, seed, *shape):
    return torch.randn(count, *(shape or (3,)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(a, b):
    return sum(float((p - q) ** 2) for p, q in zip(a.flatten(), b.flatten(), strict=True)) ** 0.5


def test_they_are_what_the_definitions_say():
    a, b = points(5, 0, 2, 2), points(4, 1, 2, 2)
    nearest = [min(apart(one, other) for other in b) for one in a]
    assert hausdorff(a, b) == pytest.approx(max(nearest))
    assert mean_nearest(a, b) == pytest.approx(sum(nearest) / 5)
    assert hausdorff(b, a) == pytest.approx(max(min(apart(one, other) for one in a) for other in b))
    assert hausdorff(a, b) != pytest.approx(hausdorff(b, a))


def test_transport_of_equally_many_points_is_the_best_assignment():
    a, b = points(5, 2), points(5, 3)
    best = min(sum(apart(a[i], b[j]) for i, j in enumerate(order)) / 5 for order in itertools.permutations(range(5)))
    assert wasserstein(a, b) == pytest.approx(best)


@pytest.mark.parametrize("sizes", [(4, 6), (61, 71)])
def test_transport_on_the_line_is_the_area_between_the_distributions(sizes):
    """W₁ = ∫ |F_A − F_B|; 61 and 71 have no small common multiple, so the distance is that of the linear program."""
    a, b = (points(size, seed, 1) for seed, size in enumerate(sizes, 4))
    ends = torch.cat([a, b]).flatten().sort().values
    shares = [(points <= ends[:-1]).double().mean(0) for points in (a, b)]
    assert wasserstein(a, b) == pytest.approx(float(((shares[0] - shares[1]).abs() * ends.diff()).sum()), rel=1e-6)


def test_known_values():
    a = torch.tensor([[0.0, 0.0]])
    b = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert (hausdorff(a, b), hausdorff(b, a), mean_nearest(b, a), wasserstein(a, b)) == (0, 5, 2.5, 2.5)
    assert Distances.between(b, a) == Distances(5.0, 2.5, 2.5)


def test_more_points_in_the_near_set_never_raise_the_distance():
    a, b = points(20, 6), points(10, 7)
    more = torch.cat([b, b + 0.1 * points(10, 8)])
    assert hausdorff(a, more) <= hausdorff(a, b)
    assert mean_nearest(a, more) <= mean_nearest(a, b)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_with_the_true_constant(seed):
    """ρ(x) = ‖W x − c‖ has the Lipschitz constant ‖W‖₂, its largest singular value."""
    a, b = points(12, 100 + seed), 1.5 * points(5 + seed % 3, 200 + seed) + 0.3
    weight, center = points(4, 300 + seed), points(1, 400 + seed, 4)
    rho = [(x @ weight.T - center).norm(dim=1) for x in (a, b)]
    constant = float(torch.linalg.matrix_norm(weight, 2))
    bound = Bound.of(a, b, *rho, constant)
    assert bound.mean <= bound.by_nearest + 1e-12 <= bound.by_hausdorff + 2e-12
    assert bound.mean <= bound.by_transport + 1e-12
    assert bound.by_hausdorff == pytest.approx(float(rho[1].max()) + constant * hausdorff(a, b))
    assert bound.by_transport == pytest.approx(float(rho[1].mean()) + constant * wasserstein(a, b))
    estimated = Bound.of(a, b, *rho)
    assert estimated.lipschitz <= constant + 1e-12, "an estimate is a lower bound of the constant"
    assert estimated.mean <= min(estimated.by_nearest, estimated.by_hausdorff) + 1e-12


def test_the_weighted_mean_weighs_with_the_share_of_nearest_neighbors():
    a, b = torch.tensor([[0.0], [0.1], [0.2], [5.0]]), torch.tensor([[0.0], [6.0]])
    bound = Bound.of(a, b, torch.zeros(4), torch.tensor([1.0, 9.0]), 0.0)
    assert bound.weighted == pytest.approx((3 * 1 + 9) / 4)
    assert bound.average == 5


def test_the_observed_lipschitz_leaves_out_equal_points():
    a = torch.tensor([[0.0], [2.0]])
    assert observed_lipschitz(pairwise(a, a), torch.tensor([0.0, 3.0]), torch.tensor([1.0, 3.0])) == pytest.approx(1.5)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hausdorff(torch.ones(0, 2), torch.ones(1, 2)), r"`a` of a distance .* must not be empty"),
        (lambda: wasserstein(torch.ones(1, 2), torch.ones(0, 2)), r"`b` of a distance .* must not be empty"),
        (
            lambda: mean_nearest(torch.ones(1, 2), torch.ones(1, 3)),
            r"must have the same shape .* Got \(2,\) and \(3,\)",
        ),
        (
            lambda: Bound.of(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), torch.ones(1), -1.0),
            r"`lipschitz` of `Bound` must be at least 0\. Got -1",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()
