"""Modes of modules: training, evaluation, and twice differentiable for the duration of one pass.

Matching Jacobians differentiates a derivative. Several things that are harmless in ordinary training then fail or are
wrong: fused attention, fused recurrent kernels and `hardsigmoid` have no second derivative, and BatchNorm writes its
buffers. Everything here is undone when the pass ends; the module is never changed permanently.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian.arguments import Arguments
from jacmatch.jacobian.callables import buffers_in_training, layers_of, preserved_buffers, trains
from jacmatch.jacobian.rules import op_replacements
from jacmatch.jacobian.rules.aten_kernels import right_derivatives
from jacmatch.jacobian.rules.base import shared, switched
from jacmatch.jacobian.rules.batch_norm import Statistics
from jacmatch.jacobian.rules.recomputation import recomputed_in

BatchNormPolicy = Literal["batch", "frozen"]
"""What BatchNorm layers in training mode do during a pass with derivatives.

Both normalize with the statistics of the batch, as in ordinary training, and update the running statistics once.
`batch`: the derivative with respect to the input includes the path through these statistics, so a product also includes
the effect of each sample on all others.
`frozen`: the statistics are constant with respect to the input, so that every product is per sample. They still depend
on the parameters, and the gradient of a penalty takes that into account.
"""

Module = Callable[..., Any]
"""A network: an `nn.Module`, or any function of one tensor that is made of differentiable operations."""


@contextmanager
def twice_differentiable(
    module: Module,
    batch_norm: BatchNormPolicy = "batch",
    *,
    statistics: bool = False,
    forward: bool = False,
    once: bool = False,
) -> Iterator[Statistics | None]:
    """Context in which a call of the module can be differentiated twice, and in forward mode.

    Attention uses the math kernel, recurrent layers do not use cuDNN and oneDNN, hardsigmoid and hardswish are
    computed with ReLU6, BatchNorm in evaluation mode is computed as an affine map, and BatchNorm in training mode
    follows the policy.

    Args:
        module: The network that will be called.
        batch_norm: The policy for BatchNorm layers in training mode. With `frozen` the context gives their statistics.
        statistics: Also compute normalization explicitly from its statistics, which a derivative of a forward-mode
            product needs; reverse mode does not, and is faster without.
        forward: Reject operations whose forward-mode rule is silently missing, or wrong when differentiated.
        once: Whether one derivative in reverse mode is enough. An `nn.Module` in evaluation mode then needs only
            BatchNorm as an affine map and recurrent layers without cuDNN; everything else uses PyTorch's fastest
            kernels.

    Raises:
        InputError: there is no such policy.
        UnsupportedError: parts of the module run in other threads, which do not see the context.
    """
    if batch_norm not in ("batch", "frozen"):
        raise InputError("`batch_norm` must be 'batch' or 'frozen'.", got=repr(batch_norm))
    layers = layers_of(module) if isinstance(module, nn.Module) else []
    if any(isinstance(layer, nn.DataParallel) and len(layer.device_ids) > 1 for layer in layers):
        raise UnsupportedError(
            "No engine can differentiate `torch.nn.DataParallel`: its replicas run in threads of their own. Use "
            "DistributedDataParallel around the objective, one process for each device."
        )
    plain = once and bool(layers) and not any(map(trains, layers))
    again = partial(_recomputed, module, batch_norm, statistics=statistics, forward=forward, once=once)
    with ExitStack() as stack:
        frozen = Statistics() if batch_norm == "frozen" else None
        stack.enter_context(recomputed_in(again, forward=forward))
        stack.enter_context(unfused_encoder())
        if not plain:
            stack.enter_context(shared("attention", partial(sdpa_kernel, SDPBackend.MATH)))
        stack.enter_context(right_derivatives(frozen, first_order=plain))
        stack.enter_context(
            op_replacements.once()
            if plain
            else op_replacements.differentiated(composed=statistics, frozen=frozen, forward=forward)
        )
        # The optimizing executor of TorchScript differentiates fused operations by its own formulas.
        stack.enter_context(torch.jit.optimized_execution(False))  # type: ignore[attr-defined]
        # Compiled code has no second derivative.
        stack.enter_context(uncompiled())
        if any(isinstance(layer, nn.RNNBase | nn.RNNCellBase) for layer in layers):
            stack.enter_context(shared("cudnn", partial(torch.backends.cudnn.flags, enabled=False)))
        yield frozen


@contextmanager
def _recomputed(module: Module, *settings: Any, **named: Any) -> Iterator[None]:
    """`twice_differentiable` for a part that is computed again, which leaves the buffers as they are."""
    with ExitStack() as stack:
        if buffers_in_training(module):
            stack.enter_context(preserved_buffers(module))
        stack.enter_context(twice_differentiable(module, *settings, **named))
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled parts eagerly."""
    if not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules:
        with shared("compiler", partial(torch.compiler.set_stance, "force_eager")):
            yield
    else:
        yield


def unfused_encoder() -> AbstractContextManager[None]:
    """Turn off the fused path of `TransformerEncoder` in evaluation mode: no derivatives, and 0 where it is padded."""
    return shared("encoder", partial(switched, mha.get_fastpath_enabled, mha.set_fastpath_enabled, False))


def is_trainable(module: Module) -> bool:
    """Return whether a result can have a gradient: a parameter requires one, or the module is a plain function."""
    if not isinstance(module, nn.Module):
        return True
    return any(parameter.requires_grad for parameter in module.parameters())


def set_mode(module: nn.Module, training: bool) -> nn.Module:
    """Return the module, put into training or evaluation mode.

    An exported module (`torch.export`) does not support `train()` and `eval()`: its graph has the mode of the export. A
    frozen module of TorchScript has no mode. For such modules, and those that contain one, only the `training` flag is
    set, where there is one.
    """
    if not any(_is_exported(part) or not hasattr(part, "training") for part in module.modules()):
        return module.train(training)
    if hasattr(module, "training"):
        module.training = training
    for child in module.children():
        set_mode(child, training)
    return module


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Context with the module in training or evaluation mode; on exit each submodule gets its previous mode back."""
    before = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    try:
        set_mode(module, training)
        yield
    finally:
        for part, mode in before:
            part.training = mode


def check_evaluates(module: nn.Module, caller: str) -> None:
    """Reject a module with a graph exported in training mode, since dropout and batch statistics are fixed in it."""
    for part in module.modules():
        if _is_exported(part) and any(_trains(node) for node in part.graph.nodes):  # type: ignore[union-attr]
            rule = f"`module` of `{caller}` must be exported in evaluation mode."
            do = "Export it again: torch.export.export(network.eval(), …)."
            raise InputError(rule, got="a graph with dropout or BatchNorm in training mode", do=do)


def call(module: Any, x: Tensor, arguments: Arguments | None = None) -> Any:
    """Call the module at x; also under `torch.no_grad` if its forward pass takes gradients itself.

    Interatomic potentials return forces, −∂E/∂x by `torch.autograd.grad` inside their forward pass. Under
    `torch.no_grad` that fails; such a module is called again with gradients, and its results are detached.
    """
    module = module if arguments is None else partial(arguments, module)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return module(x)
    required = x.requires_grad
    try:
        return module(x)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    if x.is_leaf:
        x.requires_grad_(required)  # the module may have changed it before it failed
    with torch.enable_grad():
        results = module(x.detach().clone())
    return tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, results)


def _is_exported(module: nn.Module) -> bool:
    """Return whether this is a graph whose mode cannot be changed."""
    return isinstance(module, torch.fx.GraphModule) and "train" in vars(module)


def _trains(node: torch.fx.Node) -> bool:
    """Return whether an operator of a graph is in training mode."""
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(() if schema is None else schema.arguments):
        if argument.name in ("train", "training"):
            given = node.args[position] if position < len(node.args) else argument.default_value
            return node.kwargs.get(argument.name, given) is True
    return False


def in_several_processes() -> bool:
    """Return whether this is one of several processes of `torch.distributed`."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def row_numbers(x: Tensor) -> Tensor:
    """Return a number for each row of a batch: r + n i for row i in process r of n, so that directions differ."""
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if in_several_processes() else (0, 1)
    return rank + ranks * torch.arange(len(x), device=x.device)


def check_wrapping(objective: nn.Module, student: nn.Module, *, derived: bool) -> None:
    """Reject a student that is wrapped in DistributedDataParallel, which the passes of its objective bypass."""
    alone = derived and isinstance(student, DistributedDataParallel)
    if alone or (in_several_processes() and wraps_apart(objective, student)):
        raise UnsupportedError(
            f"`student` of `{type(objective).__name__}` must not be wrapped in DistributedDataParallel: gradients of "
            "derivatives would not be averaged. Wrap the objective: DistributedDataParallel(objective), and call that."
        )


def wraps_apart(objective: nn.Module, student: nn.Module) -> bool:
    """Return whether a DistributedDataParallel contains parameters of the student but not the objective."""
    own = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    wrappers = [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
    around = [wrapper for wrapper in wrappers if any(id(parameter) in own for parameter in wrapper.parameters())]
    return bool(around) and not any(objective is module for wrapper in around for module in wrapper.modules())
