"""The public functions for derivative products: vᵀJ, Jv and the full Jacobian of a network.

All results can be differentiated once more, with respect to the parameters, unless the module is frozen or gradients
are switched off. `jvp`, `vjp` and `jacobian` differentiate the outputs; `vjp_products` and `jvp_products` take any
readout and return everything that the pass has computed.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map

from jacmatch.errors import InputError, UnsupportedError, whole_number
from jacmatch.jacobian.arguments import Arguments, Inputs
from jacmatch.jacobian.callables import buffers_in_training, copies_of, layers_of, trains, write_buffers
from jacmatch.jacobian.engines import JVP_ENGINES, difference_jvp, own_rows, rebuilt_vjp, reverse_vjp, undifferentiable
from jacmatch.jacobian.features import Selection, Structure, selecting
from jacmatch.jacobian.function import Cotangents, Function, Products, check_direction, check_input
from jacmatch.jacobian.modules import BatchNormPolicy, Module
from jacmatch.jacobian.readouts import Context, Logits, Readout
from jacmatch.jacobian.verification import (
    Known,
    check_first,
    check_vjp,
    engines_for_jvp,
    known_for,
    repeats,
    revoked,
    samples_couple,
)

Public = TypeVar("Public", bound=Callable[..., Any])
Engine = Literal["auto", "forward", "reverse", "differences"]


Several = Inputs | Mapping[str, Tensor] | tuple[Tensor, ...]
"""Several inputs: by position in a tuple, or by name. Their derivatives have the same structure, in their units."""


def _eager(function: Public) -> Public:
    """Exclude the function from a user's `torch.compile`, which cannot trace its checks."""
    disabled: list[Any] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled and "torch._dynamo" in sys.modules:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return (disabled[0] if disabled else function)(*args, **kwargs)

    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg="jacmatch checks its products eagerly.")
    return cast(Public, call)


@_eager
def jvp(
    module: Module,
    x: Float[Tensor, "batch *input"] | Several,
    tangents: Float[Tensor, "batch *input"] | Float[Tensor, "probe batch *input"] | Several,
    *,
    engine: Engine = "auto",
    batch_norm: BatchNormPolicy = "batch",
    context: Mapping[str, Any] | None = None,
    output: Callable[[Any], Any] | None = None,
) -> tuple[Float[Tensor, "batch *out"] | Any, Float[Tensor, "batch *out"] | Float[Tensor, "probe batch *out"] | Any]:
    """Return outputs y (B, K) and the product Jv (B, K), or (P, B, K) for P directions at once.

    (Jv)ₙₖ = Σᵢ ∂yₙₖ/∂xₙᵢ vₙᵢ, over all inputs.

    Args:
        module: The network.
        x: Its input, of a floating-point type; several inputs as a tuple, a dictionary or `Inputs`.
        tangents: v, one direction per sample, shaped like x, or P of them; a tuple or dictionary where x is.
        engine: `forward`, `reverse`, `differences`, or `auto`: the first of these that supports the module.
        batch_norm: Policy for BatchNorm in training mode.
        context: Other arguments of the network, by name, passed unchanged. Tensors whose first dimension is the batch
            belong to the samples; wrap a tensor in `Shared` if only its size is that of the batch.
        output: Selects the outputs if the network returns more than one tensor. It returns a tensor, or a tuple or
            dictionary of tensors; y and the products then have the same structure.

    Raises:
        InputError: x or v has the wrong type, structure or shape.
        UnsupportedError: the engine does not support this module; the message names one that does.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> jvp(lambda x: x**2, x, torch.tensor([[1.0, 0.0]]))
        (tensor([[1., 4.]]), tensor([[2., 0.]]))
        >>> jvp(lambda x, t: x * t, (x, torch.tensor([[3.0]])), (torch.zeros(1, 2), torch.ones(1, 1)))[1]
        tensor([[1., 2.]])
    """
    call = _Packed("jvp", module, x, context, output)
    v = call.inputs.pack("`tangents` of `jvp`", tangents.parts if isinstance(tangents, Inputs) else tangents)
    single = v.dim() == call.x.dim()
    settings: dict[str, Any] = {"batch_norm": batch_norm, "context": call.context, "engine": engine}
    with call.selecting():
        result = jvp_products(call.module, call.x, v[None] if single else v, **settings)
    return call.outputs.unpack(result.outputs), call.outputs.unpack(result.products[0] if single else result.products)


@_eager
def vjp(
    module: Module,
    x: Float[Tensor, "batch *input"] | Several,
    cotangents: Float[Tensor, "..."] | Any,
    *,
    batch_norm: BatchNormPolicy = "batch",
    context: Mapping[str, Any] | None = None,
    output: Callable[[Any], Any] | None = None,
) -> tuple[
    Float[Tensor, "batch *out"] | Any, Float[Tensor, "batch *input"] | Float[Tensor, "probe batch *input"] | Any
]:
    """Return outputs y (B, K) and the product vᵀJ (B, *input), or (P, B, *input) for P cotangents at once.

    (vᵀJ)ₙᵢ = Σₖ vₙₖ ∂yₙₖ/∂xₙᵢ, over all outputs, always by the reverse engine.

    Args:
        module: The network.
        x: Its input, of a floating-point type; several inputs as a tuple, a dictionary or `Inputs`.
        cotangents: v, one per sample, shaped like the outputs, or P of them; a tuple or dictionary where `output`
            selects one.
        batch_norm: Policy for BatchNorm in training mode.
        context: As in `jvp`.
        output: As in `jvp`.

    Raises:
        InputError: x or v has the wrong type, structure or shape.
        UnsupportedError: the outputs are not differentiable in reverse mode.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> with torch.no_grad():
        ...     vjp(lambda x: x**2, x, torch.tensor([[1.0, 1.0]]))
        (tensor([[1., 4.]]), tensor([[2., 4.]]))
    """
    call, single = _Packed("vjp", module, x, context, output), False

    def directions(y: Tensor) -> Tensor:
        nonlocal single
        v = call.outputs.pack("`cotangents` of `vjp`", cotangents)
        single = v.dim() == y.dim()
        return v[None] if single else v

    with call.selecting():
        result = vjp_products(call.module, call.x, directions, batch_norm=batch_norm, context=call.context)
    return call.outputs.unpack(result.outputs), call.inputs.unpack(result.products[0] if single else result.products)


@_eager
def jacobian(
    module: Module,
    x: Float[Tensor, "batch *input"] | Several,
    *,
    chunk_size: int | None = None,
    context: Mapping[str, Any] | None = None,
    output: Callable[[Any], Any] | None = None,
) -> tuple[Float[Tensor, "batch out"] | Any, Float[Tensor, "batch out *input"] | Any]:
    """Return outputs y (B, K) and the full Jacobian J (B, K, *input), Jₙₖᵢ = ∂yₙₖ/∂xₙᵢ.

    In evaluation mode, `chunk_size` rows are computed at once: the batch is repeated, and one backward pass gives a
    different row for each copy. Memory beyond the result grows with `chunk_size`; time decreases until the processor is
    saturated. If a module draws random numbers in training mode, or stores a tensor with an entry for each sample, the
    batch is not repeated, and each row takes one pass. If the last layer is linear with F < K features, the F rows of
    the features are computed and multiplied by its weight.

    Where samples depend on each other (BatchNorm in training mode or without running statistics, centering over the
    batch), J still contains only the derivatives with respect to each sample's own input: the diagonal blocks of the
    Jacobian of the batch. That takes B·K backward passes instead of K. The first call checks for such a dependence by
    changing some samples and comparing the others.

    Args:
        module: The network.
        x: Its input, of a floating-point type; several inputs as a tuple, a dictionary or `Inputs`.
        chunk_size: Rows at once, at least 1. By default, the repeated batch has up to 512 samples on a GPU and 64 on
            the CPU; with convolutions on the CPU 16, and at most 8 rows. The result does not depend on it.
        context: As in `jvp`.
        output: As in `jvp`. J has the structure of the outputs, and within it that of the inputs: for outputs (B, *out)
            and inputs (B, *input) in a tuple or dictionary the blocks are (B, *out, *input).

    Raises:
        InputError: x has the wrong type, or `chunk_size` is below 1.
        UnsupportedError: the outputs are not differentiable in reverse mode, or known to be wrong there.

    Example:
        >>> jacobian(lambda x: x**2, torch.tensor([[1.0, 2.0]]))[1].detach()
        tensor([[[2., 0.],
                 [0., 4.]]])
    """
    call = _Packed("jacobian", module, x, context, output)
    if chunk_size is not None:
        whole_number("`chunk_size` of `jacobian`", chunk_size)
    with call.selecting():
        outputs, rows = _rows(Function(call.module, Logits(), call.context, (), "batch"), call.x, chunk_size)
    blocks = call.outputs.unpack(rows, 1)
    return call.outputs.unpack(outputs), tree_map(call.inputs.unpack, blocks)


def _rows(function: Function, x: Tensor, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    """Return outputs and Jacobian, see `jacobian`."""
    known = known_for(function, x, 0)
    reason = check_first(known, partial(check_vjp, known, function, x))
    coupled = samples_couple(function, x)
    if coupled and len(x) > 1:
        result = _verified(known, function, x, own_rows(function, x, _check_matrix), reason)
        return result.outputs, result.products.transpose(0, 1)
    copies = 1 if coupled else _copies(function, x, chunk_size)
    repeated = x.repeat(copies, *[1] * (x.dim() - 1)) if copies > 1 else x
    arguments, several = function.context.arguments, function
    if arguments is not None:
        several = replace(function, context=Context(arguments=arguments.repeated(copies)))
    with features_of_last_layer(function.module) as readout:
        result = reverse_vjp(replace(several, readout=readout), repeated, partial(_basis, len(x), copies))
    branch = known and known.branch
    result = _verified(known, function, x, result, reason)
    if coupled is False and known and known.branch != branch is not None and samples_couple(function, x):
        return _rows(function, x, chunk_size)
    rows = result.products.view(-1, *x.shape)[: result.values.shape[1]]
    if readout.weight is not None:
        rows = torch.tensordot(readout.weight.to(rows.dtype), rows, 1)
    return result.outputs[: len(x)], rows.transpose(0, 1)


def _verified(known: Known | None, function: Function, x: Tensor, result: Products, reason: str) -> Products:
    """Return vᵀJ after a check of the branch that this call took, if it differs from the last one."""
    if known and not known.holds(function, x, "vjp", 1, result):
        reason = known.recheck(partial(check_vjp, known, function, x))
    return undifferentiable(result, reason)


class _Packed:
    """A call of `jvp`, `vjp` or `jacobian`: its inputs as one tensor x, and what structure inputs and outputs have."""

    def __init__(self, caller: str, module: Module, x: Any, context: Any, output: Callable[[Any], Any] | None) -> None:
        self.inputs, self.outputs = Structure(), Structure()
        self.selection: Selection | None = None
        x = Inputs(x) if isinstance(x, Mapping | tuple) else x
        if isinstance(x, Inputs):
            self.inputs.read(f"`x` of `{caller}`", dict(x.parts) if isinstance(x.parts, Mapping) else x.parts)
        else:
            check_input(x, caller)
        self.x, arguments = Arguments.of(caller, x, context)
        check_input(self.x, caller)
        self.module, self.context = module, Context(arguments=arguments)
        if output is not None:
            function = None if isinstance(module, nn.Module) else module
            self.selection = Selection(output, function, several=True)
            self.outputs = self.selection.structure or self.outputs
            self.module = module if function is None else self.selection

    def selecting(self) -> AbstractContextManager[None]:
        """Context in which the module returns the selected outputs as one tensor."""
        return selecting(self.module, self.selection)


def _basis(batch: int, copies: int, values: Tensor) -> Tensor:
    """Return one cotangent for each pass: copy c of the batch gets row (pass · copies + c)."""
    _check_matrix(values)
    rows = torch.arange(-(-values.shape[1] // copies) * copies, device=values.device).view(-1, copies, 1)
    one_hot = torch.arange(values.shape[1], device=values.device) == rows[..., None]
    return one_hot.to(values.dtype).expand(-1, copies, batch, -1).flatten(1, 2)


def _check_matrix(values: Tensor) -> None:
    if values.dim() != 2 or not values.shape[1]:
        rule = "The network given to `jacobian` must return outputs (batch, out), at least one."
        raise InputError(rule, got=f"shape {tuple(values.shape)}", do="Flatten them in a function around the network.")


def _copies(function: Function, x: Tensor, chunk_size: int | None) -> int:
    """Return how many copies of the batch compute that many rows at once."""
    if not isinstance(function.module, nn.Module):
        return 1
    layers = layers_of(function.module)
    # even without verification, BatchNorm without running statistics is known to couple the samples
    norms = [layer for layer in layers if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if any(map(trains, layers)) or any(norm.running_mean is None for norm in norms) or chunk_size == 1:
        return 1
    convolutions = any(isinstance(layer, nn.modules.conv._ConvNd) for layer in layers)
    samples, most = (512, 512) if x.device.type != "cpu" else (16, 8) if convolutions else (64, 64)
    copies = chunk_size or max(1, min(most, samples // max(1, len(x))))
    return copies if copies > 1 and repeats(function, x) else 1


def vjp_products(
    module: Module,
    x: Float[Tensor, "batch *input"],
    cotangents: Cotangents,
    *,
    readout: Readout | None = None,
    context: Context | None = None,
    layers: tuple[str, ...] = (),
    batch_norm: BatchNormPolicy = "batch",
    chunk_size: int | None = None,
    scale: Tensor | None = None,
) -> Products:
    """Return vᵀJ of the readout for each cotangent v, in one forward pass and one backward pass per v.

    Args:
        module: The network.
        x: Its input.
        cotangents: v of shape (P, B, R), or a function that computes them from the detached values (B, R).
        readout: What is differentiated; the outputs if None.
        context: Other arguments of the network, and labels and the like, for readouts that need them.
        layers: Further features to return.
        batch_norm: Policy for BatchNorm in training mode.
        chunk_size: Rows whose graphs are stored at once, at least 1; None stores all. The others are recomputed
            in the backward pass: k rows in chunks of 1 need the memory of one, and k more backward passes.
        scale: A power of 2: v is multiplied by it before the backward pass, and vᵀJ divided by it afterwards, in the
            type of x. Without it, small intermediate gradients underflow under float16 autocast. None means 1.

    Raises:
        InputError: x or v has the wrong type or shape, or `chunk_size` is below 1.
        UnsupportedError: the values are not differentiable in reverse mode; the message names a remedy.
    """
    check_input(x, "vjp")
    if chunk_size is not None:
        whole_number("`chunk_size` of `vjp_products`", chunk_size)
    function = Function(module, readout or Logits(), context or Context(), layers, batch_norm)
    known = known_for(function, x, 0)
    reason = check_first(known, partial(check_vjp, known, function, x))

    def scaled(values: Tensor) -> Tensor:
        v = cotangents(values) if callable(cotangents) else cotangents
        return v if scale is None else v * scale.to(v.dtype)

    result = reverse_vjp(function, x, scaled) if chunk_size is None else rebuilt_vjp(function, x, scaled, chunk_size)
    result = _verified(known, function, x, result, reason)
    return result if scale is None else replace(result, products=result.products / scale.to(result.products.dtype))


def jvp_products(
    module: Module,
    x: Float[Tensor, "batch *input"],
    tangents: Float[Tensor, "probe batch *input"],
    *,
    readout: Readout | None = None,
    context: Context | None = None,
    layers: tuple[str, ...] = (),
    engine: Engine = "auto",
    batch_norm: BatchNormPolicy = "batch",
    step: float | None = None,
) -> Products:
    """Return Jv of the readout for each direction v on the input side.

    Args:
        module: The network.
        x: Its input.
        tangents: v of shape (P, B, *input).
        readout: What is differentiated; the outputs if None.
        context: Other arguments of the network, and labels and the like, for readouts that need them.
        layers: Further features to return.
        engine: `forward`, `reverse` (two backward passes per v), `differences`, or `auto`: the first that can.
        batch_norm: Policy for BatchNorm in training mode.
        step: Step size h of a finite difference; if given, it implies the engine `differences`.

    Raises:
        InputError: x, v or the engine's name is wrong.
        UnsupportedError: the engine does not support this module; the message names one that does.
    """
    check_input(x, "jvp")
    check_direction("tangents", tangents, x.shape)
    function = Function(module, readout or Logits(), context or Context(), layers, batch_norm)
    if step is not None and engine not in ("auto", "differences"):
        raise InputError("`step` of `jvp_products` is for the engine 'differences'.", got=f"engine={engine!r}")
    if engine not in ("auto", *JVP_ENGINES):
        raise InputError("`engine` must be 'auto', 'forward', 'reverse' or 'differences'.", got=repr(engine))
    if step is not None:
        return difference_jvp(function, x, tangents, step)
    return _verified_jvp(known_for(function, x, len(tangents)), engine, function, x, tangents)


def _verified_jvp(known: Known | None, engine: Engine, function: Function, x: Tensor, tangents: Tensor) -> Products:
    """Return Jv by the first permitted engine that supports the function, and is right in the branch of this call."""
    before = copies_of(buffers_in_training(function.module))
    choose = partial(engines_for_jvp, known, function, x, engine, len(tangents))
    names, reason = check_first(known, choose)
    for name in names:
        try:
            result = JVP_ENGINES[name](function, x, tangents)
        except UnsupportedError as failure:
            write_buffers(function.module, before)  # a failed attempt does not count as a training pass
            if engine == "auto" and revoked(known, function, name, failure):
                break  # other engines must be verified first
            if name == names[-1]:
                raise
            continue
        if known and not known.holds(function, x, name, len(tangents), result):
            names, reason = known.recheck(choose)
            if name not in names:
                write_buffers(function.module, before)
                break
        return undifferentiable(result, reason)
    return _verified_jvp(known, engine, function, x, tangents)


@dataclass
class _Call:
    """One call of a layer: its features, its outputs, and their version counters."""

    weight: Tensor
    features: Tensor
    outputs: Tensor
    versions: tuple[int, int]

    def is_last(self, outputs: Tensor) -> bool:
        """Return whether the network returned the layer's own result, and nothing has written to it or its features."""
        now = (self.features._version, self.outputs._version)
        return self.outputs is outputs and now == self.versions and not outputs._backward_hooks


class LastLayer:
    """A readout: the input features of the last layer if J_y = W J_h holds, else the outputs themselves.

    Attributes:
        weight: W of the last layer (K, F) after a pass with one, else None.
    """

    layers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self._call: _Call | None = None

    def __call__(
        self, outputs: Float[Tensor, "batch *out"], features: Mapping[str, Tensor], context: Context
    ) -> Float[Tensor, "batch *feature"]:
        """Return h, or the outputs."""
        call, self._call = self._call, None
        if call is None or not call.is_last(outputs):
            return outputs
        self.weight = call.weight
        return call.features

    def note(self, layer: nn.Linear, given: tuple[Any, ...], returned: Tensor) -> None:
        """A forward hook. A weight or bias that is not a leaf may depend on x, and then J_y has further terms."""
        self._call = None
        constants = [each for each in (layer.weight, layer.bias) if each is not None]
        if len(given) == 1 and given[0].dim() == 2 and all(each.is_leaf for each in constants):
            self._call = _Call(layer.weight, given[0], returned, (given[0]._version, returned._version))


@contextmanager
def features_of_last_layer(module: Module) -> Iterator[LastLayer]:
    """Yield the readout for calls of the module within the context."""
    readout = LastLayer()
    with ExitStack() as hooks:
        for layer in module.modules() if isinstance(module, nn.Module) else ():
            if _is_factorizable(layer):
                hooks.enter_context(layer.register_forward_hook(readout.note))
        yield readout


def _is_factorizable(layer: nn.Module) -> bool:
    """Return whether it is y = W h + b with fewer features than outputs, without hook or parametrization."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    own = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    of_all = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return not any((*own, *of_all)) and bool(layer.in_features < layer.out_features)
