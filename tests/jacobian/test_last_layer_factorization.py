"""The full Jacobian of a network whose last layer has few features: fewer passes, the same numbers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from jacmatch import jacobian
from jacmatch.jacobian import engines
from jacmatch.jacobian.verification import unverified

OUTPUTS, FEATURES = 7, 3


def network():
    torch.manual_seed(0)
    first = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, FEATURES), nn.Softplus()
    return nn.Sequential(*first, nn.Linear(FEATURES, OUTPUTS)).double().eval()


def by_definition(module, x):
    return torch.stack([torch.func.jacrev(lambda z: module(z[None])[0])(one) for one in x])


@pytest.fixture
def passes(monkeypatch):
    """Counts the backward passes that are made, verification apart."""
    made, true = [], engines._gradient
    monkeypatch.setattr(engines, "_gradient", lambda *a, **k: made.append(1) or true(*a, **k))
    with unverified():
        yield made


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("chunk_size", "expected"), [(1, FEATURES), (2, 2), (None, 1)])
def test_a_pass_for_each_feature(passes, chunk_size, expected):
    module = network()
    outputs, results = jacobian(module, X, chunk_size=chunk_size)
    torch.testing.assert_close(results, by_definition(module, X), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(outputs, module(X))
    assert len(passes) == expected
    assert not any(layer._forward_hooks for layer in module)


def test_all_parameters_get_the_gradient_of_the_rows():
    module, target = network(), torch.randn(2, OUTPUTS, 4, dtype=torch.float64)
    results = torch.autograd.grad(
        (jacobian(module, X)[1] - target).square().sum(), tuple(module.parameters()), allow_unused=True
    )
    expected = torch.autograd.grad(
        (by_definition(module, X) - target).square().sum(), tuple(module.parameters()), allow_unused=True
    )
    assert results[-2] is not None  # the weight of the last layer
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if mine is None else mine, torch.zeros(()) if theirs is None else theirs, check_dtype=False
        )


class Scaled(nn.Module):
    """Something follows the layer."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return 2 * self.inner(x)


def hooked():
    module = network()
    module[-1].register_forward_hook(lambda layer, given, returned: returned.sin())
    return module


def parametrized():
    module = network()
    module[-1] = parametrizations.weight_norm(module[-1])
    return module


class OfTwo(nn.Module):
    """A narrow layer runs, but another one makes the outputs."""

    def __init__(self):
        super().__init__()
        self.aside, self.last = network(), nn.Linear(4, OUTPUTS).double()

    def forward(self, x):
        outputs = self.last(x)
        return outputs + 0 * self.aside(x) if self.training else (self.aside(x), outputs)[1]


class Followed(nn.Module):
    """Something is done in place to the result of the last layer, or to its features after it has run."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.skip, self.how = network(), nn.Linear(4, OUTPUTS).double(), how

    def forward(self, x):
        h = self.inner[:-1](x)
        y = self.inner[-1](h)
        if self.how == "temperature":
            y /= 4.0
        elif self.how == "skip connection":
            y += self.skip(x)
        elif self.how == "a view":
            y[:, ::2].mul_(3)
        else:
            y.register_hook(lambda gradient: gradient * 2)
        return y


class Adapted(nn.Module):
    """The weight of the last layer is computed from the input."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = network(), nn.Linear(4, 1).double()

    def forward(self, x):
        last = self.inner[-1]
        weight = last.weight * (1 + self.scale(x).mean())
        return torch.func.functional_call(last, {"weight": weight}, (self.inner[:-1](x),))


ONE = X[:1]


@pytest.mark.parametrize("how", ["temperature", "skip connection", "a view"])
def test_what_follows_in_place_is_in_the_jacobian(how):
    module = Followed(how).eval()
    torch.testing.assert_close(jacobian(module, X)[1], by_definition(module, X), rtol=1e-12, atol=1e-14)


def test_a_gradient_hook_on_the_outputs_is_obeyed():
    module, plain = Followed("a hook").eval(), network()
    plain.load_state_dict(module.inner.state_dict())
    torch.testing.assert_close(jacobian(module, X)[1], 2 * by_definition(plain, X))


def test_a_weight_that_depends_on_the_input_is_differentiated():
    module = Adapted().eval()
    torch.testing.assert_close(
        jacobian(module, ONE, chunk_size=1)[1], by_definition(module, ONE), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("made", [Scaled, hooked, parametrized, OfTwo])
def test_where_the_last_layer_is_not_all_each_output_has_its_pass(passes, made):
    module = made().eval()
    torch.testing.assert_close(jacobian(module, X, chunk_size=1)[1], by_definition(module, X), rtol=1e-12, atol=1e-14)
    assert len(passes) == OUTPUTS
