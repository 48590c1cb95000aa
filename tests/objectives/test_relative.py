"""The relative Jacobian term is divided by what does not depend on the directions: its mean is the relative error."""

import math

import pytest
import torch
from torch import nn

from jacmatch.jacobian import EveryRow, RandomOutputs
from jacmatch.losses import relative_error
from jacmatch.objectives import Distillation

D = torch.float64
X = torch.randn(1, 3, dtype=D, generator=torch.Generator().manual_seed(5))


class Opposite(nn.Module):
    """Two logits a and −a: for v = (1, 1) the product of this teacher is 0, whatever the Jacobian."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)

    def forward(self, x):
        a = self.inner(x)
        return torch.cat([a, -a], 1)


def student():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(D)


def made(probe, network):
    return Distillation(network, Opposite(), labels=0, outputs=0, jacobians=1.0, jacobian_loss="relative", probe=probe)


def whole(network):
    return torch.autograd.functional.jacobian(lambda z: network(z[None])[0], X[0])


def exact():
    """‖J_S − J_T‖² ÷ ‖J_T‖² by whole Jacobians."""
    s, t = whole(student()), whole(Opposite())
    return float((s - t).square().sum() / t.square().sum())


def test_all_rows_give_the_relative_error():
    assert float(made(EveryRow(), student())(X).loss.detach()) == pytest.approx(exact(), rel=1e-4)


def test_the_mean_over_directions_is_the_relative_error():
    """Of 20,000 directions; the mean of the ratios of each direction is far off, and does not settle."""
    many = 20_000
    copies, ids = X.expand(many, 3), torch.arange(many)
    objective = made(RandomOutputs(1), student())
    assert float(objective(copies, ids=ids).loss.detach()) == pytest.approx(exact(), rel=0.05)
    v = RandomOutputs(1).directions(outputs=torch.zeros(many, 2, dtype=D), ids=ids, seed=0, draw=0)[0]
    s, t = whole(student()), whole(Opposite())
    ratios = relative_error((v @ s)[:, None], (v @ t)[:, None])
    assert float(ratios.mean()) > 10 * exact()


@pytest.mark.ci
def test_no_direction_has_a_gradient_without_bound():
    """At most |v|² times as large as by all rows, up to how the rows add; |v|² is below 40 in 500 draws."""
    network = student()
    objective = made(RandomOutputs(1), network)
    objective(X.expand(2000, 3), ids=torch.arange(2000))  # measures the teacher

    def norm(each, **given):
        gradients = torch.autograd.grad(each(X, **given).loss, list(network.parameters()), allow_unused=True)
        return math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))

    objective.eval()
    norms = [norm(objective, draw=draw, ids=torch.tensor([0])) for draw in range(500)]
    assert max(norms) < 40 * norm(made(EveryRow(), network))


def test_the_norm_of_the_teacher_is_a_mean_over_the_calls_that_measure():
    network, norms = student(), []
    objective = made(RandomOutputs(1), network)
    objective.measure_every = 2
    for call in range(5):
        x, ids = torch.randn(4, 3, dtype=D), torch.arange(4)
        v = RandomOutputs(1).directions(outputs=torch.zeros(4, 2, dtype=D), ids=ids, seed=0, draw=call)[0]
        x.requires_grad_()
        rows = torch.autograd.grad((objective.teacher.module(x) * v).sum(), x)[0]
        if call % 2 == 0:
            norms.append(float(rows.square().sum(1).mean()))
        terms = objective(x.detach(), ids=ids)
        wanted = sum(norms) / len(norms)
        assert objective.teacher_norm.mean == pytest.approx(wanted, rel=1e-9)
        rows_of_student = torch.autograd.grad((network(x) * v).sum(), x)[0]
        error = float((rows_of_student - rows).square().sum(1).mean())
        assert float(terms.loss.detach()) == pytest.approx(error / (wanted + 1e-6), rel=1e-6)
    other = made(RandomOutputs(1), student())
    other.load_state_dict(objective.state_dict())
    assert other.teacher_norm == objective.teacher_norm
