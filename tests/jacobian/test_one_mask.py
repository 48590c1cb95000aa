"""Dropout draws one mask for the value and for its derivative, whatever the engine."""

import pytest
import torch
from torch import nn

from jacmatch.jacobian import jvp

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
