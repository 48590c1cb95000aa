"""Operations written out by their definitions, because their own derivatives are missing or wrong where needed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian.rules.activation import gelu, is_gelu, is_relu, relu
from jacmatch.jacobian.rules.batch_norm import Statistics, batch_norm, move_running_statistics
from jacmatch.jacobian.rules.convolution import convolution, is_convolution
from jacmatch.jacobian.rules.layer_norm import layer_norm
from jacmatch.jacobian.rules.linear import linear


class WrittenOut(TorchFunctionMode):
    """Replaces operations whose second derivative is missing or wrong by compositions that are equal and have it.

    hardsigmoid and hardswish have no double backward. Normalisation by batch or layer statistics has a wrong one once a
    forward-mode derivative has been taken: PyTorch holds the saved statistics constant there (pytorch #196699, silent).
    """

    def __init__(self, statistics: bool, frozen: Statistics | None, forward: bool, once: bool = False) -> None:
        super().__init__()
        self.statistics = statistics
        self.frozen = frozen
        self.forward = forward
        self.once = once

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What runs in place of `func`."""
        kwargs = kwargs or {}
        if self.once:  # as an affine map, BatchNorm need not keep its input for the backward pass
            return batch_norm(True, None, *args, **kwargs) if func is functional.batch_norm else func(*args, **kwargs)
        if self.forward and _is_foreign(func):
            raise UnsupportedError(f"the custom operator {func} has no forward-mode rule: its tangent would be zero.")
        if self.forward and func in _WRONG_FORWARD:
            raise UnsupportedError(
                f"the derivative of a forward-mode product through {func.__name__} is wrong in torch."
            )
        if func in (torch.lstm, torch.lstm_cell):
            with _no_fused_recurrence():
                return func(*args, **kwargs)
        if is_convolution(func):
            return convolution(func, *args, **kwargs)
        if is_relu(func, args, kwargs):
            return relu(args[0])
        if self.forward and func is functional.linear:
            return linear(*args, **kwargs)
        if self.forward and is_gelu(func, args, kwargs):
            return gelu(args[0])
        if func is functional.hardsigmoid:
            return functional.relu6(args[0] + 3.0) / 6.0
        if func is functional.hardswish:
            return args[0] * functional.relu6(args[0] + 3.0) / 6.0
        if func is functional.batch_norm:
            return batch_norm(self.statistics and not self.forward, self.frozen, *args, **kwargs)
        if self.statistics and func is functional.glu:
            return _glu(*args, **kwargs)
        if self.statistics and func in (functional.layer_norm, torch.layer_norm):
            return layer_norm(*args, **kwargs)
        if self.statistics and func is functional.instance_norm:
            return _instance_norm(*args, **kwargs)
        return func(*args, **kwargs)


_WRONG_FORWARD = frozenset(
    {
        torch.linalg.solve,
        torch.linalg.solve_ex,
        torch.linalg.tensorsolve,
        torch.linalg.det,
        torch.det,
        Tensor.det,
        torch.logdet,
        Tensor.logdet,
        torch.linalg.householder_product,
    }
)
"""Operations whose Jv is right, but whose derivative of it with respect to parameters is silently not (torch 2.13)."""


def _is_foreign(func: Callable[..., Any]) -> bool:
    """Whether this operator is registered outside torch: it has no forward-mode rule, and its tangent would be 0."""
    # The profiler's mark a span of time, and have no value; the hooks of FSDP2 call them.
    return isinstance(func, torch._ops.OpOverload) and func.namespace not in ("aten", "prims", "prim", "profiler")


@contextmanager
def _no_fused_recurrence() -> Iterator[None]:
    """The oneDNN LSTM of the CPU has no forward-mode derivative; the unfused one has all."""
    before: bool = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    """`torch.nn.functional.glu`, whose forward-mode rule cannot be differentiated."""
    first, gate = torch.chunk(x, 2, dim)
    return first * gate.sigmoid()


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`: layer normalisation over space, one weight for each channel."""
    if not use_input_stats:
        return batch_norm(True, None, x, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None and running_var is not None:
        var, mean = (each.mean(0) for each in torch.var_mean(x.flatten(2), 2, unbiased=False))
        move_running_statistics(running_mean, running_var, mean, var, x[0, 0].numel(), momentum)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = layer_norm(x, x.shape[2:], None, None, eps)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)
