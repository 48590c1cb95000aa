"""What all objectives share: engine, settings of the derivatives, and a state that any format can store."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import jacmatch
from jacmatch import objectives
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import AntitheticNoise, DataPairs, EveryRow, RandomInputs, RandomOutputs
from jacmatch.objectives import Distillation, GradientShare, Regression, Robustness, Transfer

CLASSES = 3


def network(outputs=CLASSES, seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.Softplus(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, outputs)).double()


OBJECTIVES = {
    "distillation": lambda s, **more: Distillation(s, network(seed=1), **{"jacobians": 0.7, **more}),
    "regression": lambda s, **more: Regression(s, network(seed=1), **{"jacobians": 0.7, **more}),
    "robustness": lambda s, **more: Robustness(s, **{"penalty": 0.7, **more}),
}


def transfer(student, **more):
    pairs = [("0", "0"), ("1", "1")]
    return Transfer(
        student, network(5, seed=1), classes=CLASSES, pairs=pairs, **{"attention": 0.4, "jacobians": 0.7, **more}
    )


def made(kind, norm=False, **more):
    if kind == "transfer":
        return transfer(network(CLASSES + 5, norm=norm), **more)
    return OBJECTIVES[kind](network(norm=norm), **more)


def batch(kind, count=6):
    x = torch.rand(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, (torch.sin(x.flatten(1)[:, :CLASSES]) if kind == "regression" else torch.arange(count) % CLASSES)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ({"probe": RandomOutputs(1)}, "reverse"),
        ({"probe": EveryRow(), "engine": "reverse"}, "reverse"),
        ({"probe": RandomInputs(1)}, "auto"),
        ({"probe": RandomInputs(1), "engine": "forward"}, "forward"),
        ({"probe": RandomInputs(1), "engine": "differences"}, "differences"),
        ({"probe": AntitheticNoise(sigma=0.1)}, "differences"),
    ],
)
def test_an_objective_says_which_engine_takes_its_derivatives(kind, settings, engine):
    assert made(kind, **settings).resolved_engine() == engine


@pytest.mark.parametrize("kind", [*OBJECTIVES, "transfer"])
def test_no_engine_where_no_derivative_is_taken(kind):
    weight = {"penalty": 0} if kind == "robustness" else {"jacobians": 0, "attention": 0} if kind == "transfer" else {}
    assert made(kind).resolved_engine() in ("reverse", "auto")
    assert made(kind, **(weight or {"jacobians": 0})).resolved_engine() is None


@pytest.mark.parametrize("engine", ["forward", "reverse", "differences"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_engine_gives_the_same_term(kind, engine):
    x, y = batch(kind)
    expected, result = (made(kind, probe=RandomInputs(2), **more)(x, y, draw=1) for more in ({}, {"engine": engine}))
    name = made(kind).derivative_term
    torch.testing.assert_close(result[name], expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [*OBJECTIVES, "transfer"])
def test_rows_in_chunks_give_the_same_gradient(kind):
    gradients = []
    for size in (None, 1, 2):
        more = {} if kind == "transfer" else {"probe": RandomOutputs(3)}
        objective = made(kind, chunk_size=size, **more)
        objective(*batch(kind), draw=1)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", [*OBJECTIVES, "transfer"])
def test_a_fraction_takes_the_derivatives_of_the_first_samples(kind, norm):
    """All else is that of the whole batch, running statistics are counted once, and the loss has a gradient."""
    x, y = batch(kind)
    plain, some = made(kind, norm), made(kind, norm, fraction=0.5)
    name = plain.derivative_term
    whole, terms = plain(x, y, draw=1), some(x, y, draw=1)
    for other in set(whole.keys()) - {"loss", name}:
        torch.testing.assert_close(terms[other], whole[other])
    for (at, one), (_, other) in zip(some.student.named_buffers(), plain.student.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=at)
    if not norm:
        torch.testing.assert_close(terms[name], made(kind)(x[:3], y[:3], draw=1)[name])
    terms.loss.backward()
    assert some.student.get_parameter("network.0.weight" if kind == "transfer" else "0.weight").grad.abs().max() > 0


@pytest.mark.parametrize("kind", [*OBJECTIVES, "transfer"])
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engine": "fast"}, r"`engine` of `{}`.*fast"),
        ({"engine": "forward"}, r"`engine` of `{}.*must be 'auto' or 'reverse'\. Got 'forward'\. (Other|It compares)"),
        ({"chunk_size": 0}, r"`chunk_size` of `{}` must be an integer of at least 1, or None\. Got 0"),
        ({"fraction": 2.0}, r"`fraction` of `{}` must be above 0 and at most 1\. Got 2\.0"),
        ({"batch_norm": "off"}, r"`batch_norm` of `{}` must be a known name\. Got 'off'"),
    ],
)
def test_settings_name_their_objective(as_users_run, kind, settings, match):
    with pytest.raises(InputError, match=match.format(kind.title())):
        made(kind, **settings)


def test_partners_are_needed_by_directions_between_data():
    assert made("distillation", probe=DataPairs()).needs_partners
    assert not made("transfer").needs_partners


@pytest.mark.parametrize("kind", [*OBJECTIVES, "transfer"])
def test_a_state_is_a_tensor_that_safetensors_stores(kind, tmp_path):
    weight = {"penalty": GradientShare(0.3)} if kind == "robustness" else {"jacobians": GradientShare(0.3)}
    objective = made(kind, **weight)
    objective(*batch(kind))
    save_file(objective.state_dict(), tmp_path / "model.safetensors")
    other = made(kind, **weight)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other.loss_weights.factors == objective.loss_weights.factors
    assert other.loss_weights.shares == objective.loss_weights.shares
    assert (other.calls, other.measured_at, other.teacher_norm) == (1, 0, objective.teacher_norm)
    fresh = made(kind, **weight)
    fresh.load_state_dict(made(kind, **weight).state_dict())
    assert (fresh.calls, fresh.measured_at, fresh.loss_weights.unmeasured) == (0, None, {objective.derivative_term})


def test_the_state_of_other_terms_is_refused():
    with pytest.raises(InputError, match=r"state of `Regression` must have 9 numbers, for 2 terms\. Got shape \(11,\)"):
        made("regression").set_extra_state(made("distillation").get_extra_state())


def test_old_names_stand_for_the_new_ones():
    for module in (jacmatch, objectives):
        with pytest.warns(DeprecationWarning, match=r"Share` is now `jacmatch.objectives.GradientShare`"):
            assert module.Share is GradientShare
    with pytest.warns(DeprecationWarning, match=r"Balance` is now `jacmatch.objectives.LossWeights`"):
        assert objectives.Balance is objectives.LossWeights
    objective = Robustness(nn.Linear(2, 2))
    with pytest.warns(DeprecationWarning, match=r"`objective.balance` is now `objective.loss_weights`"):
        assert objective.balance is objective.loss_weights
    with pytest.raises(AttributeError, match="has no attribute 'Shares'"):
        objectives.Shares  # noqa: B018


def test_an_objective_of_ones_own_is_a_short_subclass():
    """Weights, shares, state and settings come with the base class."""

    class Own(objectives.Objective):
        def __init__(self, student):
            how = objectives.Differentiation(RandomInputs(1), caller="Own")
            super().__init__(student, None, {"jacobians": 1.0}, how, every=1, measure_every=10)

        def forward(self, x, y=None):
            call = self._call(0.0)
            outputs = self.student(x)
            return self._result(call, {"jacobians": outputs.square().mean()}, outputs, None)

    objective = Own(nn.Linear(3, 2))
    assert objective(torch.rand(4, 3)).keys() == ["loss", "jacobians"]
    assert copy.deepcopy(objective).calls == 1


def gradient(objective, x, y, **about):
    objective.student.zero_grad()
    objective(x, y, draw=3, **about)["loss"].backward()
    return torch.cat([parameter.grad.flatten() for parameter in objective.student.parameters()])


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("probe", [RandomOutputs(1), RandomInputs(1)])
def test_gradients_of_each_sample_by_torch_func(kind, probe):
    (x, y), objective = batch(kind), made(kind, probe=probe)
    frozen = {name: parameter.detach() for name, parameter in objective.named_parameters()}

    def of_sample(x, y, number):
        about = {"draw": 3, "ids": number[None]}
        call = (x[None], y[None])
        return torch.func.grad(lambda q: torch.func.functional_call(objective, q, call, about)["loss"])(frozen)

    numbers = torch.arange(len(x))
    each = torch.func.vmap(of_sample)(x, y, numbers)
    for n in numbers:
        expected = gradient(objective, x[n : n + 1], y[n : n + 1], ids=numbers[n : n + 1])
        torch.testing.assert_close(torch.cat([each[name][n].flatten() for name in frozen]), expected)


def test_a_frozen_student_has_a_gradient_to_what_is_in_front_of_it():
    (x, y), front = batch("robustness"), nn.Linear(4, 4).double()
    objective = made("robustness", probe=EveryRow())
    objective.student.requires_grad_(False)
    direction = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(step=0.0):
        return objective(torch.nn.functional.linear(x, front.weight + step * direction, front.bias), y)["loss"]

    expected = float((loss(1e-6) - loss(-1e-6)).detach()) / 2e-6
    loss().backward()
    assert float((front.weight.grad * direction).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["distillation", "regression", "robustness", "transfer"])
def test_a_frozen_student_alone_is_refused(name):
    """Its loss has no gradient, and torch's message in `backward` names neither term nor reason."""
    objective = made(name)
    objective.student.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"has no gradient with respect to the student"):
        objective(*batch(name))


def test_rows_in_chunks_have_the_dropout_of_rows_at_once():
    losses = []
    for chunk_size in (None, 1):
        student = nn.Sequential(network(), nn.Dropout())
        objective = Distillation(student, network(seed=1), jacobians=0.7, probe=EveryRow(), chunk_size=chunk_size)
        torch.manual_seed(7)
        losses.append(objective(*batch("distillation"))["loss"])
    torch.testing.assert_close(*losses)
