"""Parts shared by the rules: backward passes to the input only, maps over directions, and dual passes.

A product vᵀJ is a backward pass to the input. Our rules then omit the gradients of parameters, and treat frozen
statistics as constants. `torch.autograd.Function` does not pass on which gradients are needed, so a flag does.

`torch.func` passes each rule with a `jvp` method through several layers of Python, about a millisecond for a call. In a
dual pass (`dual`) the dual number is taken apart, value and tangent are computed from ordinary tensors below
`torch.func`, and the two results are one dual number again.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_TOWARD = "jacmatch-toward-input"  # autograd passes objects of this kind to its threads


def is_dual(x: Tensor) -> bool:
    """Return whether a tensor has a tangent of `torch.autograd.forward_ad`, outside of torch.func."""
    if torch._C._are_functorch_transforms_active():
        return False
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def is_toward_input() -> bool:
    """Return whether the running backward pass is only w.r.t. the input: in this thread, or in its GPU thread."""
    return torch._C._is_key_in_tls(_TOWARD) and bool(torch._C._get_obj_in_tls(_TOWARD))


def toward_input() -> AbstractContextManager[None]:
    """Context in which backward passes compute gradients of the input only: rules return none for parameters."""
    return switched(is_toward_input, partial(torch._C._stash_obj_in_tls, _TOWARD), True)


@contextmanager
def switched(read: Callable[[], bool], write: Callable[[bool], Any], value: bool) -> Iterator[None]:
    """Context in which a switch has this value."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


_lock = threading.RLock()
_running: dict[Hashable, tuple[int, ExitStack]] = {}


@contextmanager
def shared(name: Hashable, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter the process-wide context `make()` in the first thread; exit it in the last."""
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


class AffineRule(SampleRule):
    """y = B(x, W) + b, with B linear in x and in W; a subclass has `forward(x, W, b, *settings)` and `gradients`."""

    constant = False  # whether W and b never depend on the input of the network

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x only if W is trained."""
        x, weight, bias, *ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.save_for_forward(x, weight)
        ctx.are_parameters = cls.constant or not may_depend_on_input(weight, bias)

    @classmethod
    def backward(cls, ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the requested gradients w.r.t. x, W and b."""
        others = [None] * len(ctx.settings)
        if g is None:
            return None, None, None, *others
        wanted = ctx.needs_input_grad[:3]
        if is_toward_input() and ctx.are_parameters:
            wanted = (wanted[0], False, False)
        x, weight = ctx.saved_tensors
        return *cls.gradients(ctx, g, x, weight, wanted), *others

    @staticmethod
    def gradients(ctx: Any, g: Tensor, x: Any, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Gradients:
        """Return the requested gradients w.r.t. x, W and b, None for the others."""
        raise NotImplementedError

    @classmethod
    def jvp(
        cls, ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any
    ) -> Tensor | None:
        """Return B(ẋ, W) + B(x, Ẇ) + ḃ."""
        x, weight = ctx.saved_tensors
        if x_t is None and bias_t is not None:
            x_t = torch.zeros_like(x)
        moved: Tensor | None = None if x_t is None else applied(cls, x_t, weight, bias_t, *ctx.settings)
        if weight_t is None:
            return moved
        by_weight: Tensor = applied(cls, x, weight_t, None, *ctx.settings)
        return by_weight if moved is None else moved + by_weight


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


def dual(rule: Callable[..., Pair], x: Tensor, *arguments: Any) -> Tensor | None:
    """Return `rule(x, ẋ, *arguments)` as one dual number; None except in a dual pass of x alone."""
    if not in_dual_pass(*(each for each in arguments if isinstance(each, Tensor))):
        return None
    value, tangent = parts_of(x)
    return None if tangent is None else joined(rule, value, tangent, *arguments)


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
