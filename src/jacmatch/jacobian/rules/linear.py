"""The linear map with rules for forward mode; PyTorch's rule takes twice as long as its matrix products."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jacmatch.jacobian.rules.base import (
    Pair,
    SampleRule,
    Toward,
    applied,
    as_autocast,
    in_dual_pass,
    joined,
    may_depend_on_input,
    parts_of,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, x Wᵀ + b over the last axis of x."""
    if not x.is_floating_point() or x.dim() < 2 or weight.dim() != 2 or torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    if in_dual_pass(weight, bias):
        value, tangent = parts_of(x)
        if tangent is not None:
            return joined(_dual_linear, value, tangent, weight, bias)
    x, weight, bias = as_autocast(x, weight, bias)
    y: Tensor = applied(_Linear, x, weight, bias)
    return y


class _Linear(SampleRule):
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


def _dual_linear(x: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor | None) -> Pair:
    """Value and tangent in the type of autocast; weights are cast here, since `torch.func` would wrap the result."""
    x, weight, bias = as_autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        pair: Pair = _DualLinear.apply(x, x_t.to(x.dtype), weight, bias)  # type: ignore[no-untyped-call]
        return pair


class _DualLinear(torch.autograd.Function):
    """y = x Wᵀ + b and ẏ = ẋ Wᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor | None) -> Pair:
        trained = weight.requires_grad
        ctx.save_for_backward(x if trained else None, x_t if trained else None, weight)
        ctx.set_materialize_grads(False)
        return functional.linear(x, weight, bias), functional.linear(x_t, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, x_t, weight = ctx.saved_tensors
        by_x, by_x_t, by_weight, needs_bias = ctx.needs_input_grad
        pairs = [(g, z) for g, z in zip(gradients, (x, x_t), strict=True) if g is not None]
        toward = [
            g @ weight if needed and g is not None else None
            for g, needed in zip(gradients, (by_x, by_x_t), strict=True)
        ]
        total = None
        for g, z in pairs if by_weight else ():
            rows, inputs = g.reshape(-1, g.shape[-1]).t(), z.reshape(-1, z.shape[-1])
            total = rows @ inputs if total is None else torch.addmm(total, rows, inputs)
        first = gradients[0]
        by_bias = first.reshape(-1, first.shape[-1]).sum(0) if needs_bias and first is not None else None
        return *toward, total, by_bias
