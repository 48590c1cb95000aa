"""Jacobians that are known in part: compared where they are known, refused where the probe cannot."""

import pytest
import torch
from torch import nn

from jacmatch import InputError, RandomInputs, RandomOutputs, Regression, SampledRows
from jacmatch.teachers import AnalyticTeacher, Question

NAN = float("nan")


@pytest.fixture
def given():
    """Points, values and Jacobians with entries, outputs, inputs and a whole sample that are not known."""
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.stack([x.prod(1), x.sin().sum(1)], 1)
    j = torch.stack([x.prod(1, keepdim=True) / x, x.cos()], 1)
    j[0, 0, 0], j[1, 1], j[2, :, 2], j[3] = NAN, NAN, NAN, NAN
    return x, y, j


def student():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()  # its Jacobian is its weight


@pytest.mark.parametrize("table", [False, True])
def test_the_term_is_the_sum_over_the_known_entries(given, table):
    x, y, j = given
    net, s, t = student(), torch.tensor([0.5, 2.0, 3.0]).double(), torch.tensor([10.0, 0.1]).double()
    total = 0.0
    for n in range(6):
        for k in range(2):
            for i in range(3):
                if j[n, k, i] == j[n, k, i]:
                    total += float(((net.weight[k, i].detach() - j[n, k, i]) * s[i] / t[k]).square())
    objective = Regression(net, jacobians=1.0, inputs=s, outputs=t, table=j if table else None)
    terms = objective(x, y, **({} if table else {"j": j}))
    assert float(terms["jacobians"].detach()) == pytest.approx(total / 6, rel=1e-9)
    terms["loss"].backward()
    assert net.weight.grad.isfinite().all()


# lululxvi/deepxde #780: a gauge measures one derivative
def test_one_known_derivative_is_learned_and_nothing_else(given):
    x, y, j = given
    only = torch.full_like(j, NAN)
    only[:, 0, 0] = 0.7
    net = student()
    before = net.weight.detach().clone()
    Regression(net, values=0.0, jacobians=1.0)(x, y, j=only)["loss"].backward()
    assert net.weight.grad.nonzero().tolist() == [[0, 0]]
    assert net.weight.grad[0, 0].item() == pytest.approx(2 * (before[0, 0].item() - 0.7))


@pytest.mark.ci
def test_sampled_rows_are_those_of_every_row_on_average(given):
    x, y, j = given
    every = Regression(student(), values=0.0, jacobians=1.0)(x, y, j=j)["loss"]
    some = Regression(student(), values=0.0, jacobians=1.0, probe=SampledRows(1))
    mean = torch.stack([some(x, y, j=j, draw=draw)["loss"].detach() for draw in range(400)]).mean()
    assert float(mean) == pytest.approx(float(every.detach()), rel=0.1)


def test_directions_compare_the_products_that_are_known(given):
    x, y, j = given
    net, v = student(), torch.rand(2, 6, 3, dtype=torch.float64)
    v[:, 0, 0] = 0  # a direction without the entry that is unknown
    products = AnalyticTeacher(lambda _: y, lambda _: j).answer(x, Question(tangents=v)).products
    known = torch.tensor([[True, True], [True, False], [False, False], [False, False], [True, True], [True, True]])
    assert torch.equal(~products.isnan(), known.expand(2, 6, 2))
    expected = torch.einsum("nki,pni->pnk", j.nan_to_num(0.0), v)
    torch.testing.assert_close(products[:, known], expected[:, known])
    assert Regression(net, jacobians=1.0, probe=RandomInputs(1))(x, y, j=j)["loss"].isfinite()


@pytest.mark.parametrize("probe", [RandomInputs(1), RandomOutputs(1)])
def test_directions_of_which_no_product_is_known_are_refused(given, probe):
    x, y, j = given
    j[:, 0, 0] = j[:, 1, 1] = j[:, 0, 2] = NAN
    message = r"`probe` of `Regression` must compare only known entries.*Got Random.*Use EveryRow\(\), the default"
    with pytest.raises(InputError, match=message):
        Regression(student(), jacobians=1.0, probe=probe)(x, y, j=j)


def test_directions_of_rows_that_are_known_in_part_are_refused(given):
    x, y, j = given
    assert Regression(student(), jacobians=1.0, jacobian_loss="relative")(x, y, j=j)["loss"].isfinite()
    with pytest.raises(InputError, match=r"must be 'squared' or 'relative' if Jacobians have NaN\. Got 'normalized'"):
        Regression(student(), jacobians=1.0, jacobian_loss="normalized")(x, y, j=j)
