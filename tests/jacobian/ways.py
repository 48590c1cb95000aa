"""The ways to a product: vᵀJ, and Jv by each engine."""

import pytest
import torch
from torch import Tensor

from jacmatch.jacobian import Products, jvp_products, vjp_products

WAYS = ("vjp", "forward", "reverse", "differences", "auto")
every_way = pytest.mark.parametrize("way", WAYS)
every_policy = pytest.mark.parametrize("policy", ["batch", "frozen"])


def go(way: str, module, x: Tensor, probes: int = 2, **settings) -> Products:
    """One pass of the given way, along directions that are the same each time."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape) -> Tensor:
        return torch.randn((probes, *shape), generator=generator, dtype=x.dtype)

    if way == "vjp":
        return vjp_products(module, x, lambda y: draw(y.shape), **settings)
    return jvp_products(module, x, draw(x.shape), engine=way, **settings)
