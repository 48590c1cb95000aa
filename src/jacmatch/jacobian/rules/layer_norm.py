"""Layer normalization with derivative rules by PyTorch's fused kernels.

PyTorch's derivative of a forward-mode product treats the statistics as constants (pytorch #196699), and a composition
of elementary operations takes eight times as long as the rules below.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacmatch.jacobian.rules.base import Pair, Rule, applied, dual


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """`torch.nn.functional.layer_norm`: z = r (x − μ) with r = 1/√(σ² + ε) over the last axes, then γ z + β."""
    shape = tuple(normalized_shape)
    leading = x.dim() - len(shape)
    low = x.dtype not in (torch.float32, torch.float64) or (weight is not None and weight.dtype != x.dtype)
    autocast = torch.is_autocast_enabled(x.device.type)
    y = None if low or autocast else dual(_dual_layer_norm, x, leading, weight, bias, eps)
    if y is not None:
        return y
    if autocast and x.dtype != torch.float64:
        x = x.float()  # as autocast does
    rows = x.reshape(x.shape[:leading].numel(), -1)
    return _scaled(applied(_Normalized, rows, eps)[0].view(x.shape), weight, bias)


def _dual_layer_norm(
    x: Tensor, x_t: Tensor, leading: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Pair:
    rows = x.reshape(x.shape[:leading].numel(), -1)
    z, mean, rstd = applied(_Normalized, rows, eps)
    z_t = applied(_Projected, x_t.reshape_as(rows), rows, mean, rstd, eps)
    return _scaled(z.view(x.shape), weight, bias), _scaled(z_t.view(x.shape), weight, None)


def _scaled(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return γ z + β."""
    if weight is None:
        return z if bias is None else z + bias
    return z * weight if bias is None else torch.addcmul(bias, z, weight)


class _Normalized(Rule):
    """The normalized z of each row, its mean, and r."""

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, x.shape[1:], None, None, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:])
        ctx.save_for_forward(x, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None]:
        return applied(_Projected, g, *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> tuple[Tensor, None, None]:
        return applied(_Projected, tangent, *ctx.saved_tensors, ctx.eps), None, None


class _Projected(Rule):
    """P t = r (t − ⟨t⟩ − z ⟨z t⟩), ⟨·⟩ the mean of a row: the derivative of z; symmetric, so for gradients as well."""

    @staticmethod
    def forward(t: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
        return _projected(t, x, mean, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.eps = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        t, x, mean, rstd = ctx.saved_tensors
        by_t = by_x = None
        if ctx.needs_input_grad[0]:
            by_t = applied(_Projected, h, x, mean, rstd, ctx.eps)
        if ctx.needs_input_grad[1]:
            by_x = _curvature(t, h, x, mean, rstd, ctx.eps)
        return by_t, by_x, None, None, None


def _projected(t: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.native_layer_norm_backward(
        t, x, x.shape[1:], mean, rstd, None, None, [True, False, False]
    )[0]
    return result


def _curvature(t: Tensor, h: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """∂(h · P t)/∂x = −r² (z (c − 2 a b) + a (h − ⟨h⟩) + b (t − ⟨t⟩)).

    With a = ⟨z t⟩, b = ⟨z h⟩, c = ⟨h t⟩ − ⟨h⟩⟨t⟩ − a b.
    """
    if torch.is_grad_enabled():  # to be differentiated once more: the statistics as functions of x
        var, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        rstd = (var + eps).rsqrt()
    z = (x - mean) * rstd
    t_mean, h_mean = t.mean(1, keepdim=True), h.mean(1, keepdim=True)
    a, b = _dot(z, t), _dot(z, h)
    c = _dot(h, t) - h_mean * t_mean - a * b
    scale = -rstd.square()
    result = z * (scale * (c - 2 * a * b)) - scale * (a * h_mean + b * t_mean)
    return torch.addcmul(torch.addcmul(result, h, scale * a), t, scale * b)


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """⟨u v⟩ of each row, (rows, 1)."""
    return (u * v).mean(1, keepdim=True)
