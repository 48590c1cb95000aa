"""`Robustness` in training: noise on the input, weights and shares, what a resumed run needs, and what is refused."""

import math

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import DataPairs, EveryRow, FisherRows, LabelClass, TopClass, probes
from jacmatch.objectives import GradientShare, Robustness
from jacmatch.objectives.weights import LossWeights

from .cases import OUTPUTS, batch, perceptron, student


class Seen(nn.Module):
    """Keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.inner, self.inputs = student(), []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.inner(x)


def seen(count=1, noise=0.5, rows=None, evaluation=False, **settings):
    network, given = Seen(), batch(5)
    objective = Robustness(network, penalty=0.0, noise=noise, **settings).train(not evaluation)
    rows = range(5) if rows is None else rows
    for _ in range(count):
        objective(given["x"][list(rows)], given["y"][list(rows)], ids=given["ids"][list(rows)])
    return [moved - given["x"][list(rows)] for moved in network.inputs]


def test_noise_is_a_function_of_seed_id_and_call():
    first, second = seen(2, seed=1)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(seen(2, seed=1), [first, second])
    assert not torch.allclose(seen(1, seed=2)[0], first)
    torch.testing.assert_close(seen(1, rows=[3, 1], seed=1)[0], first[[3, 1]])


def test_noise_has_its_standard_deviation_in_units_of_the_scale():
    """20 draws of 15 numbers in each channel; four standard errors of a standard deviation are 16 %."""
    noise = torch.stack(seen(20, noise=0.5, scale=(0.5, 2.0)))
    assert noise[:, :, 0].std() == pytest.approx(0.25, rel=0.16)
    assert noise[:, :, 1].std() == pytest.approx(1.0, rel=0.16)


def test_there_is_no_noise_in_evaluation():
    assert not seen(noise=0.5, evaluation=True)[0].any()
    assert not seen(noise=0.0)[0].any()


def test_noise_and_penalty_are_taken_at_the_same_point():
    network, given = student(), batch()
    objective = Robustness(network, penalty=0.3, form="squared-norm", probe=EveryRow(), noise=0.5, seed=1)
    value = objective(given["x"], given["y"], ids=given["ids"]).unweighted["penalty"]
    there = Robustness(network, penalty=0.3, form="squared-norm", probe=EveryRow()).eval()
    moved = given["x"] + seen_noise(given)
    torch.testing.assert_close(value, there(moved, given["y"]).unweighted["penalty"])


def seen_noise(given):
    network = Seen()
    Robustness(network, penalty=0.0, noise=0.5, seed=1)(given["x"], given["y"], ids=given["ids"])
    return network.inputs[0] - given["x"]


# Conventions ------------------------------------------------------------------------------------------------------


def test_weight_0_differentiates_nothing(monkeypatch):
    monkeypatch.setattr("jacmatch.objectives.robustness.vjp_products", None)
    network, given = student(), batch()
    terms = Robustness(network, penalty=0)(given["x"], given["y"])
    assert terms.keys() == ["loss", "labels"]
    torch.testing.assert_close(terms["loss"], nn.functional.cross_entropy(network(given["x"]), given["y"]))


def test_every_second_call_with_twice_the_weight():
    network, given = student(), batch()
    objective = Robustness(network, penalty=0.3, probe=EveryRow(), every=2)
    first, second = (objective(given["x"], given["y"]) for _ in range(2))
    torch.testing.assert_close(first["penalty"], 0.6 * first.unweighted["penalty"])
    assert second.keys() == ["loss", "labels"]
    torch.testing.assert_close(objective.eval()(given["x"], given["y"])["penalty"], first["penalty"] / 2)


def test_a_share_is_a_share_of_the_gradient():
    network, given = student(), batch()
    terms = Robustness(network, penalty=GradientShare(0.3), probe=EveryRow())(given["x"], given["y"])
    norms = {}
    for name in ("labels", "penalty"):
        gradients = torch.autograd.grad(terms[name], list(network.parameters()), retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    assert norms["penalty"] / sum(norms.values()) == pytest.approx(0.3)
    assert terms.shares["penalty"] == pytest.approx(0.3)


def test_parameters_and_state_are_the_students():
    network = student()
    objective = Robustness(network, scale=(0.5, 2.0))
    assert [id(p) for p in objective.parameters()] == [id(p) for p in network.parameters()]
    names = {name for name in objective.state_dict() if name != "_extra_state"}
    assert names == {f"student.{name}" for name in network.state_dict()}
    assert not objective.needs_partners


def test_the_state_brings_the_same_directions_and_noise():
    given = batch()

    def losses_of(objective, count):
        return [float(objective(given["x"], given["y"], ids=given["ids"])["loss"].detach()) for _ in range(count)]

    straight = losses_of(Robustness(student(), noise=0.2), 5)
    first, second = Robustness(student(), noise=0.2), Robustness(perceptron(5, seed=8), noise=0.2)
    assert losses_of(first, 3) == straight[:3]
    second.load_state_dict(first.state_dict())
    assert losses_of(second, 2) == straight[3:]
    assert len(set(straight)) == 5


def test_samples_stay_apart():
    network, given = student(), batch(5)
    objective = Robustness(network, seed=4).eval()
    whole = objective(given["x"], given["y"], ids=given["ids"])["loss"]
    single = [objective(*(given[name][[n]] for name in "xy"), ids=given["ids"][[n]])["loss"] for n in range(5)]
    torch.testing.assert_close(torch.stack(single).mean(), whole)


def test_batch_norm_counts_a_batch_once():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, OUTPUTS)).double()
    given = batch()
    Robustness(network)(given["x"], given["y"])["loss"].backward()
    assert int(network[1].num_batches_tracked) == 1


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": -1.0}, r"The weight of `penalty` must be at least 0 and finite\. Got -1\.0"),
        ({"form": "hofman"}, r"`form` of `Robustness` must be a known name\. Got 'hofman'\. Nearest: hoffman"),
        ({"task": "ranking"}, r"`task` of `Robustness` .* Known: classification, regression"),
        ({"batch_norm": "freeze"}, r"`batch_norm` of `Robustness` .* Known: batch, frozen"),
        ({"every": 0}, r"`every` of `Robustness` must be an integer of at least 1\. Got 0"),
        ({"measure_every": 1.5}, r"`measure_every` of `Robustness` must be an integer .* Got 1\.5"),
        ({"noise": -0.1}, r"`noise` of `Robustness` must be at least 0 and finite\. Got -0\.1"),
        ({"noise": math.nan}, r"`noise` of `Robustness` must be at least 0 and finite\. Got nan"),
        ({"scale": 0.0}, r"`scale` of `Robustness` must be positive and finite\. Got 0\.0"),
        ({"scale": (1.0, -1.0)}, r"`scale` of `Robustness` must be positive and finite\. Got \(1\.0, -1\.0\)"),
        ({"scale": ()}, r"`scale` of `Robustness` must be positive and finite\. Got \(\)"),
        ({"probe": "every-row"}, r"`probe` of `Robustness` must be an object such as .* Got 'every-row'"),
        ({"probe": EveryRow}, r"`probe` of `Robustness` must be an object such as .* Got the class EveryRow"),
        ({"probe": FisherRows()}, r"must estimate the norm of all rows\. Got FisherRows\. Use RandomOutputs"),
        ({"probe": DataPairs()}, r"must estimate the norm of all rows\. Got DataPairs"),
        (
            {"probe": TopClass(), "form": "piecewise-linear-cross-entropy"},
            r"`probe` of `Robustness\(form='piecewise-linear-cross-entropy'\)` must .* Got TopClass",
        ),
        (
            {"task": "regression", "form": "paper-label-cross-entropy"},
            r"`Robustness\(task='regression'\)` must not .* Got paper-label-cross-entropy\. Use form='squared-norm'",
        ),
        ({"task": "regression", "probe": LabelClass()}, r"must not have settings for classes\. Got LabelClass"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Robustness(student(), **settings)


@pytest.mark.usefixtures("as_users_run")
def test_batches_are_refused():
    network, given = student(), batch()
    objective = Robustness(network)
    with pytest.raises(InputError, match=r"`y` of `Robustness` must have one entry for each of the 3 samples"):
        objective(given["x"], given["y"][:2])
    with pytest.raises(InputError, match=r"`ids` of `Robustness` must have one entry for each of the 3 samples"):
        objective(given["x"], given["y"], ids=given["ids"][:1])
    with pytest.raises(InputError, match=r"one for each of the 2 channels\. Got 3 numbers"):
        Robustness(network, scale=(1.0, 2.0, 3.0))(given["x"], given["y"])
    soft = torch.full((3, OUTPUTS), 0.25, dtype=torch.float64)
    with pytest.raises(InputError, match=r"must be class indices\. Got torch\.float64"):
        Robustness(network, form="paper-label-cross-entropy")(given["x"], soft)


def test_soft_labels_go_with_the_other_forms():
    network, given = student(), batch()
    soft = probes.uniform(0, given["ids"], 0, OUTPUTS).double().softmax(1)
    for form in ("hoffman", "squared-norm", "piecewise-linear-cross-entropy"):
        loss = Robustness(network, form=form)(given["x"], soft)["labels"]
        torch.testing.assert_close(loss, nn.functional.cross_entropy(network(given["x"]), soft))


def test_a_student_that_is_cut_off_is_refused():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = student()

        def forward(self, x):
            return self.inner(x.detach())

    with pytest.raises(UnsupportedError, match="depend on `x`"):
        Robustness(Detached())(batch()["x"], batch()["y"])


@pytest.mark.parametrize("margin", [10, 28, 50, 100])
def test_a_student_that_is_sure_trains_on(margin):
    """The squared gradient of the loss falls below what the square of a float32 can hold, and then to 0."""
    network = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(margin / 2 * torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    objective = Robustness(network, form="paper-label-cross-entropy")
    terms = objective(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1]))
    size = (margin * math.exp(-margin)) ** 2  # less a factor of up to 4: in float32 the larger probability is 1
    assert float(terms.unweighted["penalty"].detach()) == pytest.approx(0.6 * size, rel=0.7, abs=1e-37)
    assert (terms.shares["penalty"] > 0) == (margin < 60)


@pytest.mark.parametrize("value", [1e-25, 1.0])
def test_a_term_without_a_gradient_is_refused(value):
    weight = nn.Parameter(torch.ones(1))
    balance = LossWeights({"labels": 1.0, "penalty": 1.0})
    with pytest.raises(UnsupportedError, match=r"The term `penalty` has no gradient"):
        balance.measure({"labels": weight.sum(), "penalty": torch.tensor(value)}, [weight])
    balance.measure({"labels": weight.sum(), "penalty": torch.tensor(1e-33)}, [weight])
    assert balance.shares == {"labels": 1.0, "penalty": 0.0}
