"""Layer normalization with derivative rules by PyTorch's fused kernels.

Its own derivative of a forward-mode product holds the statistics constant (pytorch #196699), and the definition written
out takes eight times as long as the rules below.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacmatch.jacobian.rules.base import Pair, Rule, applied, in_dual_pass, joined, parts_of


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
    if not low and not torch.is_autocast_enabled(x.device.type) and in_dual_pass(weight, bias):
        value, tangent = parts_of(x)
        if tangent is not None:
            return joined(_DualLayerNorm.apply, value, tangent, shape, weight, bias, eps)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.float()  # as autocast does
    rows = x.reshape(x.shape[:leading].numel(), -1)
    z: Tensor = applied(_Normalised, rows, eps)[0].view(x.shape)
    if weight is None:
        return z if bias is None else z + bias
    return z * weight if bias is None else torch.addcmul(bias, z, weight)


class _Normalised(Rule):
    """Z of each row, its mean, and r."""

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
    result = torch.addcmul(-scale * (a * h_mean + b * t_mean), z, scale * (c - 2 * a * b))
    return torch.addcmul(torch.addcmul(result, h, scale * a), t, scale * b)


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """⟨u v⟩ of each row, (rows, 1)."""
    return torch.bmm(u.unsqueeze(1), v.unsqueeze(2)).squeeze(2) / u.shape[1]


class _DualLayerNorm(torch.autograd.Function):
    """y = γ z + β with z = r (x − μ), and ẏ = γ P ẋ (`_Projected`)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_t: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Pair:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.eps, ctx.shape, ctx.leading = eps, shape, x.dim() - len(shape)
        rows = x.reshape(x.shape[: ctx.leading].numel(), -1)
        moved = _projected(x_t.reshape_as(rows), rows, mean.view(-1, 1), rstd.view(-1, 1)).view(x.shape)
        ctx.save_for_backward(x, x_t, weight, mean, rstd, moved)
        return y, moved if weight is None else moved * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_t: Tensor) -> tuple[Tensor | None, ...]:
        x, x_t, weight, mean, rstd, moved = ctx.saved_tensors
        rows, tangents = (z.reshape(z.shape[: ctx.leading].numel(), -1) for z in (x, x_t))
        mean, rstd, twice = mean.view(-1, 1), rstd.view(-1, 1), torch.is_grad_enabled()
        h, h_t = ((z if weight is None else z * weight).reshape_as(rows) for z in (g, g_t))

        def projected(t: Tensor) -> Tensor:
            again: Tensor = (
                applied(_Projected, t, rows, mean, rstd, ctx.eps) if twice else _projected(t, rows, mean, rstd)
            )
            return again

        by_x = (projected(h) + _curvature(tangents, h_t, rows, mean, rstd, ctx.eps)).view(x.shape)
        by_weight = by_bias = None
        if ctx.needs_input_grad[3]:
            if twice:
                var, mu = torch.var_mean(rows, 1, unbiased=False, keepdim=True)
                z, moved = (rows - mu) * (var + ctx.eps).rsqrt(), projected(tangents).view(x.shape)
            else:
                z = (rows - mean) * rstd
            by_weight = torch.addcmul(g * z.view(x.shape), g_t, moved).sum_to_size(weight.shape)
        if ctx.needs_input_grad[4]:
            by_bias = g.sum_to_size(ctx.shape)  # not sum(dims): no dims are all dims
        return by_x, projected(h_t).view(x.shape), None, by_weight, by_bias, None
