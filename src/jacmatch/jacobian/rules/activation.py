"""ReLU and GELU with derivative rules that skip zeros and compute each value once."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jacmatch.jacobian.rules.base import Pair, Rule, applied, in_dual_pass, joined, parts_of


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0). In PyTorch, its second derivatives are tensors of zeros, which are added to other gradients."""
    if inplace or not x.is_floating_point() or torch.compiler.is_compiling():
        return functional.relu(x, inplace)
    if in_dual_pass():
        value, tangent = parts_of(x)
        if tangent is not None:
            return joined(_DualRectified.apply, value, tangent)
    y: Tensor = applied(_Rectified, x)
    return y


class _Rectified(torch.autograd.Function):
    """y = max(x, 0)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return applied(_Passed, g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return applied(_Passed, tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Any, Any]:
        return applied(_Rectified, x), dims[0]


class _DualRectified(torch.autograd.Function):
    """y = max(x, 0), and ẏ = ẋ where y > 0, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_t: Tensor) -> Pair:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        return y, _passed(x_t, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        passed = partial(applied, _Passed) if torch.is_grad_enabled() else _passed
        needed = zip(gradients, ctx.needs_input_grad, strict=True)
        return tuple(passed(g, y) if need and g is not None else None for g, need in needed)


def _passed(t: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(t, y, 0)  # type: ignore[no-any-return]


class _Passed(torch.autograd.Function):
    """t where y > 0, else 0: linear in t, and constant in y almost everywhere."""

    @staticmethod
    def forward(t: Tensor, y: Tensor) -> Tensor:
        return _passed(t, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, None]:
        return (None if h is None else applied(_Passed, h, *ctx.saved_tensors)), None

    @staticmethod
    def jvp(ctx: Any, t_t: Tensor | None, _: Any) -> Any:
        (y,) = ctx.saved_tensors
        return torch.zeros_like(y) if t_t is None else applied(_Passed, t_t, y)

    @staticmethod
    def vmap(info: Any, dims: Any, t: Tensor, y: Tensor) -> tuple[Any, Any]:
        t, y = (each if dim is None else each.movedim(dim, 0) for each, dim in zip((t, y), dims, strict=True))
        if dims[0] is None:
            t = t.expand(info.batch_size, *t.shape)
        return applied(_Passed, t, y.expand_as(t)), 0


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return x Φ(x), Φ the distribution function of the standard normal."""
    if approximate != "none" or not x.is_floating_point():
        return functional.gelu(x, approximate=approximate)
    if in_dual_pass():
        value, tangent = parts_of(x)
        if tangent is not None:
            return joined(_DualGelu.apply, value, tangent)
    y: Tensor = applied(_Gelu, x)
    return y


class _Gelu(torch.autograd.Function):
    """y = x Φ(x)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return functional.gelu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return applied(_GeluMoved, g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return applied(_GeluMoved, tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Any, Any]:
        return applied(_Gelu, x), dims[0]


class _GeluMoved(Rule):
    """t (Φ(x) + x φ(x)), and φ(x) (2 − x²) is the second derivative."""

    @staticmethod
    def forward(t: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(t, x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
        t, x = ctx.saved_tensors
        by_x = None
        if ctx.needs_input_grad[1]:
            by_x = _curvature(x) * (h * t)
        return (applied(_GeluMoved, h, x) if ctx.needs_input_grad[0] else None), by_x


class _DualGelu(torch.autograd.Function):
    """y = x Φ(x) and ẏ = ẋ (Φ(x) + x φ(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_t: Tensor) -> Pair:
        ctx.save_for_backward(x, x_t)
        ctx.set_materialize_grads(False)
        return functional.gelu(x), torch.ops.aten.gelu_backward(x_t, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, x_t = ctx.saved_tensors
        moved = _moved_gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_backward
        by_x = None if g is None else moved(g, x)
        if g_t is None:
            return by_x, None
        curvature, both = _curvature(x), g_t * x_t
        return curvature * both if by_x is None else torch.addcmul(by_x, curvature, both), moved(g_t, x)


def _curvature(x: Tensor) -> Tensor:
    """φ(x) (2 − x²); on a CPU `exp2` takes a quarter of the time of `exp`."""
    square = x.square()
    return (square * (-0.5 / math.log(2))).exp2_() * ((2 - square) * (1 / math.sqrt(2 * math.pi)))


def _moved_gelu(t: Tensor, x: Tensor) -> Tensor:
    y: Tensor = applied(_GeluMoved, t, x)
    return y
