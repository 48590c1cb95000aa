"""Rules that take value and tangent of one operation together, in one `autograd.Function`.

`torch.func` passes each rule with a `jvp` method through several layers of Python, about a millisecond for a call. Here
the dual numbers are taken apart, the function runs on ordinary tensors below `torch.func`, and its two results are one
dual number again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.nn import functional

from jacmatch.jacobian.rules.activation import _GeluMoved
from jacmatch.jacobian.rules.backward_mode import applied, as_autocast
from jacmatch.jacobian.rules.layer_norm import _curvature, _Projected, _projected

Parts = tuple[Tensor, Tensor | None]
Pair = tuple[Tensor, Tensor]


def in_dual_pass(*constants: Tensor | None) -> bool:
    """Return whether exactly one `torch.func.jvp` runs, and these tensors do not take part in it."""
    top = functorch.peek_interpreter_stack()
    if top is None or top.level() != 1 or top.key() != TransformType.Jvp or torch.compiler.is_compiling():
        return False
    return not any(each is not None and functorch.is_functorch_wrapped_tensor(each) for each in constants)


def parts_of(x: Tensor) -> Parts:
    """Return value and tangent of x in a dual pass, as ordinary tensors; the tangent is None if x is constant."""
    value, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return _below(value), None if tangent is None else _below(tangent)


def joined(function: Callable[..., Pair], *arguments: Any) -> Tensor:
    """Return the value and the tangent that the function returns as one dual number; it runs below `torch.func`."""
    layer = functorch.pop_dynamic_layer_stack()
    before = torch._C._is_fwd_grad_enabled()
    torch._C._set_fwd_grad_enabled(False)
    try:
        value, tangent = function(*arguments)
    finally:
        torch._C._set_fwd_grad_enabled(before)
        functorch.push_dynamic_layer_stack(layer)
    wrapped = (functorch._wrap_for_grad(each, 1) for each in (value, tangent))
    dual: Tensor = forward_ad.make_dual(*wrapped)  # type: ignore[no-untyped-call]
    return dual


def _below(x: Tensor) -> Tensor:
    below: Tensor = functorch._unwrap_for_grad(x, 1)
    return below


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, otherwise: Callable[..., Tensor]) -> Tensor:
    """`torch.nn.functional.linear` with value and tangent at once, or the other rule where this one does not apply."""
    if not x.is_floating_point() or x.dim() < 2 or weight.dim() != 2 or not in_dual_pass(weight, bias):
        return otherwise(x, weight, bias)
    value, tangent = parts_of(x)
    return otherwise(x, weight, bias) if tangent is None else joined(_linear, value, tangent, weight, bias)


def _linear(x: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor | None) -> Pair:
    """Value and tangent in the type of autocast; weights are cast here, since `torch.func` would wrap the result."""
    x, weight, bias = as_autocast(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        pair: Pair = _Linear.apply(x, x_t.to(x.dtype), weight, bias)  # type: ignore[no-untyped-call]
        return pair


class _Linear(torch.autograd.Function):
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


def gelu(x: Tensor, otherwise: Callable[..., Tensor]) -> Tensor:
    """`torch.nn.functional.gelu` with value and tangent at once."""
    if not in_dual_pass():
        return otherwise(x)
    value, tangent = parts_of(x)
    return otherwise(x) if tangent is None else joined(_Gelu.apply, value, tangent)


class _Gelu(torch.autograd.Function):
    """y = x Φ(x) and ẏ = ẋ (Φ(x) + x φ(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_t: Tensor) -> Pair:
        ctx.save_for_backward(x, x_t)
        ctx.set_materialize_grads(False)
        return functional.gelu(x), torch.ops.aten.gelu_backward(x_t, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, x_t = ctx.saved_tensors
        moved = _moved if torch.is_grad_enabled() else torch.ops.aten.gelu_backward
        by_x = None if g is None else moved(g, x)
        if g_t is None:
            return by_x, None
        square = x.square()
        curved = (square * -0.5).exp() * (2 - square) * (0.3989422804014327 * (g_t * x_t))
        return curved if by_x is None else by_x + curved, moved(g_t, x)


def _moved(t: Tensor, x: Tensor) -> Tensor:
    y: Tensor = applied(_GeluMoved, t, x)
    return y


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    otherwise: Callable[..., Tensor],
) -> Tensor:
    """`torch.nn.functional.layer_norm` with value and tangent at once."""
    shape = tuple(normalized_shape)
    low = x.dtype not in (torch.float32, torch.float64) or (weight is not None and weight.dtype != x.dtype)
    if low or torch.is_autocast_enabled(x.device.type) or not in_dual_pass(weight, bias):
        return otherwise(x, shape, weight, bias, eps)
    value, tangent = parts_of(x)
    if tangent is None:
        return otherwise(x, shape, weight, bias, eps)
    return joined(_LayerNorm.apply, value, tangent, shape, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    """y = γ z + β with z = r (x − μ), and ẏ = γ P ẋ (`layer_norm._Projected`)."""

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
