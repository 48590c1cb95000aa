"""The linear map with rules for forward mode; PyTorch's rule takes twice as long as its matrix products."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jacmatch.jacobian.rules.base import AffineRule, Gradients, Pair, applied, as_autocast, dual


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, x Wᵀ + b over the last axis of x."""
    if not x.is_floating_point() or x.dim() < 2 or weight.dim() != 2 or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    y: Tensor | None = dual(_dual_linear, x, weight, bias)
    return applied(_Linear, *as_autocast(x, weight, bias)) if y is None else y


class _Linear(AffineRule):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the arguments have their types already
            return functional.linear(x, weight, bias)

    @staticmethod
    def gradients(ctx: Any, g: Tensor, x: Any, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Gradients:
        rows = g.reshape(-1, g.shape[-1])
        return (
            (applied(_Linear, g, weight.t(), None) if torch.is_grad_enabled() else g @ weight) if wanted[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def _dual_linear(x: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor | None) -> Pair:
    """Value and tangent in the type of autocast; weights are cast here, since `torch.func` would wrap the result."""
    x, weight, bias = as_autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x, weight, bias), functional.linear(x_t.to(x.dtype), weight)
