"""The sweep notices what is wrong: networks with a planted fault, and what its cells say of them."""

import pytest
import torch
from torch import nn

from . import table
from .cells import line, measure
from .configurations import Configuration, Network
from .differences import reference

pytestmark = pytest.mark.filterwarnings("ignore")


class HalfBackward(torch.autograd.Function):
    """x², with half of its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x


def with_cut_gradient(x):
    """x², whose derivative is right and knows nothing of the parameters."""
    return x.detach() ** 2 + 2 * x.detach() * (x - x.detach())


def configuration(call, shape=(3, 4), *, loop=False):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return Configuration("planted", Network(call, nn.Identity(), x.shape[1:], loop=loop), x)


def cells(call, *only, **how):
    measured = measure(configuration(call, **how), only=only)
    return {name: cell.split(": off")[0] for name, cell in measured.items()}


def test_what_is_right():
    result = cells(torch.tanh, *table.DERIVATIVES, *table.BASELINES)
    assert result == dict.fromkeys((*table.DERIVATIVES, *table.BASELINES), "right")
    assert cells(lambda x: x.sum(), "vjp", "jacobian", loop=True) == {"vjp": "right", "jacobian": "right"}


def test_a_wrong_value_and_a_wrong_gradient():
    assert cells(HalfBackward.apply, "torch vjp") == {"torch vjp": "wrong: value"}
    assert cells(with_cut_gradient, "torch vjp", "torch jvp") == {
        "torch vjp": "wrong: gradient",
        "torch jvp": "wrong: gradient",
    }


def test_an_error_of_torch_is_raw():
    assert cells(lambda x: torch.nn.functional.pdist(x), "torch jvp")["torch jvp"].startswith("raw: value: NotImpl")


def test_without_a_reference():
    assert "none" in measure(configuration(lambda x: x.log()))
    assert "none" in measure(configuration(lambda x: x > 0))
    step = reference(*_parts(configuration(lambda x: (x * 1e3).sin().sign())))
    assert not step.product.known or not step.product.value.any()


def _parts(made):
    return made.network, made.x


def test_the_reference_of_a_polynomial():
    """f = (s x + b)³ at s = 1 and b = 0: Jw = 3x²w; uᵀJw along p is Σ u w (3x² p_s + 6x (x p_s + p_b))."""
    made = configuration(lambda x: x**3)
    result, x = reference(made.network, made.x), made.x
    along_s, along_b = result.directions
    torch.testing.assert_close(result.product.value, 3 * x**2 * result.w)
    expected = (result.u * result.w * (3 * x**2 * along_s + 6 * x * (x * along_s + along_b))).sum()
    torch.testing.assert_close(result.gradient.value, expected)
    assert not result.coupled
    assert not result.random


def test_samples_that_depend_on_each_other():
    """f = x − mean over the batch: with the other samples fixed, Jw is (1 − 1/B) w."""
    made = configuration(lambda x: x - x.mean(0))
    result = reference(made.network, made.x)
    assert result.coupled
    torch.testing.assert_close(result.product.value, result.w - result.w.mean(0))
    torch.testing.assert_close(result.own.value, result.w * 2 / 3)


def test_a_line_of_the_table_has_the_verdicts():
    now, reasons = line(configuration(torch.tanh))
    assert now["vjp"] == now["jacobian"] == reasons["auto"] == "right"
    assert "differences=right" in now["doctor"]
    assert not now["faults"]
    assert table.worse(now | {"vjp": "refused"}, now) == ["vjp"]
    assert table.worse(now, now | {"vjp": "wrong"}) == []
    assert [table.family(name) for name in ("nn.Tanh eval 0 batch", "torch.min (binary) 0 loop")] == [
        "nn.Tanh",
        "torch.min (binary)",
    ]
