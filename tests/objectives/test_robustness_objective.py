"""`Robustness` against its definition: every form and probe, the unit of the input, and its gradient."""

import itertools

import pytest
import torch
from numpy.polynomial import hermite_e
from torch import nn
from torch.autograd.functional import jacobian

from jacmatch import losses
from jacmatch.jacobian import (
    AntitheticNoise,
    EveryRow,
    LabelClass,
    RandomInputs,
    RandomOutputs,
    SampledRows,
    TopClass,
)
from jacmatch.objectives import Robustness, jacobian_norm_penalty
from jacmatch.objectives.robustness import FORMS

from .cases import OUTPUTS, along, batch, direction_of, directional_difference, student

SCALES = {"raw": 1.0, "one": 0.5, "channels": (0.5, 2.0)}
FACTORS = {name: factor for name, (_, factor) in FORMS.items()}


def unit(scale):
    """The scale of each element of a sample of shape (2, 3), whose first axis are the channels."""
    values = [scale] * 2 if isinstance(scale, float) else scale
    return torch.tensor(values, dtype=torch.float64)[:, None].expand(2, 3)


def logit_rows(network, x, scale=1.0):
    """J·scale of one sample, (K, 6)."""
    rows = jacobian(lambda z: network(z[None])[0], x)
    return torch.stack([row * unit(scale) for row in rows]).flatten(1)


def exact(form, network, x, label, scale=1.0):
    """The penalty of one sample by loops over its definition."""
    rows = logit_rows(network, x, scale)
    with torch.no_grad():
        z = network(x[None])[0]
    q = [float(z[i].exp() / z.exp().sum()) for i in range(OUTPUTS)]
    if form in {"hoffman", "squared-norm"}:
        return FACTORS[form] * sum(float(entry) ** 2 for row in rows for entry in row)
    mean = sum(p * row for p, row in zip(q, rows, strict=True))
    if form == "piecewise-linear-cross-entropy":
        return 0.5 * sum(p * float((row - mean).square().sum()) for p, row in zip(q, rows, strict=True))
    gradients = [p * (row - mean) for p, row in zip(q, rows, strict=True)]  # of q
    return float(gradients[label].square().sum()) / q[label] ** 2


def objective_of(network, form, **settings):
    return Robustness(network, penalty=0.3, form=form, seed=4, **settings).eval()


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("form", FORMS)
def test_every_row_gives_the_penalty_of_the_definition(form, scale):
    network, given = student(), batch()
    terms = objective_of(network, form, probe=EveryRow(), scale=scale)(given["x"], given["y"], ids=given["ids"])
    wanted = [exact(form, network, x, int(y), scale) for x, y in zip(given["x"], given["y"], strict=True)]
    assert float(terms.unweighted["penalty"].detach()) == pytest.approx(sum(wanted) / 3, rel=1e-9)
    labels = nn.functional.cross_entropy(network(given["x"]), given["y"])
    torch.testing.assert_close(terms["labels"], labels)
    torch.testing.assert_close(terms["loss"], labels + 0.3 * terms.unweighted["penalty"])
    torch.testing.assert_close(terms.student_outputs, network(given["x"]))
    assert terms.teacher_outputs is None


def test_the_forms_are_those_of_the_losses():
    """The same numbers as the functions of `losses` on the whole Jacobian, which have weights σ² in place of λ."""
    network, given = student(), batch()
    rows = torch.stack([logit_rows(network, x) for x in given["x"]])
    q = network(given["x"]).softmax(1).detach()
    mean = (q[:, :, None] * rows).sum(1, keepdim=True)
    wanted = {
        "hoffman": losses.hoffman(rows, OUTPUTS),
        "squared-norm": losses.paper_label_squared(rows, 1.0),
        "piecewise-linear-cross-entropy": losses.piecewise_linear_cross_entropy(rows, q, 1.0),
        "paper-label-cross-entropy": losses.paper_label_cross_entropy(
            q[:, :, None] * (rows - mean), q, given["y"], 1.0
        ),
    }
    for form, each in wanted.items():
        penalty = objective_of(network, form, probe=EveryRow())(given["x"], given["y"]).unweighted["penalty"]
        torch.testing.assert_close(penalty.detach(), each.mean())
    assert set(FORMS) <= set(losses.PENALTIES)


def test_the_default_is_the_function():
    network, given = student(), batch()
    terms = Robustness(network, penalty=0.3, seed=4)(given["x"], given["y"], ids=given["ids"])
    y, penalty = jacobian_norm_penalty(network, given["x"], seed=4, ids=given["ids"])
    torch.testing.assert_close(terms.unweighted["penalty"], penalty)
    torch.testing.assert_close(terms.student_outputs, y)


@pytest.mark.parametrize("scale", [1.0, (0.5, 2.0)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.ci
def test_the_mean_over_all_signs_is_the_whole_penalty(form, scale, monkeypatch):
    """Rademacher rows, every choice of signs once: the estimate has exactly the right mean."""
    network, given = student(), batch()
    rows = 1 if form == "paper-label-cross-entropy" else OUTPUTS
    penalties = []
    for signs in itertools.product((-1.0, 1.0), repeat=rows):
        v = torch.tensor(signs, dtype=torch.float64).expand(1, 3, rows)
        monkeypatch.setattr(RandomOutputs, "directions", lambda self, v=v, **_: v)
        penalties.append(
            objective_of(network, form, scale=scale)(given["x"], given["y"]).unweighted["penalty"].detach()
        )
    wanted = [exact(form, network, x, int(y), scale) for x, y in zip(given["x"], given["y"], strict=True)]
    assert float(torch.stack(penalties).mean()) == pytest.approx(sum(wanted) / 3, rel=1e-9)


def test_the_mean_over_all_directions_of_the_input(monkeypatch):
    """The same on the side of the inputs: 2⁶ signs."""
    network, given = student(), batch()
    penalties = []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        v = torch.tensor(signs, dtype=torch.float64).view(1, 1, 2, 3).expand(1, 3, 2, 3)
        monkeypatch.setattr(RandomInputs, "directions", lambda self, v=v, **_: v)
        objective = objective_of(network, "squared-norm", probe=RandomInputs(), scale=(0.5, 2.0))
        penalties.append(objective(given["x"], given["y"]).unweighted["penalty"].detach())
    wanted = [exact("squared-norm", network, x, 0, (0.5, 2.0)) for x in given["x"]]
    assert float(torch.stack(penalties).mean()) == pytest.approx(sum(wanted) / 3, rel=1e-9)


@pytest.mark.parametrize("probe", [LabelClass(), TopClass()])
def test_one_class_is_the_papers_row(probe):
    network, given = student(), batch()
    penalty = objective_of(network, "squared-norm", probe=probe)(given["x"], given["y"]).unweighted["penalty"]
    chosen = given["y"] if isinstance(probe, LabelClass) else network(given["x"]).argmax(1)
    wanted = [float(logit_rows(network, x)[c].square().sum()) for x, c in zip(given["x"], chosen, strict=True)]
    assert float(penalty.detach()) == pytest.approx(sum(wanted) / 3, rel=1e-9)


PROBES = {
    "every-row": EveryRow(),
    "random-outputs": RandomOutputs(2, "sphere"),
    "sampled-rows": SampledRows(1),
    "random-inputs": RandomInputs(2),
    "antithetic-noise": AntitheticNoise(2, sigma=0.1),
}


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.ci
def test_the_gradient_equals_differences(form, probe):
    network, given = student(), batch()
    parameters = list(network.parameters())
    direction = direction_of(parameters)

    def term(name):
        return objective_of(network, form, probe=probe, scale=(0.5, 2.0))(given["x"], given["y"], ids=given["ids"])[
            name
        ]

    for name in ("loss", "penalty"):
        derivative = along(term(name), parameters, direction)
        assert derivative == pytest.approx(
            directional_difference(lambda name=name: term(name), parameters, direction), rel=1e-6
        )
        assert abs(derivative) > 1e-4


def test_a_regression_has_squared_error():
    network, x = student(), batch()["x"]
    y = torch.randn(3, OUTPUTS, dtype=torch.float64)
    terms = Robustness(network, penalty=0.1, form="squared-norm", probe=EveryRow(), task="regression")(x, y)
    torch.testing.assert_close(terms["labels"], (network(x) - y).square().sum(1).mean())
    wanted = sum(exact("squared-norm", network, each, 0) for each in x) / 3
    assert float(terms.unweighted["penalty"].detach()) == pytest.approx(wanted, rel=1e-9)


def test_what_the_penalty_stands_for():
    """Noise of standard deviation σ adds σ² · penalty to the cross-entropy, for linear logits and up to O(σ⁴)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, OUTPUTS)).double()
    given = batch()
    form = "piecewise-linear-cross-entropy"
    objective = objective_of(network, form, probe=EveryRow())
    penalty = float(objective(given["x"], given["y"]).unweighted["penalty"].detach())
    points, weights = (torch.tensor(each) for each in hermite_e.hermegauss(7))
    weights = weights / weights.sum()
    basis = torch.linalg.qr(network[1].weight.detach().T)[0]  # the logits move in these four directions only
    differences = {}
    with torch.no_grad():
        clean = float(nn.functional.cross_entropy(network(given["x"]), given["y"]))
        for sigma in (0.1, 0.05):
            total = 0.0
            for index in map(list, itertools.product(range(7), repeat=OUTPUTS)):
                moved = given["x"] + sigma * (basis @ points[index]).view(2, 3)
                total += float(weights[index].prod() * nn.functional.cross_entropy(network(moved), given["y"]))
            differences[sigma] = (total - clean) / sigma**2 - penalty
    assert abs(differences[0.05]) < 1e-2 * penalty
    assert differences[0.1] / differences[0.05] == pytest.approx(4, rel=0.1)
