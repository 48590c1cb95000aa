"""Where the comparison is made: the laws of noise and mixing, and what goes with them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from jacmatch.jacobian import DataPairs, EveryRow, RandomInputs, probes
from jacmatch.losses import cross_entropy
from jacmatch.objectives import AtData, AtMixedPairs, AtNoise, Distillation, GradientShare

from .cases import OUTPUTS, POINTS, SHAPE, batch, student, teacher

MANY = 4000


def ids(count=MANY):
    return torch.arange(count)


def test_at_data_is_at_the_data():
    given = batch()
    x, share = AtData().move(given["x"], given["partners"], ids=given["ids"], seed=0, draw=0)
    assert torch.equal(x, given["x"])
    assert share is None


@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_noise_is_normal_with_the_given_deviation(sigma):
    x = torch.randn(1, 5, dtype=torch.float64).expand(MANY, 5)
    moved, share = AtNoise(sigma).move(x, x, ids=ids(), seed=1, draw=2)
    assert share is None
    noise = ((moved - x) / sigma).flatten()
    for power, wanted in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        deviation = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / len(noise))
        assert abs(float((noise**power).mean()) - wanted) < 4 * deviation
    correlations = (noise.view(MANY, 5).T @ noise.view(MANY, 5)) / MANY - torch.eye(5)
    assert float(correlations.abs().max()) < 6 / math.sqrt(MANY)


def test_the_share_is_uniform_and_the_mixture_lies_between():
    x, partners = torch.zeros(MANY, *SHAPE), torch.ones(MANY, *SHAPE)
    moved, share = AtMixedPairs().move(x, partners, ids=ids(), seed=1, draw=2)
    assert share.shape == (MANY,)
    assert torch.equal(moved, (1 - share)[:, None, None].expand(MANY, *SHAPE))
    ordered = share.double().sort().values
    steps = torch.arange(1, MANY + 1) / MANY
    distance = torch.maximum((steps - ordered).abs(), (ordered - steps + 1 / MANY).abs()).max()
    assert float(distance) * math.sqrt(MANY) < 1.95, "Kolmogorov and Smirnov, 0.1 %"
    assert 0 <= float(ordered[0]) <= float(ordered[-1]) < 1


@pytest.mark.parametrize("point", [AtNoise(1.0), AtMixedPairs()])
def test_moves_depend_on_seed_id_and_draw_alone(point):
    given = batch(count=6)

    def moved(rows=None, *, seed=0, draw=0, shift=0):
        rows = torch.arange(6) if rows is None else rows
        arguments = (given["x"][rows], given["partners"][rows])
        return point.move(*arguments, ids=given["ids"][rows] + shift, seed=seed, draw=draw)[0]

    order = torch.tensor([4, 1, 5, 0, 2, 3])
    assert torch.equal(moved(order), moved()[order])
    assert torch.equal(torch.cat([moved(order[:2]), moved(order[2:])]), moved()[order])
    for other in (moved(seed=1), moved(draw=1), moved(shift=1)):
        assert not (other == moved()).any()


def test_noise_is_independent_of_the_directions():
    x = torch.zeros(MANY, 6)
    noise = AtNoise(1.0).move(x, x, ids=ids(), seed=3, draw=4)[0]
    v = RandomInputs(1).directions(x=x, ids=ids(), seed=3, draw=4, outputs=None, labels=None, partners=None)[0]
    assert float((noise.T @ v / MANY).abs().max()) < 5 / math.sqrt(MANY)
    share = AtMixedPairs().move(x, x, ids=ids(), seed=3, draw=4)[1]
    assert not torch.equal(share, probes.uniform(3, ids(), 4, 1)[:, 0])


def test_student_and_teacher_see_the_same_point():
    given, seen = batch(), {}
    s, t = student(), teacher()
    for name, net in (("student", s), ("teacher", t)):
        net.register_forward_pre_hook(lambda layer, x, name=name: seen.update({name: x[0].detach().clone()}))
    for point in POINTS.values():
        Distillation(s, t, point=point, jacobians=0)(**given)
        wanted = point.move(given["x"], given["partners"], ids=given["ids"], seed=0, draw=0)[0]
        assert torch.equal(seen["student"], wanted)
        assert torch.equal(seen["teacher"], wanted)


def test_mixing_losses_is_mixing_labels():
    given = batch()
    terms = Distillation(student(), point=AtMixedPairs(), seed=6)(**given)
    moved, share = AtMixedPairs().move(given["x"], given["partners"], ids=given["ids"], seed=6, draw=0)
    first, other = (functional.one_hot(given[name], OUTPUTS).double() for name in ("y", "partner_labels"))
    mixed = share[:, None] * first + (1 - share[:, None]) * other
    torch.testing.assert_close(terms["labels"], cross_entropy(student()(moved), mixed).mean())


def test_the_next_in_the_batch_is_the_partner_where_none_is_given():
    given = batch()
    alone = {name: given[name] for name in ("x", "y", "ids")}
    rolled = {"partners": given["x"].roll(1, 0), "partner_labels": given["y"].roll(1, 0)}
    for settings in ({"point": AtMixedPairs()}, {"probe": DataPairs()}):
        a = Distillation(student(), teacher(), **{"jacobians": GradientShare(0.3), **settings})(**alone)
        b = Distillation(student(), teacher(), **{"jacobians": GradientShare(0.3), **settings})(**alone, **rolled)
        assert torch.equal(a["loss"], b["loss"])
    objective = Distillation(student(), teacher(), point=AtMixedPairs(), labels=0, jacobians=GradientShare(0.3))
    assert objective(given["x"], ids=given["ids"]).keys() == ["loss", "outputs", "jacobians"]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"point": AtNoise(0.1)}, False),
        ({"point": AtMixedPairs()}, True),
        ({"probe": DataPairs()}, True),
        ({"probe": EveryRow(), "point": AtMixedPairs()}, True),
    ],
)
def test_it_says_whether_it_needs_partners(settings, wanted):
    assert Distillation(student(), teacher(), **{"jacobians": GradientShare(0.3), **settings}).needs_partners is wanted


def test_two_processes_draw_different_noise_and_directions(monkeypatch):
    x, seen, network = torch.zeros(3, 4), [], nn.Linear(4, 2)
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    objective = Distillation(nn.Linear(4, 2), network, labels=0, jacobians=0, point=AtNoise(1.0))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        objective(x, draw=0)
    monkeypatch.undo()
    objective(torch.zeros(6, 4), draw=0)  # process r of n has the samples r, r + n, … of a batch
    assert torch.equal(torch.stack(seen[:2], 1).flatten(0, 1), seen[2])
    assert len(seen[2].unique(dim=0)) == 6
