"""Buffers: one step of training moves them once, by whichever name a layer is reached, and differences start afresh."""

import copy

import pytest
import torch
from torch import nn

from jacmatch import AntitheticNoise, Distillation, RandomInputs, jvp
from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import preserved_buffers

D = torch.float64
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=D)
V = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=D)


class TwoNames(nn.Module):
    """A BatchNorm layer that is reached as `bn` and as `layers.0`."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.layers = nn.Sequential(self.bn, nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return self.layers(x)


def network():
    torch.manual_seed(0)
    return TwoNames().to(D).train()


def moved_once(net, mean):
    expected = copy.deepcopy(network())
    expected(X)
    assert net.bn.running_mean is mean
    torch.testing.assert_close(net.bn.running_mean, expected.bn.running_mean)
    torch.testing.assert_close(net.bn.running_var, expected.bn.running_var)
    assert int(net.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("engine", ["forward", "reverse", "differences"])
def test_a_layer_with_two_names_moves_its_statistics_once(engine):
    net = network()
    mean = net.bn.running_mean
    jvp(net, X, V, engine=engine)
    moved_once(net, mean)


@pytest.mark.parametrize("probe", [AntitheticNoise(2, sigma=0.1), RandomInputs(2)], ids=["noise", "Jv"])
def test_so_does_an_objective(probe):
    net = network()
    mean = net.bn.running_mean
    Distillation(net, nn.Linear(4, 3).to(D), probe=probe)(X, torch.tensor([0, 1, 2, 0, 1]))
    moved_once(net, mean)


class Centered(nn.Module):
    """Subtracts a running center, which it writes in each call, in place or as another tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.layer, self.in_place = nn.Linear(4, 3, dtype=D), in_place
        self.register_buffer("center", torch.zeros(4, dtype=D))

    def forward(self, x):
        y = self.layer(x - self.center).tanh()
        with torch.no_grad():
            moved = 0.5 * self.center + 0.5 * x.mean(0) + 1
            self.center = self.center.copy_(moved) if self.in_place else moved
        return y


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "assigned"])
def test_differences_start_from_the_buffers_of_the_pass_at_x(in_place, training):
    net = Centered(in_place).train(training)
    expected = torch.func.jvp(lambda x: net.layer(x).tanh(), (X,), (V,))[1]
    torch.testing.assert_close(jvp(net, X, V, engine="differences")[1], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(net.center, X.mean(0) * 0.5 + 1)  # written once


def test_differences_of_a_layer_with_spectral_norm():
    torch.manual_seed(0)
    net = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).to(D).train()
    other = copy.deepcopy(net)
    torch.testing.assert_close(
        jvp(net, X, V, engine="differences")[1], jvp(other, X, V, engine="reverse")[1], rtol=1e-6, atol=1e-8
    )


class Refuses(TwoNames):
    def forward(self, x):
        y = super().forward(x)
        raise RuntimeError("no more") if torch._C._are_functorch_transforms_active() else y
        return y


def test_buffers_survive_an_error_and_are_the_same_tensors():
    net = Refuses().to(D).train()
    before = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers()}
    with pytest.raises(UnsupportedError, match="no more"):
        jvp(net, X, V, engine="forward")
    for name, buffer in net.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "assigned"])
def test_preserved_buffers_are_the_same_tensors_with_the_same_values(in_place):
    net = Centered(in_place).eval()
    center = net.center
    with preserved_buffers(net):
        net(X)
    assert net.center is center
    assert not center.any()
