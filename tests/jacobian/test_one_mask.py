"""Dropout draws one mask for the value and for its derivative, whatever the engine."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from jacmatch.jacobian import jvp, unverified
from jacmatch.jacobian.callables import seed_generators

ENGINES = ("forward", "reverse", "differences")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_product_belongs_to_the_mask_of_the_value(engine):
    # Linear up to the mask m: y = W (m ∘ x) / (1 − p), so Jv = W (m ∘ v) / (1 − p), and for v = x it is y itself.
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 3, bias=False)).double()
    x = torch.randn(4, 40, dtype=torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        y, product = jvp(network, x, x, engine=engine)
        torch.testing.assert_close(product, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_mask_of_a_transposed_tensor_is_that_of_an_ordinary_pass(engine):
    network = nn.Sequential(Transposed(), nn.Dropout(0.5), Transposed()).double()
    x = torch.randn(4, 6, 2, dtype=torch.float64)
    torch.manual_seed(3)
    expected = network(x)
    torch.manual_seed(3)
    y, product = jvp(network, x, torch.stack([x, -x]), engine=engine)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(product, torch.stack([expected, -expected]), rtol=1e-6, atol=1e-8)


class Transposed(nn.Module):
    """A view with the strides of another shape, as attention returns it."""

    def forward(self, x):
        return x.transpose(0, 1)


@pytest.mark.parametrize("draw", [np.random.rand, random.random, lambda: float(torch.rand(()))])
def test_differences_replay_every_global_generator(draw):
    """Both ends of a difference get the same noise, and the user's own numbers advance by one call."""
    net, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    seed_generators(0, x.device)
    _, second = draw(), draw()
    seed_generators(0, x.device)
    with unverified():
        _, product = jvp(lambda z: net(z) + 100 * draw(), x, x, engine="differences")
    torch.testing.assert_close(product, x @ net.weight.mT, rtol=1e-6, atol=1e-6)
    assert draw() == second or draw is random.random  # beartype draws from Python's too


def test_another_generator_of_numpy_is_replayed():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        net, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
        _, product = jvp(lambda z: net(z) + 100 * np.random.rand(), x, x, engine="differences")
    finally:
        np.random.set_bit_generator(before)
    torch.testing.assert_close(product, x @ net.weight.mT, rtol=1e-6, atol=1e-6)
