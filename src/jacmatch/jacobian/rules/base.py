"""Parts shared by the rules: backward passes to the input only, maps over directions, and dual passes.

A product vᵀJ is a backward pass to the input. Our rules then omit the gradients of parameters, and treat frozen
statistics as constants. `torch.autograd.Function` does not pass on which gradients are needed, so a flag does.

`torch.func` passes each rule with a `jvp` method through several layers of Python, about a millisecond for a call. In a
dual pass (`in_dual_pass`, `parts_of`, `joined`) the dual numbers are taken apart, one function computes value and
tangent from ordinary tensors below `torch.func`, and its two results are one dual number again.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

Pair = tuple[Tensor, Tensor]


_TOWARD = "jacmatch-toward-input"


class _Toward:
    """Whether the running backward pass is only w.r.t. the input: in this thread, or in its GPU thread."""

    @property
    def input(self) -> bool:
        """Read the flag; autograd hands these objects on to its own threads."""
        return torch._C._is_key_in_tls(_TOWARD) and bool(torch._C._get_obj_in_tls(_TOWARD))


Toward = _Toward()


@contextmanager
def toward_input() -> Iterator[None]:
    """Context in which backward passes compute gradients of the input only: rules return none for parameters."""
    before = Toward.input
    torch._C._stash_obj_in_tls(_TOWARD, True)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_TOWARD, before)


_lock = threading.RLock()
_running: dict[Hashable, tuple[int, ExitStack]] = {}


@contextmanager
def shared(name: Hashable, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter `make()`, which sets a switch of the process, in the first thread; exit it in the last."""
    with _lock:
        count, stack = _running.get(name) or (0, ExitStack())
        if not count:
            stack.enter_context(make())
        _running[name] = count + 1, stack
    try:
        yield
    finally:
        with _lock:
            count, stack = _running.pop(name)
            if count > 1:
                _running[name] = count - 1, stack
            else:
                stack.close()


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Return `function.apply(*arguments)` without the search for default arguments, which takes 0.1 ms a call."""
    if torch._C._are_functorch_transforms_active():
        return custom_function_call(function, *arguments)
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]


def may_depend_on_input(*tensors: Tensor | None) -> bool:
    """Return whether any of these tensors may depend on the input: it is not a leaf, or is wrapped by `torch.func`."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(each is not None and (wrapped(each) or not each.is_leaf) for each in tensors)


def as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments in the type that autocast gives a product of matrices; as they are where it is off."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return x, weight, bias


class Rule(torch.autograd.Function):
    """A function whose rule for `torch.func.vmap` is right for any function: one call for each direction, stacked."""

    @classmethod
    def vmap(cls, info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """Return the stacked results and their mapped axes."""
        calls = [
            applied(
                cls,
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


class SampleRule(Rule):
    """A rule whose first argument has samples in its first axis: directions of that argument alone are more samples."""

    @classmethod
    def vmap(cls, info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """Return the result of one call where only the first argument is mapped."""
        if dims[0] is None or any(dim is not None for dim in dims[1:]):
            return super().vmap(info, dims, *arguments)
        y = applied(cls, arguments[0].movedim(dims[0], 0).flatten(0, 1), *arguments[1:])
        return y.unflatten(0, (info.batch_size, -1)), 0


def in_dual_pass(*constants: Tensor | None) -> bool:
    """Return whether exactly one `torch.func.jvp` runs, and these tensors do not take part in it."""
    top = functorch.peek_interpreter_stack()
    if top is None or top.level() != 1 or top.key() != TransformType.Jvp or torch.compiler.is_compiling():
        return False
    return not any(each is not None and functorch.is_functorch_wrapped_tensor(each) for each in constants)


def parts_of(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent of x in a dual pass, as ordinary tensors; the tangent is None if x is constant."""
    value, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return below(value), None if tangent is None else below(tangent)


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


def below(x: Tensor) -> Tensor:
    """Return the tensor outside of the one transform of `torch.func`, with the graph of its parameters only."""
    outside: Tensor = functorch._unwrap_for_grad(x, 1)
    return outside
