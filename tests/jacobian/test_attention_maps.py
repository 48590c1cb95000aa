"""Several attention maps in one pass: which pixels are picked, and what is refused."""

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jacobian import AttentionMaps, AttentionPixel, Context, run

from .test_readouts import X, network


def test_the_largest_pixel_of_each_map_is_picked():
    readout = AttentionMaps(("0", "2"), ((5, 5), (2, 2)))
    with torch.no_grad():
        _, features = run(network(), X, ("0", "2"))
        values = readout(torch.empty(3, 0), features, Context())
    picked = readout.largest(values)
    assert picked.shape == (2, 3, 29)
    for number, layer in enumerate(("0", "2")):
        own = AttentionPixel(layer)(torch.empty(3, 0), features, Context())
        torch.testing.assert_close((picked[number] * values).sum(1, keepdim=True), own)
    assert torch.equal(picked.sum(2), torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(torch.cat([part.flatten(1) for part in readout.maps(values)], 1), values)


def test_each_map_has_a_size():
    with pytest.raises(InputError, match=r"`sizes` of `AttentionMaps` must .*Got 2 layers and 1 sizes"):
        AttentionMaps(("0", "2"), ((1, 1),))
    with pytest.raises(InputError, match=r"Got 0 layers and 0 sizes"):
        AttentionMaps()


def test_the_derivative_of_an_even_power_is_right_at_zero():
    """d²(z²)/dz² is 2 at 0 as well, where |z|² loses it."""
    z = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    for readout in (AttentionPixel("z"), AttentionMaps(("z",), ((1, 1),))):
        value = readout(torch.empty(1, 0), {"z": z}, Context()).sum()
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z)
        assert second.item() == 2
