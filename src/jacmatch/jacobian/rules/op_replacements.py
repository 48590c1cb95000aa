"""Which operations are replaced in a pass with derivatives, and by what: the one mechanism.

Calls from Python are looked up in a table of faster rules, or of forms that `torch.compile` can trace. Operators whose
derivative is wrong or missing in PyTorch are replaced in ATen's dispatcher (`aten_kernels`), however they are called.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian.rules import aten_kernels
from jacmatch.jacobian.rules.activation import gelu, relu
from jacmatch.jacobian.rules.attention import attention
from jacmatch.jacobian.rules.base import shared, switched
from jacmatch.jacobian.rules.batch_norm import Statistics, batch_norm, traced_batch_norm
from jacmatch.jacobian.rules.convolution import convolution
from jacmatch.jacobian.rules.layer_norm import layer_norm
from jacmatch.jacobian.rules.linear import linear

Rule = Callable[..., Any]


class Replacements(TorchFunctionMode):
    """Replace the functions of a table by their rules within the context.

    In forward mode, operators from outside PyTorch are refused: without a forward-mode rule their tangent is 0.
    """

    def __init__(self, table: Mapping[Callable[..., Any], Rule], *, forward: bool = False) -> None:
        super().__init__()
        self.table, self.forward = table, forward
        self.calls: set[Any] = set()  # each function with the one before it
        self.last: Any = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the rule of `func`, or `func` itself."""
        if self.forward:
            if _is_foreign(func):
                raise UnsupportedError(f"the custom operator {func} has no forward-mode rule: its tangent is zero.")
            self.calls.add((self.last, func))
            self.last = func
        return self.table.get(func, func)(*args, **(kwargs or {}))


def differentiated(*, composed: bool, frozen: Statistics | None, forward: bool) -> Replacements:
    """Return the replacements for a pass whose products are differentiated; `composed` applies to BatchNorm."""
    table: dict[Callable[..., Any], Rule] = {
        **_RULES,
        functional.batch_norm: partial(batch_norm, composed and not forward, frozen),
        **(_FORWARD_RULES if forward else {}),
    }
    return Replacements(table, forward=forward)


def calls_until_now() -> int | None:
    """Return a number for the functions called so far in the running pass in forward mode, each with the one before."""
    mode = torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
    return hash(frozenset(mode.calls)) if isinstance(mode, Replacements) else None


def once() -> Replacements:
    """Return the replacements for one derivative in reverse mode; affine BatchNorm need not save its input."""
    return Replacements(_ONCE)


def compiled(*, frozen: bool) -> Replacements:
    """Return the replacements for a pass that `torch.compile` traces: forms in plain operations."""
    return Replacements({**_COMPILED, functional.batch_norm: partial(traced_batch_norm, frozen)})


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`; under `torch.func`, PyTorch fills the mask of a transposed x in another order."""
    if not training or inplace or not 0 < p < 1 or x.device.type != "cpu" or x.is_contiguous():
        return functional.dropout(x, p, training, inplace)
    return x * torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)


def _multiplied_in_place(x: Tensor, other: Any) -> Tensor:
    """`x *= other`; where both are one tensor, forward mode would take its new value for the old one."""
    return x.mul_(x.clone() if other is x else other)


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
    """`torch.nn.functional.instance_norm` by the faster rule of layer normalization."""
    settings = (weight, bias, running_mean, running_var, use_input_stats, momentum, eps)
    return aten_kernels.instance_norm(x, *settings, by=layer_norm)


def _unfused(func: Rule) -> Rule:
    """The recurrent layer without oneDNN, whose LSTM has no forward-mode derivative."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with shared("onednn", partial(switched, torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False)):
            return func(*args, **kwargs)

    return call


_RULES: dict[Callable[..., Any], Rule] = {
    **{func: partial(convolution, func) for func in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **dict.fromkeys((functional.relu, torch.relu, Tensor.relu), relu),
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), _multiplied_in_place),
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), layer_norm),
    **{func: _unfused(func) for func in (torch.lstm, torch.lstm_cell)},
    functional.instance_norm: _instance_norm,
    **dict.fromkeys((torch.sinc, torch.special.sinc, Tensor.sinc), aten_kernels.sinc),
    **dict.fromkeys((torch.logaddexp, Tensor.logaddexp), aten_kernels.log_sum),
}
_FORWARD_RULES: dict[Callable[..., Any], Rule] = {
    functional.linear: linear,
    functional.gelu: gelu,
    functional.dropout: _dropout,
    functional.scaled_dot_product_attention: partial(attention, False),
}
_ONCE: dict[Callable[..., Any], Rule] = {functional.batch_norm: partial(batch_norm, True, None)}
_COMPILED: dict[Callable[..., Any], Rule] = {
    functional.hardsigmoid: lambda x, inplace=False: aten_kernels.hardsigmoid(x),
    functional.hardswish: lambda x, inplace=False: aten_kernels.hardswish(x),
    functional.scaled_dot_product_attention: partial(attention, True),
}


def _is_foreign(func: Callable[..., Any]) -> bool:
    """Whether this operator is registered outside torch."""
    # Those of the profiler mark a span of time and return no value; the hooks of FSDP2 call them.
    return isinstance(func, torch._ops.OpOverload) and func.namespace not in ("aten", "prims", "prim", "profiler")
