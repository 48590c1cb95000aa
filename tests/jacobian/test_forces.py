"""Networks that take a gradient in their forward pass: energies and forces of an interatomic potential.

atomistic-machine-learning/schnetpack #279, mir-group/nequip #174, and ACEsuit/mace, which keeps the graph of the forces
in training only.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from jacmatch import Distillation, InputError, ModuleTeacher, RandomInputs, UnsupportedError, doctor, jvp, vjp
from jacmatch.datasets import Split
from jacmatch.teachers import Question
from jacmatch.training import evaluate


class Potential(nn.Module):
    """Energy and forces of three atoms in one dimension each."""

    def __init__(self, graph="always"):
        super().__init__()
        torch.manual_seed(0)
        self.energy, self.graph = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1)), graph

    def forward(self, x):
        x.requires_grad_(True)
        energy = self.energy(x)
        keep = self.training if self.graph == "training" else True
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=keep)
        return torch.cat([energy, -gradient], 1)


def by_func(net, x):
    """The same from its definition, with another tool."""
    forces = [-torch.autograd.functional.jacobian(lambda z: net.energy(z).sum(), row) for row in x]
    return torch.cat([net.energy(x), torch.stack(forces)], 1).detach()


def test_values_are_those_with_gradients_and_nothing_is_left_behind():
    net, x = Potential().double(), torch.rand(4, 3, dtype=torch.float64)
    expected = by_func(net, x)
    answer = ModuleTeacher(Potential().double()).answer(x)
    torch.testing.assert_close(answer.outputs, expected)
    assert not answer.outputs.requires_grad
    assert not x.requires_grad
    assert evaluate(net.float(), Split(x.float(), expected.float()), device="cpu")["rmse"] < 1e-6
    assert doctor(net.double(), x).ok


def test_derivatives_of_forces_are_the_second_ones_of_the_energy():
    x, v = torch.rand(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    net, h = Potential().double(), 1e-5
    expected = (by_func(net, x + h * v) - by_func(net, x - h * v)) / (2 * h)
    torch.testing.assert_close(jvp(net, x, v)[1].detach(), expected, atol=1e-7, rtol=1e-5)
    for graph in ("always", "training"):
        answer = ModuleTeacher(Potential(graph).double()).answer(x, Question(tangents=v[None]))
        torch.testing.assert_close(answer.products[0], expected, atol=1e-7, rtol=1e-5)


def test_the_guide_compares_rows_and_columns_of_the_hessian():
    """In float64: the products of the guide's networks, and its Jacobian term, against differences of their forces."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "force-fields.md"
    code = re.search("```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL).group(1)
    guide, before = {}, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        exec(code, guide)
        student, teacher, context = guide["objective"].student, guide["teacher"], guide["context"]
        x, h = guide["x"][:3], 1e-5
        context = {"types": context["types"][:3]}
        v = torch.randn(3, 4, 3)

        def hessian_times(network, v):
            moved = [network(x + t * v, **context).detach() for t in (h, -h)]
            return (moved[0] - moved[1]) / (2 * h)

        for network in (student, teacher):
            product = jvp(network, x, v, context=context)[1].detach()
            torch.testing.assert_close(product, hessian_times(network, v), rtol=1e-6, atol=1e-7)
            row = vjp(network, x, v.flatten(1), context=context)[1].detach()  # the Hessian is symmetric
            torch.testing.assert_close(row.flatten(1), product, rtol=1e-6, atol=1e-7)
        probe = RandomInputs(1)
        ids = torch.arange(3)
        settings = {"task": "regression", "labels": 0, "jacobians": 1.0, "jacobian_loss": "squared", "probe": probe}
        terms = Distillation(student, teacher, **settings)(x, ids=ids, draw=0, context=context)
        v = probe.directions(x=x, ids=ids, seed=0, draw=0)[0]
        wanted = (hessian_times(student, v) - hessian_times(teacher, v)).square().sum(1).mean()
        torch.testing.assert_close(terms["jacobians"].detach(), wanted, rtol=1e-6, atol=1e-9)
    finally:
        torch.set_default_dtype(before)


def test_forces_without_a_graph_in_evaluation_have_no_rows():
    x = torch.rand(4, 3)
    with pytest.raises((InputError, UnsupportedError)):
        ModuleTeacher(Potential("training")).answer(x, Question(cotangents=torch.ones(1, 4, 4)))
    objective = Distillation(Potential(), Potential("training"), labels=0, task="regression", probe=RandomInputs(1))
    objective(x)["loss"].backward()


def test_an_error_of_another_kind_is_that_of_the_module():
    def broken(x):
        raise RuntimeError("of its own")

    from jacmatch.jacobian.modules import call

    with torch.no_grad(), pytest.raises(RuntimeError, match="of its own"):
        call(broken, torch.ones(1))
