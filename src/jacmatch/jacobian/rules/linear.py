"""The linear map with derivative rules for forward mode: PyTorch's own takes twice what its products do there."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jacmatch.jacobian.rules.backward_mode import Toward, along_probes, applied, as_autocast, may_depend_on_input


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, x Wᵀ + b over the last axis of x."""
    if not x.is_floating_point() or x.dim() < 2 or weight.dim() != 2 or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    x, weight, bias = as_autocast(x, weight, bias)
    y: Tensor = applied(_Linear, x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # the arguments have their types already
            return functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.save_for_forward(x, weight)
        ctx.are_parameters = not may_depend_on_input(weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        if Toward.input and ctx.are_parameters:
            by_weight = by_bias = False
        rows = g.reshape(-1, g.shape[-1])
        return (
            (applied(_Linear, g, weight.t(), None) if torch.is_grad_enabled() else g @ weight) if by_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if by_weight else None,
            rows.sum(0) if by_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        moved = None if x_t is None else applied(_Linear, x_t, weight, bias_t)
        if weight_t is None:
            return moved if moved is not None or bias_t is None else bias_t.expand(*x.shape[:-1], -1)
        by_weight: Tensor = applied(_Linear, x, weight_t, None if moved is not None else bias_t)
        return by_weight if moved is None else moved + by_weight

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
        x, *rest = arguments
        if dims[0] is None or dims[1] is not None or dims[2] is not None:
            return along_probes(_Linear, info, dims, arguments)
        return applied(_Linear, x.movedim(dims[0], 0), *rest), 0
