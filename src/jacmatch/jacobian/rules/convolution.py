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
    Pair,
    Rule,
    SampleRule,
    Toward,
    applied,
    as_autocast,
    in_dual_pass,
    joined,
    may_depend_on_input,
    parts_of,
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
    if in_dual_pass(weight, bias):
        value, tangent = parts_of(x)
        if tangent is not None:
            return joined(_dual_convolution, value, tangent, weight, bias, settings)
    x, weight, bias = as_autocast(x, weight, bias)
    y: Tensor = applied(_Convolution, x, weight, bias, settings)
    return y


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


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, settings: _Settings, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the requested gradients w.r.t. input, weight and bias, by differentiable rules where needed."""
    if not torch.is_grad_enabled():
        result = _backward(g, x, weight, settings, wanted)
        by_x, by_weight, by_bias = (each if want else None for each, want in zip(result, wanted, strict=True))
        return by_x, by_weight, by_bias
    return (
        applied(_Transposed, g, weight, x, settings) if wanted[0] else None,
        _by_weight(g, x, weight, settings) if wanted[1] else None,
        sum_by_channel(g) if wanted[2] else None,
    )


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    stride, padding, dilation, groups = settings
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _sum(*parts: Tensor | None) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return sum(given[1:], start=given[0]) if given else None


def _wanted(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether input, weight and bias are to get gradients."""
    by_x, by_weight, by_bias, _ = ctx.needs_input_grad
    return (by_x, False, False) if Toward.input and ctx.are_parameters else (by_x, by_weight, by_bias)


class _Convolution(SampleRule):
    """y = W ∗ x + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # the arguments have their types already
            with torch.autocast(x.device.type, enabled=False):
                return _convolved(x, weight, bias, settings)
        return _convolved(x, weight, bias, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.save_for_forward(x, weight)
        ctx.are_parameters = not may_depend_on_input(weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        x = g.new_empty(ctx.shape) if x is None else x  # frozen: only its shape is needed
        return *_gradients(g, x, weight, ctx.settings, _wanted(ctx)), None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, _: None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        if x_t is None and bias_t is not None:
            x_t = torch.zeros_like(x)
        return _sum(
            None if x_t is None else applied(_Convolution, x_t, weight, bias_t, ctx.settings),
            None if weight_t is None else applied(_Convolution, x, weight_t, None, ctx.settings),
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
        by_weight = ctx.needs_input_grad[1] and not (Toward.input and ctx.are_parameters)
        return (
            applied(_Convolution, h, weight, None, ctx.settings) if ctx.needs_input_grad[0] else None,
            _by_weight(g, h, weight, ctx.settings) if by_weight else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, g_t: Tensor | None, weight_t: Tensor | None, *_: Any) -> Tensor | None:
        g, weight, x = ctx.saved_tensors
        return _sum(
            None if g_t is None else applied(_Transposed, g_t, weight, x, ctx.settings),
            None if weight_t is None else applied(_Transposed, g, weight_t, x, ctx.settings),
        )

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
    with torch.autocast(x.device.type, enabled=False):
        pair: Pair = _DualConvolution.apply(x, x_t.to(x.dtype), weight, bias, settings)  # type: ignore[no-untyped-call]
        return pair


class _DualConvolution(torch.autograd.Function):
    """y = W ∗ x + b and ẏ = W ∗ ẋ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_t: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Pair:
        ctx.settings, ctx.shape, trained = settings, x.shape, weight.requires_grad
        ctx.save_for_backward(x if trained else None, x_t if trained else None, weight)
        ctx.set_materialize_grads(False)
        return _convolved(x, weight, bias, settings), _convolved(x_t, weight, None, settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, x_t, weight = ctx.saved_tensors
        by_x, by_x_t, by_weight, by_bias, _ = ctx.needs_input_grad
        results: list[Tensor | None] = [None, None, None, None, None]
        for number, (g, z, by) in enumerate(zip(gradients, (x, x_t), (by_x, by_x_t), strict=True)):
            if g is not None:
                z = g.new_empty(ctx.shape) if z is None else z  # frozen: only its shape is needed
                wanted = (by, by_weight, by_bias and number == 0)
                results[number], of_weight, of_bias = _gradients(g, z, weight, ctx.settings, wanted)
                results[2] = _sum(results[2], of_weight)
                results[3] = _sum(results[3], of_bias)
        return tuple(results)
