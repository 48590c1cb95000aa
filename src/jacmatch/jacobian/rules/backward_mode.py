"""Which derivative a backward pass is for: by the input only, or by everything.

A product vᵀJ is a backward pass by the input. Our rules then leave out what only parameters would get, and treat frozen
statistics as constants. `torch.autograd.Function` does not pass on which gradients are needed, so a flag does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.utils import unwrap_dead_wrappers


class Toward:
    """Whether the backward pass that runs is one by the input."""

    input = False


@contextmanager
def toward_input() -> Iterator[None]:
    """Make backward passes in this context ones by the input: rules give parameters no gradient."""
    before, Toward.input = Toward.input, True
    try:
        yield
    finally:
        Toward.input = before


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return `function.apply(*arguments)` without the search for default arguments, which takes 0.1 ms a call."""
    if torch._C._are_functorch_transforms_active():
        return custom_function_call(function, *arguments)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]


def may_depend_on_input(*tensors: Tensor | None) -> bool:
    """Return whether any of these is computed, perhaps from the input: no leaf, or wrapped by `torch.func`."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(each is not None and (wrapped(each) or not each.is_leaf) for each in tensors)


def as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments in the type that autocast gives a product of matrices; as they are where it is off."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return x, weight, bias


def along_probes(
    function: type[torch.autograd.Function], info: Any, dims: Any, arguments: tuple[Any, ...]
) -> tuple[Tensor | tuple[Tensor, ...], Any]:
    """Apply a vmap rule that is right for any function: one call for each entry of the mapped axis, stacked."""
    calls = [
        applied(
            function,
            *(
                a.select(dim, entry) if isinstance(a, Tensor) and dim is not None else a
                for a, dim in zip(arguments, dims, strict=True)
            ),
        )
        for entry in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(several) for several in zip(*calls, strict=True)), (0,) * len(calls[0])
