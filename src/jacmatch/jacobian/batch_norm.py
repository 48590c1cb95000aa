"""BatchNorm in passes with derivatives: statistics held constant, or written out to be differentiated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from jacmatch.errors import InputError


class _Held(torch.autograd.Function):
    """The identity, but a constant for derivatives by the input: no tangent, and no gradient while `holding`."""

    generate_vmap_rule = True
    holding = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return None if _Held.holding else gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


@contextmanager
def statistics_held() -> Iterator[None]:
    """A backward pass in this context takes frozen statistics as constants: it is one by the input."""
    before, _Held.holding = _Held.holding, True
    try:
        yield
    finally:
        _Held.holding = before


class Statistics(list[tuple[Tensor, Tensor]]):
    """Batch statistics in the order in which a pass computes them, for passes at moved inputs to use again."""

    replaying: Iterator[tuple[Tensor, Tensor]] | None = None

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and mean by channel: of x, or of the pass that is replayed."""
        if self.replaying is not None:
            return next(self.replaying)
        self.append(_moments(_Held.apply(x)))  # type: ignore[no-untyped-call]
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
    written_out: bool,
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
    if training and not written_out:
        if frozen is None:
            return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        _check_count(x)
        normalised: Tensor = _Normalised.apply(x, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[no-untyped-call]
        return normalised
    if training:
        var, mean = _moments(x) if frozen is None else frozen.of(x)
        if running_mean is not None and running_var is not None:
            _check_count(x)
            move_running_statistics(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        # clones, since the buffers may be written before the backward pass
        var, mean = running_var.clone(), running_mean.clone()
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))


class _Normalised(torch.autograd.Function):
    """Batch normalisation whose statistics are constants while `holding`, by PyTorch's own fused kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        if _Held.holding:
            return _Scaled.apply(gradient, x, weight, mean, rstd), None, None, None, None, None, None  # type: ignore[no-untyped-call]
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        backward = torch.ops.aten.native_batch_norm_backward
        found = backward(gradient, x, weight, None, None, mean, rstd, True, ctx.eps, wanted)
        return (*(each if want else None for each, want in zip(found, wanted, strict=True)), None, None, None, None)


class _Scaled(torch.autograd.Function):
    """g γ / √(σ² + ε), the derivative with constant statistics; its own derivative knows that σ depends on x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, weight, mean, rstd)
        return g * _by_channel(rstd if weight is None else rstd * weight, g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, rstd = ctx.saved_tensors
        scale = rstd if weight is None else rstd * weight
        product = _sum_by_channel(gradient * g).to(rstd.dtype)  # ∂/∂(γ rstd)
        by_x = None
        if ctx.needs_input_grad[1]:  # ∂rstd/∂x = − rstd³ (x − μ) / n
            slope = -product * scale * rstd.square() * (x.shape[1] / x.numel())
            by_x = torch.addcmul(_by_channel(-mean * slope, x), x, _by_channel(slope, x))
        by_g = gradient * _by_channel(scale, g) if ctx.needs_input_grad[0] else None
        return by_g, by_x, product * rstd if weight is not None and ctx.needs_input_grad[2] else None, None, None


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def _sum_by_channel(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2).sum(0) if x.dim() > 2 else x.sum(0)


def _check_count(x: Tensor) -> None:
    if x.numel() < 2 * x.shape[1]:
        raise InputError("BatchNorm in training mode must see more than one value of a channel.", got=tuple(x.shape))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean by channel. Means of means, since `torch.var_mean` over these dimensions is slow."""

    def mean(z: Tensor) -> Tensor:
        return z.flatten(2).mean(2).mean(0) if z.dim() > 2 else z.mean(0)

    middle = mean(x)
    return mean((x - middle.view(1, -1, *[1] * (x.dim() - 2))).square()), middle


def move_running_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """The exponential averages that PyTorch keeps, with the unbiased variance of `count` values."""
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    running_var.lerp_(var.detach().to(running_var.dtype) * (count / (count - 1)), momentum)
