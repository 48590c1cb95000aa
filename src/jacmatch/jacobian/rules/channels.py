"""Maps that scale and shift each channel, and sums over all that is not a channel."""

from typing import Any

import torch
from torch import Tensor

from jacmatch.jacobian.rules.backward_mode import Toward, along_probes, applied


def by_channel(values: Tensor, like: Tensor) -> Tensor:
    """One number for each channel, in the type of `like` and shaped to be broadcast to it."""
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def sum_by_channel(x: Tensor) -> Tensor:
    """Σ x over batch and space, for each channel."""
    return x.reshape(*x.shape[:2], -1).sum(2).sum(0) if x.dim() > 2 else x.sum(0)


def dot_by_channel(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b over batch and space, for each channel."""
    if torch.is_grad_enabled() or a.device.type != "cpu" or a.dtype not in (torch.float32, torch.float64):
        return sum_by_channel(a * b)
    # The gradient by the weight of a normalization with mean 0 and deviation 1: one fused pass, no product in memory.
    ones = a.new_ones(a.shape[1])
    result = torch.ops.aten.native_batch_norm_backward(
        a, b, ones, None, None, torch.zeros_like(ones), ones, True, 0.0, [False, True, False]
    )
    total: Tensor = result[1]
    return total


def affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Scale · x + shift by channel, with rules that compute only the products that are needed."""
    y: Tensor = applied(_Affine, x, scale, shift)
    return y


class _Affine(torch.autograd.Function):
    """y = s x + t; scale and shift are not functions of the input of the network."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        if shift is None:
            return x * by_channel(scale, x)
        return torch.addcmul(by_channel(shift, x), x, by_channel(scale, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, shift = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if scale.requires_grad else None, scale)
        ctx.save_for_forward(x, scale)
        ctx.shift = None if shift is None else shift.dtype

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        x, scale = ctx.saved_tensors
        by_x, by_scale, by_shift = ctx.needs_input_grad
        if Toward.input:
            by_scale = by_shift = False
        return (
            affine(g, scale, None) if by_x else None,
            dot_by_channel(g, x).to(scale.dtype) if by_scale else None,
            sum_by_channel(g).to(ctx.shift) if by_shift else None,
        )

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, scale_t: Tensor | None, shift_t: Tensor | None) -> Tensor:
        x, scale = ctx.saved_tensors
        y = affine(torch.zeros_like(x) if x_t is None else x_t, scale, shift_t)
        return y if scale_t is None else y + x * by_channel(scale_t, x)

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
        x, scale, shift = arguments
        if dims[0] is None or dims[1] is not None or dims[2] is not None:
            return along_probes(_Affine, info, dims, arguments)
        y = applied(_Affine, x.movedim(dims[0], 0).flatten(0, 1), scale, shift)
        return y.unflatten(0, (info.batch_size, -1)), 0
