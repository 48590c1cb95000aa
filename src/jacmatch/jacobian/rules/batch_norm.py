"""BatchNorm in passes with derivatives: with constant statistics, or composed of its statistics."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from jacmatch.errors import InputError
from jacmatch.jacobian.rules.base import (
    AffineRule,
    Gradients,
    Pair,
    Rule,
    SampleRule,
    applied,
    below,
    dual,
    is_toward_input,
    may_depend_on_input,
)


class _Constant(torch.autograd.Function):
    """The identity, but constant with respect to the input: no tangent, and no gradient to it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return None if is_toward_input() else gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


class Statistics(list[tuple[Tensor, Tensor]]):
    """Batch statistics in the order in which a pass computes them, for passes at moved inputs to use again."""

    replaying: Iterator[tuple[Tensor, Tensor]] | None = None

    def of(self, x: Tensor, *, in_kernel: bool = False) -> tuple[Tensor, Tensor]:
        """Return variance and mean per channel: those of x, or those of the recorded pass if it is replayed."""
        if self.replaying is not None:
            return next(self.replaying)
        if in_kernel and torch._C._are_functorch_transforms_active():
            constant = forward_ad.unpack_dual(x, level=0).primal  # type: ignore[no-untyped-call]
        else:
            constant = applied(_Constant, x)
        self.append(moments(constant))
        return self[-1]

    def replayed(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function with the statistics of the pass that came before, in each call."""

        def call(x: Tensor) -> Tensor:
            self.replaying = iter(tuple(self))
            try:
                return function(x)
            finally:
                self.replaying = None

        return call


def batch_norm(
    composed: bool,
    frozen: Statistics | None,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`; with constant statistics as the affine map γ (x − μ) / √(σ² + ε) + β."""
    adapted = may_depend_on_input(weight, bias) or (not training and may_depend_on_input(running_mean, running_var))
    if training and not composed and not adapted and x.is_floating_point():
        if torch.compiler.is_compiling():
            return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        _check_count(x)
        settings = (running_mean, running_var, momentum, eps, frozen is not None)
        y: Tensor | None = dual(_dual_normalized, x, weight, bias, settings)
        return applied(_Normalized, x, weight, bias, *settings)[0] if y is None else y
    if training:
        var, mean = moments(x) if frozen is None else frozen.of(x)
        if running_mean is not None and running_var is not None:
            _check_count(x)
            move_running_statistics(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        y = None if adapted or composed else dual(_dual_affine, x, running_mean, running_var, weight, bias, eps)
        if y is not None:
            return y
        # clones, since the buffers may be written before the backward pass
        var, mean = running_var.clone(), running_mean.clone()
    scale, shift = scale_and_shift((var + eps).rsqrt(), mean, weight, bias)
    if adapted or torch.compiler.is_compiling():
        return torch.addcmul(by_channel(shift, x), x, by_channel(scale, x))
    return mapped(x, scale, shift) if composed else affine(x, scale, shift)


def mapped(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return scale · x + shift by channel; `addcmul` does not vectorize two operands that are repeated along a row."""
    y = x * by_channel(scale, x)
    return y if shift is None else y.add_(by_channel(shift, x))


class _Normalized(Rule):
    """Batch normalization by PyTorch's own fused kernels; `frozen` statistics are constant in the input."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        frozen: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, *_, ctx.eps, ctx.frozen = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.save_for_forward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        if is_toward_input():
            return _moved(g, x, weight, mean, rstd, ctx.eps, ctx.frozen), *[None] * 7
        wanted = tuple(ctx.needs_input_grad[:3])
        backward = torch.ops.aten.native_batch_norm_backward
        result = backward(g, x, weight, None, None, mean, rstd, True, ctx.eps, wanted)
        return (*(each if want else None for each, want in zip(result, wanted, strict=True)), *[None] * 5)

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any
    ) -> tuple[Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        y_t = _moved(x_t, x, weight, mean, rstd, ctx.eps, ctx.frozen)
        if weight_t is not None:
            y_t = y_t + affine(x, rstd, -mean * rstd) * by_channel(weight_t, x)
        return y_t if bias_t is None else y_t + by_channel(bias_t, x), None, None


def _moved(t: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, frozen: bool) -> Tensor:
    """Apply ∂y/∂x to t. It is symmetric, so it serves tangents and gradients alike."""
    weight = torch.ones_like(rstd) if weight is None else weight
    moved: Tensor = (
        applied(_Scaled, t, x, weight, mean, rstd, eps)
        if frozen
        else applied(_Projected, t, x, weight, mean, rstd, eps)[0]
    )
    return moved


class _Scaled(SampleRule):
    """γ r t with r = 1/√(σ² + ε), the derivative with constant statistics; its own derivative includes ∂σ/∂x."""

    @staticmethod
    def forward(t: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
        return t * by_channel(rstd * weight, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.eps = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        t, x, weight, mean, rstd = _saved(ctx)
        by_t, by_x, by_weight = ctx.needs_input_grad[:3]
        scale = rstd * weight
        product = dot_by_channel(h, t).to(rstd.dtype) if by_x or by_weight else rstd  # ∂/∂(γ r)
        factor = -product * scale * rstd.square() * (x.shape[1] / x.numel())  # ∂r/∂x = − r³ (x − μ) / n
        return (
            affine(h, scale, None) if by_t else None,
            affine(x, factor, -mean * factor) if by_x else None,
            (product * rstd).to(weight.dtype) if by_weight else None,
            *[None] * 3,
        )


class _Projected(Rule):
    """γ r (t − ⟨t⟩ − z ⟨z t⟩), z = r (x − μ), ⟨·⟩ the mean by channel: the derivative with all paths, symmetric."""

    @staticmethod
    def forward(
        t: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _projected(t, x, weight, mean, rstd, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *saved, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*saved, *output[1:])

    @staticmethod
    def backward(ctx: Any, h: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        t, x, weight, mean, rstd, *sums = _saved(ctx)
        by_h, h_zh, h_sum = _projected(h, x, weight, mean, rstd, ctx.eps)
        by_t, by_x, by_weight = ctx.needs_input_grad[:3]
        if not by_x and not by_weight:
            return by_h if by_t else None, *[None] * 5
        t_zt, t_sum = sums if not torch.is_grad_enabled() else _projected(t, x, weight, mean, rstd, ctx.eps)[1:]
        n = x.numel() / x.shape[1]
        a, b = t_zt / n, h_zh / n  # ⟨z t⟩ and ⟨z h⟩
        form = dot_by_channel(h, t).to(rstd.dtype) - t_sum * h_sum / n - n * a * b  # h · (t − ⟨t⟩ − z ⟨z t⟩)
        # the pullback of γ r · form: r and z depend on x
        scale = -weight * rstd.square()
        factor = scale * rstd * (form / n - 2 * a * b)
        result = affine(x, factor, -scale * (a * h_sum + b * t_sum) / n - mean * factor)
        result = torch.addcmul(torch.addcmul(result, h, by_channel(scale * a, h)), t, by_channel(scale * b, t))
        return by_h if by_t else None, result, (form * rstd).to(weight.dtype), *[None] * 3


def _projected(
    t: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The projection of t, and the sums Σ z t and Σ t by channel."""
    if torch.is_grad_enabled():
        z = (x - by_channel(mean, x)) * by_channel(rstd, x)
        n, sum_zt, sum_t = x.numel() / x.shape[1], sum_by_channel(z * t), sum_by_channel(t)
        centred = t - by_channel(sum_t / n, t) - z * by_channel(sum_zt / n, t)
        return centred * by_channel(weight * rstd, t), sum_zt, sum_t
    return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
        t, x, weight, None, None, mean, rstd, True, eps, [True, True, True]
    )


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What a rule saved: t, x, γ, μ, r …; μ and r as functions of x where its result is to be differentiated."""
    t, x, weight, mean, rstd, *more = ctx.saved_tensors
    if torch.is_grad_enabled():
        var, mean = moments(x)
        rstd = (var + ctx.eps).rsqrt()
    return t, x, weight, mean, rstd, *more


def _check_count(x: Tensor) -> None:
    if x.numel() < 2 * x.shape[1]:
        raise InputError("BatchNorm in training mode must see more than one value per channel.", got=tuple(x.shape))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean by channel. Means of means, since `torch.var_mean` over these dimensions is slow."""

    def mean(z: Tensor) -> Tensor:
        return z.flatten(2).mean(2).mean(0) if z.dim() > 2 else z.mean(0)

    middle = mean(x)
    return mean((x - by_channel(middle, x)).square()), middle


def move_running_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Return the exponential averages of PyTorch, with the unbiased variance of `count` values."""
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    running_var.lerp_(var.detach().to(running_var.dtype) * (count / (count - 1)), momentum)


def scale_and_shift(rstd: Tensor, mean: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The numbers s and t by channel with γ r (x − μ) + β = s x + t."""
    scale = rstd if weight is None else rstd * weight
    return scale, -mean * scale if bias is None else bias - mean * scale


def traced_batch_norm(
    frozen: bool,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` as γ (x − μ) / √(σ² + ε) + β, statistics in float32 at least, to be traced."""
    if training:
        seen = below(x) if frozen else x
        dimensions = [0, *range(2, x.dim())]
        seen = seen.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(seen, dimensions, unbiased=False)
        if running_mean is not None and running_var is not None:
            move_running_statistics(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        var, mean = running_var.clone(), running_mean.clone()
    scale, shift = scale_and_shift((var + eps).rsqrt(), mean, weight, bias)
    return x * by_channel(scale, x) + by_channel(shift, x)


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
    # The weight gradient of a normalization with mean 0 and deviation 1: one fused pass, no product in memory.
    ones = a.new_ones(a.shape[1])
    result = torch.ops.aten.native_batch_norm_backward(
        a, b, ones, None, None, torch.zeros_like(ones), ones, True, 0.0, [False, True, False]
    )
    total: Tensor = result[1]
    return total


def affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return scale · x + shift by channel, with rules that compute only the products that are needed."""
    y: Tensor = applied(_Affine, x, scale, shift)
    return y


class _Affine(AffineRule):
    """y = s x + t; scale and shift are not functions of the input of the network."""

    constant = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        return mapped(x, scale, shift)

    @staticmethod
    def gradients(ctx: Any, g: Tensor, x: Any, scale: Tensor, wanted: tuple[bool, bool, bool]) -> Gradients:
        return (
            affine(g, scale, None) if wanted[0] else None,
            dot_by_channel(g, x).to(scale.dtype) if wanted[1] else None,
            sum_by_channel(g).to(scale.dtype) if wanted[2] else None,
        )


def _dual_normalized(
    x: Tensor, x_t: Tensor, weight: Tensor | None, bias: Tensor | None, settings: tuple[Any, ...]
) -> Pair:
    """Value and tangent with the statistics of the batch; the running statistics are wrapped by `torch.func`."""
    buffers = (None if each is None else below(each) for each in settings[:2])
    pair: Pair = _DualNormalized.apply(x, x_t, weight, bias, *buffers, *settings[2:])  # type: ignore[no-untyped-call]
    return pair


class _DualNormalized(torch.autograd.Function):
    """Value and tangent of `_Normalized`: y = γ z + β, and ẏ is `_Scaled` or `_Projected` of ẋ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_t: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        frozen: bool,
    ) -> Pair:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        gamma, sums = torch.ones_like(rstd) if weight is None else weight, list[Tensor]()
        if frozen:
            y_t = x_t * by_channel(rstd * gamma, x_t)
        else:
            y_t, *sums = _projected(x_t, x, gamma, mean, rstd, eps)
        ctx.eps, ctx.frozen = eps, frozen
        ctx.save_for_backward(x, x_t, gamma, mean, rstd, *sums)
        ctx.set_materialize_grads(False)
        return y, y_t

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, x_t, gamma, mean, rstd, *sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: the statistics as functions of x
            var, mean = moments(x)
            rstd = (var + ctx.eps).rsqrt()
            sums = [] if ctx.frozen else _projected(x_t, x, gamma, mean, rstd, ctx.eps)[1:]
        (g, h), (by_x, _, by_weight, by_bias, *_) = gradients, ctx.needs_input_grad
        result = of_weight = by_x_t = shifts = None
        if g is not None:
            result, of_weight, shifts = _projected(g, x, gamma, mean, rstd, ctx.eps)
        if h is not None:
            scale, n = -gamma * rstd.square(), x.numel() / x.shape[1]
            form = dot_by_channel(h, x_t).to(rstd.dtype)
            if ctx.frozen:
                by_x_t, a, b, constant = h * by_channel(rstd * gamma, h), None, None, 0.0
            else:
                by_x_t, h_zh, h_sum = _projected(h, x, gamma, mean, rstd, ctx.eps)
                a, b, t_sum = sums[0] / n, h_zh / n, sums[1]
                form = form - t_sum * h_sum / n - n * a * b
                constant = -scale * (a * h_sum + b * t_sum) / n
            if by_x:
                factor = scale * rstd * (form / n if a is None else form / n - 2 * a * b)
                result = torch.zeros_like(x) if result is None else result
                result.addcmul_(x, by_channel(factor, x)).add_(by_channel(constant - mean * factor, x))
                if a is not None:
                    result.addcmul_(h, by_channel(scale * a, h)).addcmul_(x_t, by_channel(scale * b, x_t))
            of_weight = form * rstd if of_weight is None else of_weight + form * rstd
        weights = of_weight.to(gamma.dtype) if by_weight and of_weight is not None else None
        return result if by_x else None, by_x_t, weights, shifts if by_bias else None, *[None] * 5


def _dual_affine(
    x: Tensor, x_t: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Pair:
    """Value and tangent with the running statistics."""
    scale, shift = scale_and_shift((var + eps).rsqrt(), mean, weight, bias)
    return affine(x, scale, shift), affine(x_t, scale, None)
