"""Regression on values and derivatives: against loops, in any units, from each source of derivatives."""

import pytest
import torch
from torch import nn

from jacmatch import AntitheticNoise, GradientShare, InputError, RandomInputs, Regression, SampledRows, UnsupportedError
from jacmatch.jacobian import DataPairs, EveryRow, jacobian
from jacmatch.teachers import AnalyticTeacher, BlackBoxTeacher

S, T = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64), torch.tensor([10.0, 0.1], dtype=torch.float64)


def function(x):
    return torch.stack([x.prod(1), x.sin().sum(1)], 1)


def true_jacobian(x):
    return jacobian(function, x)[1].detach()


@pytest.fixture
def points():
    return torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2


def student(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def by_loops(net, x):
    """Both terms from their definition: derivatives of the student by differences, element by element."""
    y, j, mine = function(x), true_jacobian(x), net(x).detach()
    values = sum(((mine[n, k] - y[n, k]) / T[k]) ** 2 for n in range(5) for k in range(2)) / 5
    total, h = 0.0, 1e-5
    for n in range(5):
        for i in range(3):
            step = torch.zeros(1, 3, dtype=torch.float64)
            step[0, i] = h
            rate = ((net(x[n : n + 1] + step) - net(x[n : n + 1] - step)) / (2 * h)).detach()[0]
            total += sum((((rate[k] - j[n, k, i]) * S[i] / T[k]) ** 2) for k in range(2))
    return float(values), float(total) / 5


def test_both_terms_are_those_of_the_definition(points):
    net = student()
    terms = Regression(net, jacobians=0.5, inputs=S, outputs=T)(points, function(points), j=true_jacobian(points))
    values, jacobians = by_loops(net, points)
    assert float(terms.unweighted["values"].detach()) == pytest.approx(values, rel=1e-9)
    assert float(terms.unweighted["jacobians"].detach()) == pytest.approx(jacobians, rel=1e-6)
    assert float(terms["loss"].detach()) == pytest.approx(values + 0.5 * jacobians, rel=1e-6)


def test_units_change_nothing(points):
    """Inputs in other units, with s in the same: the loss stays, which it would not without s."""
    net, c = student(), torch.tensor([1000.0, 0.1, 1.0], dtype=torch.float64)

    class Rescaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x / c)

    y, j = function(points), true_jacobian(points)
    for probe in (EveryRow(), RandomInputs(2), SampledRows(1)):
        settings = {"jacobians": 1.0, "outputs": T, "probe": probe}
        here = Regression(net, inputs=S, **settings)(points, y, j=j)["loss"]
        there = Regression(Rescaled(), inputs=S * c, **settings)(points * c, y, j=j / c)["loss"]
        assert float(there.detach()) == pytest.approx(float(here.detach()), rel=1e-9)


def test_a_probe_on_the_input_side_has_the_mean_of_all_rows(points):
    net, y, j = student(), function(points), true_jacobian(points)
    exact = Regression(net, jacobians=1.0, inputs=S, outputs=T)(points, y, j=j)["jacobians"]
    many = Regression(net, jacobians=1.0, inputs=S, outputs=T, probe=RandomInputs(3, law="orthogonal"))
    assert float(many(points, y, j=j)["jacobians"].detach()) == pytest.approx(float(exact.detach()), rel=1e-9)


def test_derivatives_come_from_an_argument_a_table_or_a_teacher(points):
    net, y, j = student(), function(points), true_jacobian(points)
    ids = torch.tensor([4, 0, 3, 1, 2])
    table = torch.empty_like(j)
    table[ids] = j
    given = Regression(net, jacobians=1.0)(points, y, j=j)["loss"]
    assert torch.equal(Regression(net, jacobians=1.0, table=table)(points, y, ids=ids)["loss"], given)
    known = AnalyticTeacher(function, true_jacobian)
    assert torch.allclose(Regression(net, known, jacobians=1.0)(points)["loss"], given)
    pairs = Regression(net, BlackBoxTeacher(function), jacobians=1.0, probe=RandomInputs(3, law="orthogonal"))
    assert torch.allclose(pairs(points)["loss"], given, rtol=1e-6)
    noise = Regression(net, BlackBoxTeacher(function), jacobians=1.0, probe=AntitheticNoise(2, sigma=0.01), inputs=S)
    assert noise(points)["jacobians"] > 0


def test_the_loss_is_zero_for_the_function_itself_and_derivatives_train_the_student(points):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.factor * function(x)

    terms = Regression(Same(), jacobians=1.0, inputs=S, outputs=T)(points, function(points), j=true_jacobian(points))
    assert float(terms["loss"].detach()) < 1e-20
    net = student()
    Regression(net, values=0.0, jacobians=1.0)(points, function(points), j=true_jacobian(points))["loss"].backward()
    assert net[0].weight.grad.abs().sum() > 0


def test_shares_are_measured_and_derivatives_can_wait(points):
    objective = Regression(student(), jacobians=GradientShare(0.25), every=2)
    y, j = function(points), true_jacobian(points)
    terms = objective(points, y, j=j)
    assert terms.shares["jacobians"] == pytest.approx(0.25)
    assert "jacobians" not in objective(points, y, j=j)
    state = objective.get_extra_state()
    other = Regression(student(), jacobians=GradientShare(0.25), every=2)
    other.set_extra_state(state)
    assert torch.equal(objective(points, y, j=j)["loss"], other(points, y, j=j)["loss"])


def test_shares_are_measured_in_steps_with_derivatives(points):
    objective = Regression(student(), jacobians=GradientShare(0.25), every=3, measure_every=4)
    y, j = function(points), true_jacobian(points)
    measured = []
    for call in range(13):
        before = dict(objective.loss_weights.factors)
        assert set(objective(points, y, j=j).shares) == {"values", "jacobians"}
        with torch.no_grad():
            objective.student[0].weight.mul_(1.3)
        if objective.loss_weights.factors != before:
            measured.append(call)
    assert measured == [0, 6, 12]


def test_what_is_wrong_is_refused(points):
    y, j = function(points), true_jacobian(points)
    with pytest.raises(InputError, match="`y` of `Regression` must be given without a teacher"):
        Regression(student(), jacobians=0.0)(points)
    with pytest.raises(InputError, match="`j` of `Regression` must be given"):
        Regression(student())(points, y)
    with pytest.raises(InputError, match=r"must return the shape \(5, 2, 3\)"):
        Regression(student())(points, y, j=j[:, :1])
    with pytest.raises(InputError, match="must not be AntitheticNoise"):
        Regression(student(), probe=AntitheticNoise(1, sigma=0.1))(points, y, j=j)
    with pytest.raises(InputError, match="`inputs` of `Regression` must be positive"):
        Regression(student(), inputs=torch.zeros(3))
    with pytest.raises(InputError, match="must have the same outputs"):
        Regression(nn.Linear(3, 1).double(), jacobians=0.0)(points, y)
    with pytest.raises(UnsupportedError, match="must answer vᵀJ"):
        Regression(student(), BlackBoxTeacher(function))
    assert Regression(student(), probe=DataPairs()).needs_partners
