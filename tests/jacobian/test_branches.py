"""A verdict holds for one branch of a network: another, selected by numbers, settings or data, is checked again."""

import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jacmatch import UnsupportedError, jacobian, jvp, vjp
from jacmatch.jacobian import verification
from jacmatch.jacobian.function import Widened

X, V, U = (torch.randn(12, width, generator=torch.Generator().manual_seed(width)) for width in (3, 3, 4))


class Switched(nn.Module):
    """z ∘ z of z = Wx, with one factor detached where `cut` says so."""

    def __init__(self, cut):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.cut = nn.Linear(3, 4), cut
        self.number, self.settings, self.option = 2, types.SimpleNamespace(cut=False), {"cut": False}
        self.register_buffer("switch", torch.tensor(False))

    def forward(self, x, t=0.0):
        z = self.layer(x)
        return z * z.detach() if self.cut(self, x, t) else z * z


def jv(net, x=X, **context):
    return jvp(net, x, V, context=context)[1]


def row(net, x=X, **context):
    return vjp(net, x, U, context=context)[1]


def rows(net, x=X, **context):
    return jacobian(net, x, context=context)[1]


CHANGES = {
    "number": (lambda net, x, t: net.number == 3, lambda net: setattr(net, "number", 3)),
    "settings": (lambda net, x, t: net.settings.cut, lambda net: setattr(net.settings, "cut", True)),
    "dictionary": (lambda net, x, t: net.option["cut"], lambda net: net.option.update(cut=True)),
    "buffer": (lambda net, x, t: bool(net.switch), lambda net: net.switch.fill_(True)),
    "parameter": (lambda net, x, t: bool(net.layer.bias[0] > 3), lambda net: net.layer.bias.data.add_(9)),
}


@pytest.mark.parametrize(
    ("change", "product"), [*((change, jv) for change in CHANGES), ("number", row), ("number", rows)]
)
def test_what_a_network_contains_may_select_another_branch(change, product):
    cut, switch = CHANGES[change]
    net = Switched(cut)
    product(net)
    switch(net)
    with pytest.raises(UnsupportedError, match="part of the derivative is missing"):
        product(net)


@pytest.mark.parametrize("product", [jv, row, rows])
def test_data_and_numbers_in_the_context_may_select_another_branch(product):
    net = Switched(lambda net, x, t: bool(x[5, 0] + t > 4))
    product(net)
    for call in (lambda: product(net, X + torch.eye(12)[:, 5:6] * 9), lambda: product(net, t=9.5)):
        with pytest.raises(UnsupportedError, match="part of the derivative is missing"):
            call()
        product(net, t=-1.0)  # this one is still right


@pytest.mark.parametrize("product", [jv, row, rows])
def test_large_batches_may_take_another_branch_than_the_samples_that_are_checked(product):
    with pytest.raises(UnsupportedError, match="part of the derivative is missing"):
        product(Switched(lambda net, x, t: len(x) > 8))


@torch.no_grad()
def test_numbers_count_where_forward_mode_has_no_graph():
    net = Switched(lambda net, x, t: net.number == 3)
    jv(net)
    net.number = 3
    torch.testing.assert_close(jv(net), 2 * net.layer(X) * (V @ net.layer.weight.T), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_without_gradients_the_branch_that_data_select_is_checked_too(count):
    net = Switched(lambda net, x, t: bool(x.mean() > 5))
    with torch.no_grad():
        jv(net)
        given = jvp(net, X + 10, V.expand(count, *V.shape))[1]  # there, z·z is computed as z·detach(z)
        torch.testing.assert_close(given[0], 2 * net.layer(X + 10) * (V @ net.layer.weight.T), rtol=1e-2, atol=1e-1)


def test_each_branch_is_checked_once_and_of_very_many_a_few(monkeypatch):
    made, true = [], verification.Comparison
    monkeypatch.setattr(verification, "Comparison", lambda *a, **k: made.append(1) or true(*a, **k))

    class Powers(nn.Linear):
        def forward(self, x, t):
            for bit in range(5):
                x = x.sin() if t >> bit & 1 else x.tanh()
            return super().forward(x)

    net = Powers(3, 4)
    for t in (5, 9, 5, 9):
        row(net, t=t)
    assert len(made) == 2
    for t in range(32):
        row(net, t=t)
    assert len(made) <= 18


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler reads it
def test_products_within_a_compiled_step_are_those_of_the_eager_step():
    net = Switched(lambda net, x, t: False)

    def step(x):
        return (row(net, x) + jv(net, x)[:, :3]).square().sum()

    loss = torch.compile(step, backend="aot_eager")(X)
    expected = step(X)
    torch.testing.assert_close(loss, expected)
    given, wanted = (torch.autograd.grad(each, net.layer.weight)[0] for each in (loss, expected))
    torch.testing.assert_close(given, wanted)


def test_the_check_of_precision_does_not_import_the_compiler():
    # where this is True, as in its base class, torch wraps the method of the mode, and its first call imports _dynamo
    assert TorchDispatchMode._should_skip_dynamo()
    assert not Widened._should_skip_dynamo()
