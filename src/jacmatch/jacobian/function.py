"""The function that is differentiated, and the results of a pass through it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from jacmatch.errors import ClassDimensionError, InputError
from jacmatch.jacobian.callables import (
    all_buffers,
    copies_of,
    generator_states,
    layers_of,
    preserved_generators,
    set_generator_states,
)
from jacmatch.jacobian.features import class_dimension, run
from jacmatch.jacobian.modules import BatchNormPolicy, Module
from jacmatch.jacobian.readouts import Context, Readout, with_class_dim
from jacmatch.jacobian.rules.base import is_dual

Result = TypeVar("Result")
Cotangents = Tensor | Callable[[Tensor], Tensor]


@dataclass
class Products:
    """The results of one pass with derivatives.

    Attributes:
        outputs: The network's outputs.
        values: The readout's values, (B, R); the outputs themselves for the readout `Logits`.
        products: vᵀJ (P, B, *input) of `vjp_products`, or Jv (P, B, R) of `jvp_products`.
        features: Features of the requested layers.
        engine: The engine that computed them.
        branch: A number for the operations in the graph of values and outputs, if there is one.
    """

    outputs: Tensor
    values: Tensor
    products: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    engine: str = "reverse"
    branch: int | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of them as a tuple."""
        return (self.outputs, self.values, self.products, *self.features.values())

    def with_tensors(self, given: Sequence[Tensor]) -> "Products":
        """Return a copy with these tensors, in the order of `tensors`."""
        features = dict(zip(self.features, given[3:], strict=True))
        return Products(given[0], given[1], given[2], features, self.engine, self.branch)


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float64 parts of a network that reduce the precision; `seen` if there are any."""

    seen = False
    _should_skip_dynamo = classmethod(lambda _: False)  # imports no compiler

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation with other types."""

        def is_reduced(each: Any) -> bool:
            each = getattr(each, "dtype", each)
            return isinstance(each, torch.dtype) and each.is_floating_point and each.itemsize < 8

        def wide(each: Any) -> Any:
            return torch.float64 if isinstance(each, torch.dtype) and is_reduced(each) else each

        result, given = function(*tree_map(wide, args), **tree_map(wide, kwargs or {})), tree_leaves((args, kwargs))
        self.seen |= any(map(is_reduced, (*given, *tree_leaves(result))))
        if any(isinstance(each, Tensor) and is_reduced(each) for each in given):
            return result
        return tree_map(lambda each: each.double() if is_reduced(each) else each, result)


@dataclass(frozen=True)
class Function:
    """The differentiated function x ↦ values, with outputs and features as by-products."""

    module: Module  # the network
    readout: Readout  # what is differentiated
    context: Context  # other arguments of the network, and data such as labels for readouts that need them
    layers: tuple[str, ...]  # dotted paths of further features to return
    batch_norm: BatchNormPolicy  # policy for BatchNorm in training mode
    widened: bool = False  # whether parts of lower precision are computed in float64

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling() or not isinstance(self.module, nn.Module):
            return
        if any(p is not None and is_lazy(p) for layer in layers_of(self.module) for p in layer._parameters.values()):
            rule = "The network to be differentiated must have initialized parameters."
            raise InputError(rule, got="a lazy module", do="Call it once with a batch to give them shapes.")

    def __call__(self, x: Tensor, buffers: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return values, outputs and features; `buffers` replace the module's own."""
        with self.precision():
            wanted = tuple(dict.fromkeys((*self.layers, *self.readout.layers)))
            outputs, features = run(self.module, x, wanted, buffers, self.context.arguments)
            if outputs.is_complex():
                rule = "A network must return real outputs to be differentiated."
                raise InputError(
                    rule, got=str(outputs.dtype), do="Return torch.view_as_real of them, or their magnitude."
                )
            try:
                values = self.readout(outputs, features, self.context)
            except ClassDimensionError:
                dimension = class_dimension(self.module, x, self.context.arguments)
                if dimension is None:
                    raise
                values = with_class_dim(self.readout, dimension)(outputs, features, self.context)
            return values, outputs, features

    def precision(self) -> AbstractContextManager[Any]:
        """Context with the types in which the function is computed."""
        return Widened() if self.widened else nullcontext()  # type: ignore[no-untyped-call]


def replaying(x: Tensor) -> Callable[[Callable[[], Result]], Result]:
    """Return a function that calls another with the same random numbers each time; no generator advances."""
    start = generator_states(x.device)

    def call(function: Callable[[], Result]) -> Result:
        with preserved_generators(x.device):
            set_generator_states(start, x.device)
            return function()

    return call


def replayed(function: Function, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the values as a function of the input alone.

    Each call starts from the current buffers and random numbers, and writes no buffer.
    """
    call, start = replaying(x), copies_of(all_buffers(function.module))
    return lambda z: call(lambda: function(z.clone(), copies_of(start))[0])


def check_direction(name: str, v: Tensor, shape: torch.Size) -> None:
    """Reject directions whose shape is not (probes, *shape)."""
    if v.dim() < 1 or not len(v) or v.shape[1:] != shape:
        rule = f"`{name}` must have the shape (probes, *{tuple(shape)}), with at least one probe."
        raise InputError(rule, got=f"shape {tuple(v.shape)}", do="One direction for each sample.")


def check_input(x: Any, caller: str) -> None:
    """Reject anything but a floating-point tensor with at least one sample."""
    if not isinstance(x, Tensor):
        rule = f"`x` of `{caller}` must be one tensor."
        do = "Differentiate with respect to one part: pass a function of that tensor with the other parts fixed."
        raise InputError(rule, got=type(x).__name__, do=do)
    if not x.is_floating_point():
        rule = f"`x` of `{caller}` must be of a floating-point type."
        do = "Scale images to float; for text, differentiate with respect to embeddings (`from_embeddings`)."
        raise InputError(rule, got=str(x.dtype), do=do)
    if x.dim() == 0 or not len(x):
        rule = f"`x` of `{caller}` must have a batch dimension, and at least one sample."
        raise InputError(rule, got=f"shape {tuple(x.shape)}", do="Leave empty batches out.")
    if torch.is_inference_mode_enabled() or x.is_inference():
        rule = f"`{caller}` must not run under torch.inference_mode, which drops derivatives."
        raise InputError(rule, do="Use torch.no_grad().")
    if is_dual(x):
        rule = f"`x` of `{caller}` must have no tangent of torch.autograd.forward_ad, which would be lost."
        raise InputError(rule, do="Use torch.func.jvp.")
