"""Weights as shares of the gradient norm, every n-th step, schedules, and a run that goes on where it stopped."""

import copy
import itertools
import math
import pickle

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jacobian import EveryRow, FisherRows, RandomInputs
from jacmatch.objectives import AtNoise, Distillation, GradientShare, LossWeights, WeightSchedule

from .cases import along, batch, direction_of, student, teacher


def norms(terms, network):
    """‖∂ term/∂θ‖ of each weighted term, by autograd here."""
    norm_of = {}
    for name in terms.keys()[1:]:
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(terms[name], parameters, retain_graph=True, allow_unused=True)
        norm_of[name] = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    return norm_of


def shares(terms, network):
    norm_of = norms(terms, network)
    return {name: norm / sum(norm_of.values()) for name, norm in norm_of.items()}


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"jacobians": GradientShare(0.7)},
        {"labels": 3, "outputs": 0.01, "jacobians": GradientShare(0.2)},
        {"labels": 0, "jacobians": GradientShare(0.5)},
        {"outputs": GradientShare(0.2), "jacobians": GradientShare(0.5)},
        {"labels": GradientShare(0.1), "outputs": GradientShare(0.2), "jacobians": 0.3},
        {"labels": GradientShare(0.1), "outputs": 0, "jacobians": 2.0},
    ],
)
@pytest.mark.parametrize("loss", ["squared", "relative", "normalized"])
def test_a_share_is_that_share(weights, loss):
    network = student()
    terms = Distillation(network, teacher(), jacobian_loss=loss, **weights)(**batch())
    measured = shares(terms, network)
    given = {"labels": 1.0, "outputs": 1.0, "jacobians": GradientShare(0.3), **weights}
    for name, weight in given.items():
        if isinstance(weight, GradientShare):
            assert measured[name] == pytest.approx(float(weight), rel=1e-6)
        elif weight:
            assert torch.equal(terms[name], weight * terms.unweighted[name])
    assert terms.shares.keys() == measured.keys()
    for name, share in terms.shares.items():
        assert share == pytest.approx(measured[name], rel=1e-6)
    assert sum(terms.shares.values()) == pytest.approx(1)


def test_shares_of_nothing_but_shares():
    network = student()
    terms = Distillation(network, teacher(), labels=0, outputs=GradientShare(0.2), jacobians=GradientShare(0.6))(
        **batch()
    )
    measured = norms(terms, network)
    assert measured["outputs"] == pytest.approx(0.2, rel=1e-6)
    assert measured["jacobians"] == pytest.approx(0.6, rel=1e-6)


def test_a_term_without_a_gradient_leaves_the_other_shares_alone():
    """The outputs are equal, since the student is the teacher's copy; its Jacobian at noise is compared with itself."""
    network, given = student(), batch()
    balance = LossWeights({"labels": 1.0, "outputs": GradientShare(0.4), "jacobians": GradientShare(0.3)})
    outputs = network(given["x"])
    terms = {"labels": outputs.square().sum(), "outputs": (outputs - outputs).sum(), "jacobians": outputs.sum()}
    balance.measure(terms, list(network.parameters()))
    assert balance.shares["jacobians"] == pytest.approx(0.3)
    assert balance.shares["outputs"] == 0
    assert balance.unmeasured == {"outputs"}
    assert balance.weigh(terms).keys() == {"labels", "jacobians"}


def test_a_student_whose_units_are_all_off_goes_on():
    network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 5)).double()
    torch.nn.init.constant_(network[0].bias, -100.0)
    x, y = torch.rand(8, 6, dtype=torch.float64), torch.arange(8) % 5
    other = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)).double()
    terms = Distillation(network, other, jacobians=GradientShare(0.3))(x, y)
    assert terms.unweighted["jacobians"] > 0
    assert terms.shares["jacobians"] == 0
    assert "jacobians" not in terms
    terms["loss"].backward()
    assert network[2].bias.grad.abs().sum() > 0


def test_shares_are_measured_again_and_constant_in_between():
    network, given = student(), batch()
    objective = Distillation(network, teacher(), probe=EveryRow(), measure_every=3)
    first = objective(**given)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3)
    factor = float(first["jacobians"].detach() / first.unweighted["jacobians"].detach())
    for _ in range(2):
        terms = objective(**given)
        assert terms.shares == first.shares
        assert float(terms["jacobians"].detach()) == pytest.approx(
            factor * float(terms.unweighted["jacobians"].detach())
        )
        assert shares(terms, network)["jacobians"] != pytest.approx(0.3, rel=0.01)
    again = objective(**given)
    assert again.shares["labels"] != first.shares["labels"]
    assert shares(again, network)["jacobians"] == pytest.approx(0.3, rel=1e-6)
    evaluated = objective.eval()(**given)
    assert evaluated.shares == again.shares


def test_every_third_step_has_three_times_the_weight():
    network, given = student(), batch()
    parameters = list(network.parameters())
    direction = direction_of(parameters)
    settings = {"labels": 0.3, "outputs": 0.2, "jacobians": 0.5, "probe": EveryRow()}
    always = Distillation(network, teacher(), **settings)
    sometimes = Distillation(network, teacher(), every=3, **settings)
    wanted = along(always(**given)["loss"], parameters, direction)
    gradients = []
    for call in range(6):
        terms = sometimes(**given)
        assert ("jacobians" in terms) == (call % 3 == 0)
        gradients.append(along(terms["loss"], parameters, direction))
    assert gradients[0] == gradients[3] != gradients[1] == gradients[2]
    assert sum(gradients) / 6 == pytest.approx(wanted, rel=1e-12)
    sometimes.calls = 1
    assert "jacobians" in sometimes.eval()(**given)
    assert along(sometimes(**given)["loss"], parameters, direction) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("every", "measure_every", "measured"), [(3, 4, [0, 6]), (4, 3, [0, 4, 8]), (1, 5, [0, 5])])
def test_shares_are_measured_when_all_terms_are_there(every, measure_every, measured):
    network, given = student(), batch()
    objective = Distillation(network, teacher(), jacobians=GradientShare(0.3), every=every, measure_every=measure_every)
    factors, changed = None, []
    for call in range(9):
        terms = objective(**given)
        if objective.loss_weights.factors != factors:
            changed.append(call)
            factors = dict(objective.loss_weights.factors)
        assert set(terms.shares) == {"labels", "outputs", "jacobians"}
        if call % every == 0 and changed[-1] == call:
            assert shares(terms, network)["jacobians"] == pytest.approx(0.3, rel=1e-6)
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.1)
    assert changed == measured


@pytest.mark.parametrize("schedule", [WeightSchedule(samples_per_class=300), WeightSchedule(fades_from=0.5)])
def test_a_schedule_lessens_the_weight_and_the_share_says_so(schedule):
    network, given, progress = student(), batch(), 0.75
    objective = Distillation(network, teacher(), schedule=schedule)
    terms = objective(**given, progress=progress)
    factor = schedule(progress)
    assert 0 < factor < 1
    assert terms.shares["jacobians"] == pytest.approx(shares(terms, network)["jacobians"], rel=1e-6)
    assert terms.shares["jacobians"] == pytest.approx(0.3 * factor / (0.7 + 0.3 * factor), rel=1e-6)
    plain = Distillation(network, teacher(), jacobians=0.4, schedule=schedule)(**given, progress=progress)
    torch.testing.assert_close(plain["jacobians"], 0.4 * factor * plain.unweighted["jacobians"])


def test_a_schedule_that_has_ended_needs_no_derivatives():
    objective = Distillation(student(), teacher(), schedule=WeightSchedule(fades_from=0.5))
    assert "jacobians" not in objective(**batch(), progress=1.0)


@pytest.mark.parametrize("count", [1, 5, 50, 300, 500, 5000])
def test_the_schedule_by_data_size(count):
    assert WeightSchedule(samples_per_class=count)(0.9) == pytest.approx(1 / (1 + (count / 300) ** 4))
    assert WeightSchedule(samples_per_class=count, halves_at=count)(0.0) == 0.5
    assert WeightSchedule(samples_per_class=count)(0.0) > WeightSchedule(samples_per_class=count + 1)(0.0)


def test_the_schedule_by_progress():
    schedule = WeightSchedule(fades_from=0.4)
    assert [schedule(p) for p in (0.0, 0.2, 0.4)] == [1.0, 1.0, 1.0]
    assert schedule(0.7) == pytest.approx(0.5)
    assert schedule(0.4 + 0.6 / 3) == pytest.approx(0.75)
    assert schedule(1.0) == pytest.approx(0.0, abs=1e-12)
    assert schedule(1.2) == pytest.approx(0.0, abs=1e-12)
    values = [schedule(step / 100) for step in range(101)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert {WeightSchedule()(p) for p in (0.0, 0.5, 1.0)} == {1.0}
    assert WeightSchedule(samples_per_class=300, fades_from=0.0)(0.5) == pytest.approx(0.25)


def test_a_run_goes_on_where_it_stopped():
    def fresh():
        network = student()
        settings = {"probe": FisherRows(2), "point": AtNoise(0.1), "every": 2, "measure_every": 3, "seed": 11}
        return Distillation(network, teacher(), **settings), torch.optim.SGD(network.parameters(), lr=0.05)

    def steps(objective, optimizer, numbers):
        losses = []
        for number in numbers:
            optimizer.zero_grad()
            terms = objective(**batch(seed=number))
            terms["loss"].backward()
            optimizer.step()
            losses.append((float(terms["loss"].detach()), terms.shares))
        return losses

    whole = steps(*fresh(), range(8))
    objective, optimizer = fresh()
    before = steps(objective, optimizer, range(5))
    state = copy.deepcopy(objective.state_dict())
    resumed, optimizer = fresh()
    resumed.load_state_dict(state)
    assert torch.equal(resumed.get_extra_state(), objective.get_extra_state())
    assert before + steps(resumed, optimizer, range(5, 8)) == whole


def test_a_state_is_a_snapshot(tmp_path):
    objective = Distillation(student(), teacher(), jacobians=GradientShare(0.3), measure_every=1)
    objective(**batch())
    state = objective.state_dict()
    seen = copy.deepcopy(state["_extra_state"])
    with torch.no_grad():
        objective.student[1].weight.mul_(2)
    objective(**batch())
    assert torch.equal(state["_extra_state"], seen)
    assert not torch.equal(objective.get_extra_state(), seen)
    torch.save(state, tmp_path / "state.pt")
    other = Distillation(student(), teacher(), jacobians=GradientShare(0.3), measure_every=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.get_extra_state(), seen)
    assert other.calls == 1


def test_a_share_survives_copies():
    for copied in (copy.deepcopy(GradientShare(0.3)), pickle.loads(pickle.dumps(GradientShare(0.3)))):
        assert isinstance(copied, GradientShare)
        assert copied == 0.3


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, math.nan])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(InputError, match=r"A `GradientShare` must be at least 0 and below 1\. Got"):
        GradientShare(share)


@pytest.mark.ci
def test_the_mean_gradient_of_a_random_probe_is_that_of_all_rows():
    """Along the exact gradient, within five standard errors of the mean."""
    network, given = student(), batch()
    parameters = list(network.parameters())
    settings = {"labels": 0, "outputs": 0, "jacobians": 1.0, "jacobian_loss": "squared"}
    loss = Distillation(network, teacher(), probe=EveryRow(), **settings)(**given)["loss"]
    direction = list(torch.autograd.grad(loss, parameters[:-1], retain_graph=True))
    exact = along(loss, parameters[:-1], direction)
    copies = {name: tensor.repeat(700, *[1] * (tensor.dim() - 1)) for name, tensor in given.items()}
    copies["ids"] = torch.arange(2100)
    for probe in (None, RandomInputs(1)):
        estimates = []
        for seed in range(10):
            objective = Distillation(network, teacher(), probe=probe, seed=seed, **settings).eval()
            estimates.append(along(objective(**copies)["loss"], parameters[:-1], direction))
        mean = sum(estimates) / 10
        error = math.sqrt(sum((one - mean) ** 2 for one in estimates) / 90)
        assert abs(mean - exact) < 5 * error
        assert error < 0.02 * exact, "or the interval says nothing"
