"""The points at which a function is evaluated."""

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.jobs.surrogate.points import Samples, box, cube, disagreement, inside, sample_actively, shares, worst


@pytest.mark.parametrize("kind", ["box", "sobol", "latin-hypercube"])
def test_points_are_in_the_box_and_a_function_of_the_seed(kind):
    corners = box((-1.0, 0.0), (1.0, 10.0), None)
    x = inside(cube(kind, 64, 2, 3), corners)
    assert ((x >= corners[0]) & (x <= corners[1])).all()
    assert torch.equal(x, inside(cube(kind, 64, 2, 3), corners))
    assert not torch.equal(x, inside(cube(kind, 64, 2, 4), corners))
    assert (x.mean(0) - torch.tensor([0.0, 5.0])).abs().max() < 1.5


def test_a_latin_hypercube_has_a_point_in_each_slice_and_sobol_is_even():
    assert torch.equal(
        (20 * cube("latin-hypercube", 20, 3, 0)).floor().sort(0).values[:, 1], torch.arange(20.0).double()
    )
    cells = (4 * cube("sobol", 16, 2, 0)).floor()
    assert len({tuple(each) for each in cells.tolist()}) == 16  # one in each square
    assert torch.equal(cube("sobol", 8, 2, 5), cube("sobol", 16, 2, 5)[:8])


def test_bounds_that_are_no_box_are_refused():
    with pytest.raises(InputError, match="`--low` of `surrogate` must have a bound for each of the 3 inputs"):
        box((0.0, 1.0), (1.0, 2.0, 3.0), None)
    with pytest.raises(InputError, match="`--low` of `surrogate` must have a bound for each of the D inputs"):
        box((), (), None)
    with pytest.raises(InputError, match="`--low` must be below `--high`"):
        box((0.0, 1.0), (1.0, 1.0), None)
    assert box((0.0,), (1.0,), 3).shape == (2, 3)
    with pytest.raises(InputError, match="`--sampling` of `surrogate`"):
        cube("halton", 4, 2, 0)
    with pytest.raises(InputError, match="must have at most 21201 inputs"):
        cube("sobol", 4, 30_000, 0)
    with pytest.raises(InputError, match="must be at least 1"):
        cube("box", 0, 2, 0)


def test_active_sampling_goes_where_student_and_teacher_disagree():
    """A student that is right on one half: the points of all rounds lie in the other, and each call is counted."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.factor * x.clamp(max=0.5)

    sizes = []

    def answer(x):
        sizes.append(len(x))
        return Samples(x, x.clone(), torch.ones(len(x), 1, 1, dtype=torch.float64), len(x), 0.0)

    def pool(count, seed):
        return cube("box", count, 1, seed)

    units = (torch.ones(1, dtype=torch.float64), None)
    known = sample_actively(pool(30, 0), pool, answer, lambda samples: Half(), units, 30, rounds=2, seed=7)
    assert len(known) == 30
    assert known.calls == sum(sizes) == 10 + 4 * 20
    assert torch.equal(known.x[:10], pool(30, 0)[:10])
    assert (known.x[10:] > 0.5).all()
    assert len(known.x.unique()) == 30
    far = disagreement(Half(), answer(torch.tensor([[0.2], [0.7], [0.9]], dtype=torch.float64)), units)
    assert far[0] == 0
    assert 0 < far[1] < far[2]


def test_candidates_are_drawn_without_replacement_by_their_disagreement():
    far = torch.tensor([0.0, 1.0, 9.0, 0.0])
    assert set(worst(far, 2, 0).tolist()) == {1, 2}
    assert len(set(worst(torch.zeros(5), 5, 0).tolist())) == 5
    first = [int(worst(far, 1, seed)) for seed in range(200)]
    assert 0.8 < first.count(2) / 200 < 0.97
    assert shares(100, 4)[-1] == 100
