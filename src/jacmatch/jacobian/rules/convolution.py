"""Convolution with derivative rules that skip zeros and compute each value once.

PyTorch's forward-mode rule of a convolution computes a second convolution with the tangent of the weight, which is zero
here. Its double backward takes the weight gradient as a convolution of transposed tensors, whose kernel is as
large as an image. Below, every derivative is one call of the three kernels that ordinary training uses.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacmatch.jacobian.rules.base import (
    AffineRule,
    Gradients,
    Pair,
    Rule,
    applied,
    as_autocast,
    dual,
    is_toward_input,
    may_depend_on_input,
)
from jacmatch.jacobian.rules.batch_norm import sum_by_channel


class _Settings(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


_SPACE: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def convolution(
    func: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`func` itself, `torch.conv1d`, `conv2d` or `conv3d`, with other derivative rules.

    PyTorch's own are used for a sample without batch, padding given by name, complex numbers and empty tensors.
    """
    space = _SPACE[func]
    dense = x.is_floating_point() and x.dim() == weight.dim() == space + 2 and x.numel() and x.layout == torch.strided
    if isinstance(padding, str) or not dense or torch.compiler.is_compiling():
        return func(x, weight, bias, stride, padding, dilation, groups)
    settings = _Settings(_each(stride, space), _each(padding, space), _each(dilation, space), groups)
    y: Tensor | None = dual(_dual_convolution, x, weight, bias, settings)
    return applied(_Convolution, *as_autocast(x, weight, bias), settings) if y is None else y


def _each(value: int | Sequence[int], space: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * space if len(values) == 1 else values


def _by_weight(g: Tensor, x: Tensor, weight: Tensor, settings: _Settings) -> Tensor:
    """Return the gradient with respect to the weight."""
    by_weight: Tensor = _backward(g, x, weight, settings, (False, True, False))[1]
    return by_weight


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, settings: _Settings, wanted: tuple[bool, ...]
) -> tuple[Any, Any, Any]:
    """Return the requested gradients with respect to input, weight and bias."""
    stride, padding, dilation, groups = settings
    outputs = [0] * len(stride)
    sizes = [weight.shape[0]] if wanted[2] else None
    result: tuple[Any, Any, Any] = torch.ops.aten.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, False, outputs, groups, list(wanted)
    )
    return result


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    stride, padding, dilation, groups = settings
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


class _Convolution(AffineRule):
    """y = W ∗ x + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # the arguments have their types already
            with torch.autocast(x.device.type, enabled=False):
                return _convolved(x, weight, bias, settings)
        return _convolved(x, weight, bias, settings)

    @staticmethod
    def gradients(ctx: Any, g: Tensor, x: Any, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Gradients:
        (settings,) = ctx.settings
        x = g.new_empty(ctx.shape) if x is None else x  # frozen: only its shape is needed
        if not torch.is_grad_enabled():
            result = _backward(g, x, weight, settings, wanted)
            by_x, by_weight, by_bias = (each if want else None for each, want in zip(result, wanted, strict=True))
            return by_x, by_weight, by_bias
        return (  # to be differentiated: by rules of their own
            applied(_Transposed, g, weight, x, settings) if wanted[0] else None,
            _by_weight(g, x, weight, settings) if wanted[1] else None,
            sum_by_channel(g) if wanted[2] else None,
        )


class _Transposed(Rule):
    """The gradient of a convolution w.r.t. its input, Wᵀ ∗ g: linear in g and in W; of x it needs only the shape."""

    @staticmethod
    def forward(g: Tensor, weight: Tensor, x: Tensor, settings: _Settings) -> Tensor:
        by_x: Tensor = _backward(g, x, weight, settings, (True, False, False))[0]
        return by_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, weight, x, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, weight)
        ctx.save_for_forward(g, weight, x)
        ctx.are_parameters = not may_depend_on_input(weight)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return None, None, None, None
        g, weight = ctx.saved_tensors
        by_weight = ctx.needs_input_grad[1] and not (is_toward_input() and ctx.are_parameters)
        return (
            applied(_Convolution, h, weight, None, ctx.settings) if ctx.needs_input_grad[0] else None,
            _by_weight(g, h, weight, ctx.settings) if by_weight else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, g_t: Tensor | None, weight_t: Tensor | None, *_: Any) -> Tensor | None:
        g, weight, x = ctx.saved_tensors
        moved: Tensor | None = None if g_t is None else applied(_Transposed, g_t, weight, x, ctx.settings)
        if weight_t is None:
            return moved
        by_weight: Tensor = applied(_Transposed, g, weight_t, x, ctx.settings)
        return by_weight if moved is None else moved + by_weight

    @classmethod
    def vmap(cls, info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
        g, weight, x, settings = arguments
        if dims[0] is None or dims[1] is not None:
            return super().vmap(info, dims, *arguments)
        like = x.select(dims[2], 0) if dims[2] is not None else x
        like = like[:1].expand(info.batch_size * len(like), *like.shape[1:])
        y = applied(_Transposed, g.movedim(dims[0], 0).flatten(0, 1), weight, like, settings)
        return y.unflatten(0, (info.batch_size, -1)), 0


def _dual_convolution(x: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Pair:
    """Value and tangent in the type of autocast."""
    x, weight, bias = as_autocast(x, weight, bias)
    return (
        applied(_Convolution, x, weight, bias, settings),
        applied(_Convolution, x_t.to(x.dtype), weight, None, settings),
    )
