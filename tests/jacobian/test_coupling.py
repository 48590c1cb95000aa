"""`jacobian` holds derivatives of each sample by itself, also where samples depend on each other in odd ways."""

import pytest
import torch
from torch import nn

import jacmatch


class Whole(nn.Module):
    """Works on the whole batch only: a product with a matrix that has a row for each sample."""

    def __init__(self):
        super().__init__()
        self.mixes = nn.Parameter(torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5).sin())

    def forward(self, x):
        return torch.tanh(self.mixes @ x)


def neighbors(x):
    """Only samples 1 and 2 depend on each other."""
    return torch.stack([x[0], x[1] * x[2], x[2] + x[1], *x[3:]])


@pytest.mark.parametrize("network", [Whole(), neighbors], ids=["whole", "neighbors"])
def test_jacobian_of_coupled_samples_is_the_diagonal(network):
    x = torch.randn(5, 3, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(network, x)
    own = torch.stack([full[number, :, number] for number in range(5)])
    torch.testing.assert_close(jacmatch.jacobian(network, x)[1].detach(), own)
    assert "couples-samples" in [finding.code for finding in jacmatch.doctor(network, x).findings]
