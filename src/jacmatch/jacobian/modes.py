"""Modules in the mode that a pass needs: training or evaluation, also where a module takes gradients itself."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jacmatch.errors import InputError


def set_mode(module: nn.Module, training: bool) -> nn.Module:
    """Return the module, put into training or evaluation mode.

    A module of `torch.export` refuses `train()` and `eval()`: its graph has the mode that it was exported in. Such
    modules, and those that contain one, get the flag alone.

    Args:
        module: The module.
        training: The mode.
    """
    if not any(_is_exported(part) for part in module.modules()):
        return module.train(training)
    module.training = training
    for child in module.children():
        set_mode(child, training)
    return module


def check_evaluates(module: nn.Module, caller: str) -> None:
    """Refuse a module with a graph that was exported in training mode: dropout and batch statistics stay in it.

    Raises:
        InputError: There is one.
    """
    for part in module.modules():
        if _is_exported(part) and any(_trains(node) for node in part.graph.nodes):  # type: ignore[union-attr]
            raise InputError(
                f"`module` of `{caller}` must be exported in evaluation mode.",
                got="a graph with dropout or BatchNorm in training mode",
                do="Export it again: torch.export.export(network.eval(), …).",
            )


def call(module: Any, x: Tensor) -> Any:
    """Return what the module returns at x, also without gradients where it takes one itself.

    Interatomic potentials return forces, −∂E/∂x by `torch.autograd.grad` inside their forward pass. Under
    `torch.no_grad` that fails; such a module is called again with gradients, and its results are detached.

    Args:
        module: A module or function of one tensor.
        x: The input.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return module(x)
    asked = x.requires_grad
    try:
        return module(x)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    if x.is_leaf:
        x.requires_grad_(asked)  # the module may have set it before it failed
    with torch.enable_grad():
        results = module(x.detach().clone())
    return tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, results)


def _is_exported(module: nn.Module) -> bool:
    """Whether this is a graph whose mode cannot be changed."""
    return isinstance(module, torch.fx.GraphModule) and "train" in vars(module)


def _trains(node: torch.fx.Node) -> bool:
    """Whether an operator of a graph is told to train."""
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(() if schema is None else schema.arguments):
        if argument.name in ("train", "training"):
            given = node.args[position] if position < len(node.args) else argument.default_value
            return node.kwargs.get(argument.name, given) is True
    return False
