"""Random numbers against the integer reference, directions against their laws, and independence of the batch."""

import itertools
import math
import re
from typing import get_args

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jacobian import probes

from . import reference_estimators as reference
from .reference_estimators import LIMIT, z_scores

LAWS = list(probes.LAWS)
SEEDS = [0, 1, -1, 123456789, 2**63 - 1, -(2**63)]
IDS = [0, 1, 2, 59999, 2**40, 2**63 - 1, -1]
DRAWS = [0, 1, 10**6, -(2**63)]


def draw_directions(law, ids, **settings):
    return probes.directions(law, **{"seed": 3, "draw": 5, "count": 1, "shape": (5,), **settings, "ids": ids})


def words_of(stream, seed, draw, count):
    return [reference.words(stream, seed, sample, draw, count) for sample in IDS]


def test_the_reference_gives_the_published_numbers():
    numbers = list(itertools.islice(reference.splitmix64(1234567), 3))
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [reference.output(1234567, j) for j in range(3)] == numbers


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draw", DRAWS)
def test_integers_equal_the_reference(seed, draw):
    ids = torch.tensor(IDS)
    bits = [[reference.signed(word) for word in row] for row in words_of("bits", seed, draw, 5)]
    assert probes.bits(seed, ids, draw, 5).tolist() == bits
    numbers = [[reference.signed(word) for word in row] for row in words_of("permutation", seed, draw, 7)]
    orders = [sorted(range(7), key=row.__getitem__) for row in numbers]
    assert probes.permutation(seed, ids, draw, 7).tolist() == orders
    partners = []
    for sample, (word,) in zip(IDS, words_of("partners", seed, draw, 1), strict=True):
        rank = (word >> 1) % (99 if sample < 100 else 100)
        partners.append(rank + (rank >= sample))
    assert probes.partners(seed, ids, draw, 100).tolist() == partners


@pytest.mark.parametrize("seed", SEEDS)
def test_real_numbers_equal_the_reference(seed):
    ids = torch.tensor(IDS)
    expected = [[(word >> 40) / 2**24 for word in row] for row in words_of("uniform", seed, 4, 6)]
    assert probes.uniform(seed, ids, 4, 6).tolist() == expected
    expected = [[g for word in row for g in reference.normal_pair(word)] for row in words_of("gaussian", seed, 4, 4)]
    g = probes.gaussian(seed, ids, 4, 7).double()
    torch.testing.assert_close(g, torch.tensor(expected, dtype=torch.float64)[:, :7], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_discrete_laws_equal_the_reference(seed):
    ids = torch.tensor(IDS)
    pairs = words_of("directions", seed, 4, 2)
    signs = [[1.0 if pair[i // 64] >> (i % 64) & 1 else -1.0 for i in range(70)] for pair in pairs]
    assert probes.directions("rademacher", seed=seed, ids=ids, draw=4, count=1, shape=(70,))[0].tolist() == signs
    index = [[(word >> 1) % 6 for word in row] for row in words_of("directions", seed, 4, 3)]
    v = probes.directions("basis", seed=seed, ids=ids, draw=4, count=3, shape=(2, 3), dtype=torch.float64).flatten(2)
    assert v.argmax(2).T.tolist() == index
    assert v.sort(2).values.unique(dim=0).tolist() == [[[0.0] * 5 + [math.sqrt(6)]] * len(IDS)]


def test_neighbouring_arguments_never_collide():
    ids = torch.arange(-8, 56)
    results = [probes.bits(seed, ids, draw, 16) for seed in range(-4, 4) for draw in range(-4, 4)]
    assert torch.stack(results).unique().numel() == 8 * 8 * 64 * 16


@pytest.mark.parametrize("step", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, -1, 0, 0), (0, 1, -1, 0)])
def test_a_step_of_one_flips_every_bit_in_half_of_the_cases(step):
    seed, draw, sample, index = step
    flips = []
    for s, d in itertools.product(range(8), repeat=2):
        here = probes.bits(s, torch.arange(64), d, 16)
        there = probes.bits(s + seed, torch.arange(64) + sample, d + draw, 17)[:, index : 16 + index]
        flips.append(((here ^ there).flatten()[:, None] >> torch.arange(64)) & 1)
    assert z_scores(torch.cat(flips), 0.5).abs().max() < LIMIT
    assert z_scores((torch.cat(flips).sum(1) - 32) ** 2, 16.0).abs() < LIMIT


def test_streams_of_different_functions_are_independent():
    ids = torch.arange(50_000)
    noise = probes.gaussian(0, ids, 0, 4)
    v = probes.directions("gaussian", seed=0, ids=ids, draw=0, count=1, shape=(4,))[0]
    u = probes.uniform(0, ids, 0, 4) - 0.5
    partner = probes.partners(0, ids, 0, 50_000)[:, None] / 50_000 - 0.5
    for one, other in itertools.combinations((noise, v, u, partner), 2):
        assert z_scores(one * other, 0.0).abs().max() < LIMIT


def test_gaussian_follows_the_normal_law():
    g = probes.gaussian(0, torch.arange(1000), 0, 501)[:, :500].flatten().double()
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        assert z_scores(g**power, expected).abs() < LIMIT
    # Dvoretzky, Kiefer, Wolfowitz and Massart: P(sup |F_N − Φ| > ε) ≤ 2 exp(−2Nε²), here 1e-9.
    order = g.sort().values
    rank = torch.arange(1, g.numel() + 1) / g.numel()
    assert (rank - torch.special.ndtr(order)).abs().max() < math.sqrt(math.log(2e9) / (2 * g.numel()))
    pairs = g.view(-1, 2)
    assert z_scores(pairs[:, 0] * pairs[:, 1], 0.0).abs() < LIMIT
    assert z_scores((pairs[:, 0] * pairs[:, 1]) ** 2, 1.0).abs() < LIMIT


@pytest.mark.parametrize("word", [0, -1, 2**63 - 1, -(2**63), 2**41 - 1, -(2**41)])
def test_gaussian_is_finite_and_not_zero_for_every_word(word, monkeypatch):
    monkeypatch.setattr(probes, "_stream", lambda keys, count: torch.full((keys.shape[0], count), word))
    pair = probes.gaussian(0, torch.tensor([0]), 0, 2)
    torch.testing.assert_close(pair[0].tolist(), list(reference.normal_pair(word % 2**64)), rtol=1e-3, atol=1e-6)
    assert pair.isfinite().all()
    assert (pair != 0).all()
    assert pair.abs().max() < 5.78


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (2, 3)])
def test_second_moment_is_the_identity(law, shape):
    v = draw_directions(law, torch.arange(40_000), count=2, shape=shape).flatten(2)
    n = v.shape[2]
    for probe in v:
        assert z_scores(probe[:, :, None] * probe[:, None, :], torch.eye(n)).abs().max() < LIMIT
        if law != "basis":
            assert z_scores(probe, 0.0).abs().max() < LIMIT


@pytest.mark.parametrize("law", LAWS)
def test_fourth_moments_are_those_of_the_law(law):
    v = draw_directions(law, torch.arange(40_000), shape=(3,))[0]
    for i, j, k, m in itertools.combinations_with_replacement(range(3), 4):
        expected = reference.moment(law, 3, i, j, k, m)
        assert z_scores(v[:, i] * v[:, j] * v[:, k] * v[:, m], expected).abs() < LIMIT


@pytest.mark.parametrize("law", [law for law in LAWS if law != "orthogonal"])
def test_directions_of_one_sample_are_independent(law):
    first, second = draw_directions(law, torch.arange(40_000), count=2)
    if law == "basis":
        first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    assert z_scores(first[:, :, None] * second[:, None, :], 0.0).abs().max() < LIMIT
    squares = (first**2)[:, :, None] * (second**2)[:, None, :]
    assert z_scores(squares, (1 if law != "basis" else (4 / 5) ** 2) * torch.ones(5, 5)).abs().max() < LIMIT


@pytest.mark.parametrize("law", ["rademacher", "sphere", "basis", "orthogonal"])
@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_norm_is_the_root_of_the_dimension(law, n):
    v = draw_directions(law, torch.arange(50), count=3, shape=(n,), dtype=torch.float64)
    expected = torch.full((3, 50), math.sqrt(n), dtype=torch.float64)
    torch.testing.assert_close(v.norm(dim=2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (1, 3), (3, 2), (3, 3), (3, 8), (200, 4)])
def test_orthogonal_within_blocks(n, count):
    v = draw_directions("orthogonal", torch.arange(6), count=count, shape=(n,), dtype=torch.float64)
    for start in range(0, count, n):
        block = v[start : start + n].transpose(0, 1)
        gram = n * torch.eye(block.shape[1]).double().expand(6, -1, -1)
        torch.testing.assert_close(block @ block.mT, gram, rtol=0, atol=1e-11 * n)


def test_orthogonal_columns_have_the_moments_of_haar():
    v, w = draw_directions("orthogonal", torch.arange(40_000), count=2, shape=(3,))
    for i, j, k, m in itertools.product(range(3), repeat=4):
        products = v[:, i] * v[:, j] * w[:, k] * w[:, m]
        assert z_scores(products, reference.cross_moment(3, i, j, k, m)).abs() < LIMIT


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("shape", [(), (3,), (5,), (17,), (3, 7, 7), (3, 32, 32)])
@pytest.mark.parametrize("law", LAWS)
def test_order_and_split_of_the_batch_do_not_matter(law, shape, count, dtype):
    ids = torch.tensor([5, 0, 99, 7, 10**12, 3, 8, 31, 1, 2, 6])
    settings = {"count": count, "shape": shape, "dtype": dtype}
    whole = draw_directions(law, ids, **settings)
    order = torch.tensor([10, 3, 0, 7, 1, 9, 2, 8, 5, 4, 6])
    assert torch.equal(draw_directions(law, ids[order], **settings), whole[:, order])
    for size in (1, 2, 3, 7):
        assert torch.equal(torch.cat([draw_directions(law, part, **settings) for part in ids.split(size)], 1), whole)


@pytest.mark.parametrize("name", ["bits", "uniform", "gaussian", "permutation"])
def test_numbers_do_not_depend_on_the_batch(name):
    function = getattr(probes, name)
    ids = torch.arange(13).flip(0)
    whole = function(1, ids, 2, 37)
    for size in (1, 2, 5):
        assert torch.equal(torch.cat([function(1, part, 2, 37) for part in ids.split(size)]), whole)
    partners = probes.partners(1, ids, 2, 50)
    assert torch.equal(torch.cat([probes.partners(1, part, 2, 50) for part in ids.split(3)]), partners)


@pytest.mark.parametrize("law", LAWS)
def test_first_directions_stay_when_more_are_drawn(law):
    ids = torch.arange(9)
    few, many = (draw_directions(law, ids, count=count, shape=(3,)) for count in (2, 8))
    torch.testing.assert_close(few, many[:2], rtol=0, atol=1e-5 if law == "orthogonal" else 0)
    assert torch.equal(probes.bits(1, ids, 2, 5), probes.bits(1, ids, 2, 9)[:, :5])
    assert torch.equal(probes.gaussian(1, ids, 2, 5), probes.gaussian(1, ids, 2, 8)[:, :5])


@pytest.mark.parametrize("law", LAWS)
def test_shapes_and_types(law):
    assert draw_directions(law, torch.arange(0), count=2, shape=(3, 4)).shape == (2, 0, 3, 4)
    assert draw_directions(law, torch.arange(2), count=2, shape=()).shape == (2, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        v = draw_directions(law, torch.arange(2), count=3, shape=(3,), dtype=dtype)
        assert v.dtype == dtype
        assert v.is_contiguous()
        exact = draw_directions(law, torch.arange(2), count=3, shape=(3,), dtype=torch.float64)
        torch.testing.assert_close(v.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-6)


def test_permutations_are_equally_likely():
    orders = probes.permutation(0, torch.arange(60_000), 0, 3)
    for order in itertools.permutations(range(3)):
        assert z_scores((orders == torch.tensor(order)).all(1), 1 / 6).abs() < LIMIT


def test_partners_are_the_other_rows_equally_likely():
    results = torch.stack([probes.partners(0, torch.arange(5), draw, 5) for draw in range(2000)])
    for row in range(5):
        expected = torch.full((5,), 0.25).index_fill(0, torch.tensor([row]), 0.0)
        assert z_scores(results == row, expected).abs().max() < LIMIT
    others = probes.partners(0, torch.arange(5, 40_000), 0, 5)
    for row in range(5):
        assert z_scores(others == row, 0.2).abs() < LIMIT
    assert probes.partners(0, torch.tensor([0, 1]), 7, 2).tolist() == [1, 0]


def test_data_pairs_point_from_sample_to_partner():
    x, other = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    other[2] = x[2]
    v = probes.data_pairs(x, other)
    for n in (0, 1, 3):
        length = math.sqrt(sum((b - a) ** 2 for a, b in zip(x[n].flatten(), other[n].flatten(), strict=True)))
        torch.testing.assert_close(v[n], (other[n] - x[n]) * math.sqrt(6) / length, rtol=1e-12, atol=0)
    assert torch.equal(v[2], torch.zeros(2, 3, dtype=torch.float64))


def test_the_names_of_the_laws_are_the_type():
    assert list(get_args(probes.Law)) == LAWS


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "gausian"}, "`law` of `directions` must be a known name. Got 'gausian'. Nearest: gaussian"),
        ({"count": 0}, "`count` of `directions` must be an integer of at least 1. Got 0."),
        ({"shape": (3, 0)}, "`shape` of `directions` must have at least one element. Got (3, 0)."),
        ({"dtype": torch.int64}, "`dtype` of `directions` must be a floating type. Got torch.int64. Use torch.float"),
        (
            {"ids": torch.arange(2.0)},
            "`ids` of `directions` must be a 1-D tensor of int64. Got torch.float32 of shape (2,).",
        ),
        (
            {"ids": torch.ones(2, 2).long()},
            "must be a 1-D tensor of int64. Got torch.int64 of shape (2, 2). Use torch.arange",
        ),
        ({"seed": 2**63}, "`seed` of `directions` must be a signed 64-bit integer. Got 9223372036854775808."),
        ({"draw": -(2**63) - 1}, "`draw` of `directions` must be a signed 64-bit integer. Got -9223372036854775809."),
    ],
)
def test_bad_directions_are_refused(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        draw_directions(**{"law": "gaussian", "ids": torch.arange(2), **settings})


@pytest.mark.parametrize("name", ["bits", "uniform", "gaussian", "permutation"])
def test_bad_arguments_are_refused(name):
    function = getattr(probes, name)
    with pytest.raises(InputError, match=f"`count` of `{name}` must be an integer of at least 1. Got -1."):
        function(0, torch.arange(2), 0, -1)
    with pytest.raises(InputError, match=f"`ids` of `{name}` must be a 1-D tensor of int64. Got torch.int32 of shape"):
        function(0, torch.arange(2, dtype=torch.int32), 0, 1)


@pytest.mark.usefixtures("as_users_run")
def test_bad_partners_are_refused():
    with pytest.raises(InputError, match=r"`population` of `partners` must be at least 2: .* Got 1\."):
        probes.partners(0, torch.arange(2), 0, 1)
    with pytest.raises(
        InputError, match=r"`x` and `partners_x` of `data_pairs` must have the same shape\. Got \(2, 3\)"
    ):
        probes.data_pairs(torch.zeros(2, 3), torch.zeros(1, 3))
