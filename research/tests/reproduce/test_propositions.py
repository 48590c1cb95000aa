"""Which statement about noise and Jacobians holds to which order: orders, coefficients, and wrong forms that fail."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.func import grad, hessian, jacrev

from jacmatch import losses
from jacmatch.errors import InputError
from jacmatch_research.reproduce import EXPERIMENTS, noise_statements, propositions
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.experiment import Cell
from jacmatch_research.reproduce.noise_statements import (
    Setting,
    expansion_error,
    leading,
    limit,
    order_of,
    size_of_term,
)
from jacmatch_research.reproduce.propositions import STATEMENTS
from jacmatch_research.reproduce.shallow_pairs import (
    AVERAGE,
    INSIDE,
    LINEAR,
    ON_A_KINK,
    SMOOTH,
    Nodes,
    hermite,
    kinked,
    location,
)

SIGMAS = (0.02, 0.01, 0.005)
EXACT = None
SQUARED = ("proposition 1", "proposition 1, where S = T", "centered variance", "antithetic pair")

ORDERS = {  # on smooth networks, on linear ones, inside a region of ReLU networks, on a kink
    "proposition 1": (2, EXACT, EXACT, 1),
    "proposition 1, where S = T": (4, EXACT, EXACT, 2),
    "centered variance": (4, EXACT, EXACT, 2),
    "antithetic pair": (4, EXACT, EXACT, EXACT),
    "equation 2": (2, 2, 2, 1),
    "equation 2 + the lost square": (2, 2, 2, 1),
    "equation 2, whole second order": (4, 4, 4, 1),
    "KL, ½ Fisher": (2, 2, 2, 1),
    "KL, ½ Fisher, where q = p": (4, 4, 4, 2),
    "proposition 2": (2, EXACT, EXACT, 1),
    "equation 3": (2, 2, 2, 1),
    "equation 3 with ½": (2, 2, 2, 1),
    "equation 3, whole second order": (4, 4, 4, 1),
    "closed form": (2, 4, 4, 1),
}


QUICK = ("equation 3 with ½", "closed form")
"""CI runs the others, too."""


def measured(row, column, seed=0, sigmas=SIGMAS):
    cell = Cell(row, column, seed, {"sigmas": sigmas})
    return EXPERIMENTS["propositions"].measure(Reproduce(name="propositions"), cell, {})


def test_every_statement_is_tested():
    assert list(ORDERS) == list(STATEMENTS)


@pytest.mark.parametrize("row", [pytest.param(row, marks=[] if row in QUICK else pytest.mark.ci) for row in ORDERS])
def test_order_and_coefficient(row):
    for column, order in zip((SMOOTH, LINEAR, INSIDE, ON_A_KINK), ORDERS[row], strict=True):
        got = measured(row, column, seed=1)
        assert got["order"] == order, column
        if order is EXACT:
            assert got["slope"] is None, column
            continue
        tolerance = {1: 0.25, 2: 0.1, 4: 0.2}[order]
        assert got["slope"] == pytest.approx(order, abs=tolerance), column
        assert got["coefficient"] == pytest.approx(got["expected"], rel=2e-2), column
        assert got["error"] < 1e-4 * abs(got["coefficient"]) * SIGMAS[-1] ** order


@pytest.mark.parametrize(
    ("row", "order"), [*zip(SQUARED, (2, 3, 3, 3), strict=True), ("KL, ½ Fisher, where q = p", 3), ("closed form", 2)]
)
@pytest.mark.ci
def test_kinks_within_reach_on_average(as_users_run, row, order):
    got = measured(row, AVERAGE, sigmas=(0.01, 0.005))
    assert got["order"] == order
    assert got["slope"] == pytest.approx(order, abs=0.25)
    assert got["coefficient"] == pytest.approx(got["expected"], rel=3e-2)


def errors_of(statement, at):
    return [expansion_error(statement, at, sigma) for sigma in SIGMAS]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("antithetic pair", lambda at, term: term / 2),
        ("centered variance", lambda at, term: 2 * term),
        ("proposition 1, where S = T", lambda at, term: losses.squared_norm(at.rows(at.student))),
        ("KL, ½ Fisher, where q = p", lambda at, term: 2 * term),  # without the ½
        ("equation 3, whole second order", lambda at, term: noise_statements.closed_form(at)),
        ("equation 2, whole second order", lambda at, term: term - noise_statements.lost_square(at)),
    ],
)
def test_a_wrong_term_is_noticed(row, wrong):
    statement, at = STATEMENTS[row], location(SMOOTH, 0, 0.0)
    good = order_of(SIGMAS, errors_of(statement, at), size_of_term(statement, at))
    bad = replace(statement, term=lambda setting: wrong(setting, statement.term(setting)))
    assert good == pytest.approx(4, abs=0.2)
    assert order_of(SIGMAS, errors_of(bad, at), size_of_term(statement, at)) == pytest.approx(2, abs=0.1)


def test_noise_of_another_size_is_noticed():
    """σ² N(0, I) for N(0, σ² I)."""
    at = location(SMOOTH, 0, 0.0)
    statement = STATEMENTS["antithetic pair"]
    wrong = replace(statement, increase=lambda setting, nodes, sigma: statement.increase(setting, nodes, sigma**2))
    assert order_of(SIGMAS, errors_of(wrong, at), size_of_term(statement, at)) == pytest.approx(2, abs=0.1)


@pytest.mark.ci
def test_coefficients_by_their_formulas():
    """With torch.func, one output at a time, on smooth networks."""
    at = location(SMOOTH, 1, 0.0)
    x = at.x[0]
    sums = dict.fromkeys(("second", "equal", "variance", "pair"), 0.0)
    for i in range(3):

        def delta(y, i=i):
            return (at.student(y) - at.teacher(y))[i]

        def laplacian(y, delta=delta):
            return torch.trace(hessian(delta)(y))

        third = float(grad(delta)(x) @ grad(laplacian)(x))
        square = float(hessian(delta)(x).square().sum())
        sums["second"] += float(delta(x) * laplacian(x))
        sums["equal"] += square / 2 + float(laplacian(x)) ** 2 / 4 + third
        sums["variance"] += square / 2 + third
        sums["pair"] += third
    for row, coefficient in zip(SQUARED, sums.values(), strict=True):
        assert leading(STATEMENTS[row], at).coefficient == pytest.approx(coefficient, rel=1e-9)


def test_the_closed_form_does_not_know_the_label_and_equation_3_does(monkeypatch):
    at = location(INSIDE, 0, 0.0)
    results = {"closed form": [], "equation 3": []}
    for label in range(3):
        monkeypatch.setattr(noise_statements, "LABEL", label)
        for row, values in results.items():
            values.append(expansion_error(STATEMENTS[row], at, 0.01) / (0.01**2 * size_of_term(STATEMENTS[row], at)))
    assert max(map(abs, results["closed form"])) < 1e-4
    assert max(results["equation 3"]) - min(results["equation 3"]) > 0.1


def test_derivatives_are_those_of_torch_func():
    at = Setting.at(location(SMOOTH, 2, 0.0), location(SMOOTH, 2, 0.0).x)
    torch.testing.assert_close(at.rows(at.q)[0], jacrev(at.q)(at.x[0]), rtol=1e-10, atol=1e-12)
    expected = torch.stack([torch.trace(part) for part in hessian(at.q)(at.x[0])])
    torch.testing.assert_close(at.laplacians(at.q)[0], expected, rtol=1e-9, atol=1e-12)


def test_the_mean_of_the_variance_is_that_over_all_pairs():
    at, nodes = Setting.at(location(SMOOTH, 0, 0.0), location(SMOOTH, 0, 0.0).x), hermite(6)
    y = at.x[:, None] + 0.3 * nodes.z
    first, second = (part.flatten() for part in torch.meshgrid(torch.arange(36), torch.arange(36), indexing="ij"))
    pairs = [torch.stack((f(y)[0, first], f(y)[0, second])) for f in (at.student, at.teacher)]
    expected = (nodes.weights[0, first] * nodes.weights[0, second]) @ losses.centered_variance(*pairs)
    assert float(noise_statements.variance(at, nodes, 0.3)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("offset", [-3.0, -0.01, 0.0, 0.4, 20.0])
def test_quadrature_across_a_kink(offset):
    """E (a + n·z)₊ = aΦ(a) + φ(a), and its square (1 + a²)Φ(a) + aφ(a)."""
    normal = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    nodes = kinked(torch.tensor([[offset]], dtype=torch.float64), normal, 9)
    hinge = (offset + nodes.z @ normal[0]).relu()
    below, density = (1 + math.erf(offset / 2**0.5)) / 2, math.exp(-(offset**2) / 2) / math.sqrt(2 * math.pi)
    assert float((nodes.weights * hinge).sum()) == pytest.approx(offset * below + density, rel=1e-8, abs=1e-12)
    square = (1 + offset**2) * below + offset * density
    assert float((nodes.weights * hinge.square()).sum()) == pytest.approx(square, rel=1e-8, abs=1e-12)
    mirrored = (offset - nodes.z @ normal[0]).relu()
    assert float((nodes.weights * mirrored).sum()) == pytest.approx(offset * below + density, rel=1e-8, abs=1e-12)


def test_quadrature_across_several_kinks():
    """E (n·z)₊ (m·z)₊ = (sin θ + (π − θ) cos θ) / 2π with θ the angle between n and m; and a third, far one."""
    angles = torch.tensor([0.3, 1.4, 2.0], dtype=torch.float64)
    normals = torch.stack((angles.cos(), angles.sin()), 1)
    nodes = kinked(torch.tensor([[0.0, 0.0, 1.5]], dtype=torch.float64), normals, 9)
    product = (nodes.z @ normals[0]).relu() * (nodes.z @ normals[1]).relu()
    expected = (math.sin(1.1) + (math.pi - 1.1) * math.cos(1.1)) / (2 * math.pi)
    assert float((nodes.weights * product).sum()) == pytest.approx(expected, rel=1e-7)
    third = (1.5 + nodes.z @ normals[2]).relu()
    below, density = (1 + math.erf(1.5 / 2**0.5)) / 2, math.exp(-(1.5**2) / 2) / math.sqrt(2 * math.pi)
    assert float((nodes.weights * third).sum()) == pytest.approx(1.5 * below + density, rel=1e-7)


def test_hermite_nodes_have_the_moments_of_a_normal():
    nodes: Nodes = hermite(8)
    assert float(nodes.weights.sum()) == pytest.approx(1, rel=1e-12)
    moments = (nodes.weights[..., None] * nodes.z**4).sum((0, 1))
    torch.testing.assert_close(moments, torch.full((2,), 3.0, dtype=torch.float64), rtol=1e-10, atol=0)


def test_order_and_limit():
    values = [3 * s**2 + 5 * s**4 for s in SIGMAS]
    assert order_of(SIGMAS, values, 1.0) == pytest.approx(2, abs=1e-2)
    assert limit(SIGMAS, values, 2, 4) == pytest.approx(3, rel=1e-12)
    assert order_of(SIGMAS, [1e-10 * s**2 for s in SIGMAS], 1.0) is None


@pytest.mark.ci
def test_locations_are_what_their_columns_say():
    inside, kink, line = (location(column, 0, 0.01) for column in (INSIDE, ON_A_KINK, AVERAGE))
    for network in (inside.student, inside.teacher):
        assert ((inside.x @ network.w.T + network.b).abs() / network.w.norm(dim=1)).min() > 2
    assert (kink.x[0] @ kink.student.w[0] + kink.student.b[0]).abs() < 1e-12
    assert float(line.weights.sum()) == pytest.approx(1, rel=1e-12)
    assert len(line.kinks.points) == 3
    w = torch.cat((line.student.w, line.teacher.w))
    b = torch.cat((line.student.b, line.teacher.b))
    assert (line.kinks.points @ w.T + b).abs().min(1).values.max() < 1e-12
    with pytest.raises(InputError, match=r"A column of `reproduce propositions`"):
        location("rough", 0, 0.01)


@pytest.mark.ci
def test_tables_and_figure_of_a_smoke_run(as_users_run, tmp_path, monkeypatch):
    few = {row: STATEMENTS[row] for row in ("proposition 1", "antithetic pair", "closed form")}
    monkeypatch.setattr(propositions, "STATEMENTS", few)
    result = Reproduce(name="propositions", smoke=True, out=tmp_path / "run").run()
    orders, coefficients = result["tables"]
    verdicts = {row[0]: row[-1] for row in orders["rows"]}
    assert verdicts["antithetic pair"] == "holds"
    assert verdicts["proposition 1"] == verdicts["closed form"] == "only inside a linear region"
    assert orders["rows"][0][:5] == ("proposition 1", "σ⁴", "2.00", "exact", "exact")
    assert coefficients["rows"][1][1].endswith("(σ⁴)")
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    experiment = EXPERIMENTS["propositions"]
    assert experiment.figure(document) == (tmp_path / "run" / "figure.svg").read_bytes()
    assert experiment.tables(document)[0].markdown() == (tmp_path / "run" / "propositions.md").read_text()
