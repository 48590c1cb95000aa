"""State changes only after a successful call with gradients, and a share is what it says from the first call on."""

import math

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.objectives import Distillation, GradientShare, Regression, Robustness, Transfer

CLASSES = 3


def network(outputs=CLASSES, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(16, outputs)).double()


class Fails(nn.Module):
    """A network that raises, or returns NaN, as `mode` says."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.mode = inner, ""

    def forward(self, x):
        if self.mode == "raises":
            raise ValueError("a layer failed")
        return self.inner(x) * (math.nan if self.mode == "nan" else 1.0)


OBJECTIVES = {
    "distillation": lambda s, **more: Distillation(s, network(seed=1), jacobians=GradientShare(0.3), **more),
    "regression": lambda s, **more: Regression(s, network(seed=1), jacobians=GradientShare(0.3), **more),
    "robustness": lambda s, **more: Robustness(s, penalty=GradientShare(0.3), **more),
    "transfer": lambda s, **more: Transfer(
        s, network(5, seed=1), classes=CLASSES, pairs=[("inner.0", "0")], jacobians=GradientShare(0.3), **more
    ),
}


def made(kind, **more):
    outputs = CLASSES + 5 if kind == "transfer" else CLASSES
    student = Fails(network(outputs))
    return OBJECTIVES[kind](student, **more), student


def batch(kind, count=6):
    x = torch.rand(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, (torch.sin(x.flatten(1)[:, :CLASSES]) if kind == "regression" else torch.arange(count) % CLASSES)


def share_of(objective, terms):
    """The share of the derivative term in the gradient norm, by autograd here."""
    parameters = list(objective.student.parameters())
    norms = {}
    for name, term in terms.items():
        if name != "loss":
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norms[name] = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    return norms[objective.derivative_term] / sum(norms.values())


def fail(how, objective, student, x, y):
    if how == "no gradients":
        with torch.no_grad():
            return objective(x, y)
    if how == "nan":
        student.mode = "nan"
        assert objective(x, y).loss.isnan()
    elif how == "raises":
        student.mode = "raises"
        with pytest.raises(ValueError, match="a layer failed"):
            objective(x, y)
    else:
        with pytest.raises(InputError):
            objective(x, y[:-1])
    student.mode = ""
    return None


@pytest.mark.parametrize("how", ["no gradients", "raises", "labels", "nan"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_call_that_does_not_succeed_leaves_no_trace(as_users_run, kind, how):
    (objective, student), (untouched, _) = made(kind), made(kind)
    x, y = batch(kind)
    before = objective.get_extra_state()
    for _ in range(3):
        fail(how, objective, student, x, y)
    assert torch.equal(objective.get_extra_state(), before)
    terms, wanted = objective(x, y), untouched(x, y)
    assert share_of(objective, terms) == pytest.approx(0.3, rel=1e-6)
    for name, term in wanted.items():
        assert torch.equal(terms[name], term), name
    assert objective.calls == 1


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_share_is_that_of_each_call_that_has_the_term(kind):
    """Also with `every`, where a plain weight is multiplied by it; what is reported is what there is."""
    objective, _ = made(kind, every=4, measure_every=4)
    x, y = batch(kind)
    name = objective.derivative_term
    for call in range(5):
        terms = objective(x, y)
        assert (name in terms) == (call % 4 == 0)
        if name in terms:
            assert share_of(objective, terms) == pytest.approx(0.3, rel=1e-6)
            assert terms.shares[name] == pytest.approx(0.3, rel=1e-6)


def test_reported_shares_of_a_plain_weight_are_those_of_the_call():
    objective = Robustness(network(), penalty=0.5, every=4)
    terms = objective(*batch("robustness"))
    assert terms.shares["penalty"] == pytest.approx(share_of(objective, terms), rel=1e-6)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_share_that_was_never_measured_is_no_weight(kind):
    objective, _ = made(kind)
    x, y = batch(kind)
    name = objective.derivative_term
    with torch.no_grad():
        terms = objective.eval()(x, y)
    assert name not in terms
    assert name in terms.unweighted
    torch.testing.assert_close(terms.loss, sum(term for each, term in terms.items() if each != "loss"))
    with pytest.raises(
        KeyError, match=f"no term '{name}' in this call, .*; it is not part of the loss until its share is measured"
    ):
        terms[name]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_evaluation_with_gradients_has_the_share_too(kind):
    objective, _ = made(kind)
    assert share_of(objective, objective.eval()(*batch(kind))) == pytest.approx(0.3, rel=1e-6)
    assert objective.calls == 0


def test_a_failed_measurement_is_repeated_at_the_next_call():
    objective, student = made("distillation", measure_every=3)
    x, y = batch("distillation")
    for _ in range(3):
        objective(x, y)
    with torch.no_grad():
        student.inner[3].weight.mul_(4)
    fail("nan", objective, student, x, y)
    assert share_of(objective, objective(x, y)) == pytest.approx(0.3, rel=1e-6)


def test_states_of_earlier_versions_are_loaded():
    objective, _ = made("distillation")
    old = {"calls": 7, "factors": {"labels": 1.0, "outputs": 1.0, "jacobians": 0.2}, "shares": {}}
    objective.set_extra_state(old)  # version 0.1: a factor of 1 before it was measured, or what a failed call left
    assert objective.loss_weights.unmeasured == {"jacobians"}
    objective.set_extra_state({**old, "shares": {"labels": 0.5, "outputs": 0.2, "jacobians": 0.3}})
    assert objective.loss_weights.factors["jacobians"] == 0.2
    assert (objective.calls, objective.measured_at) == (7, 0)


def test_terms_are_a_mapping_with_a_short_description():
    objective, _ = made("distillation")
    terms = objective(*batch("distillation"))
    assert dict(terms.items()) == terms.values
    assert terms.loss is terms["loss"]
    assert [name for name, _ in terms.items()] == terms.keys() == ["loss", "labels", "outputs", "jacobians"]
    numbers = [f"{name}={float(term.detach()):.4g}" for name, term in terms.items()]
    assert repr(terms) == f"Terms({', '.join(numbers)})"


def test_a_state_that_is_set_in_unmeasured_calls_measures_nothing():
    """The pre-flight check does, to compile a step; measured, it would not be compiled."""
    objective = Distillation(nn.Linear(3, 2), nn.Linear(3, 2), jacobians=GradientShare(0.3))
    with objective.unmeasured_calls():
        objective.set_extra_state(objective.get_extra_state())
        terms = objective(torch.rand(4, 3), torch.arange(4) % 2)
        assert "jacobians" in terms
        assert objective.loss_weights.shares == {"jacobians": 0.0}
    assert objective.loss_weights.unmeasured == {"jacobians"}
    assert not objective.loss_weights.shares
