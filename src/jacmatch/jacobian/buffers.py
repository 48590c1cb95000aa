"""Buffers of a network during a pass: replaced by copies, and restored afterwards.

Buffers are identified by object and not by name: a BatchNorm layer registered under two names has one running mean.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.jacobian.callables import modules_of


def all_buffers(module: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the buffers of a network, each under one name; for a plain function those of the networks it uses."""
    if isinstance(module, nn.Module):
        return dict(module.named_buffers())
    named = [(f"{number}.", each.named_buffers()) for number, each in enumerate(modules_of(module))]
    return {prefix + name: buffer for prefix, each in named for name, buffer in each}


def buffers_in_training(module: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the buffers that a forward pass may write: all if any submodule is in training mode, else none."""
    networks = [module] if isinstance(module, nn.Module) else modules_of(module)
    return all_buffers(module) if any(layer.training for each in networks for layer in each.modules()) else {}


def copies_of(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a clone of each buffer."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


@contextmanager
def replaced_buffers(module: Callable[..., Any], buffers: dict[str, Tensor]) -> Iterator[None]:
    """Use these tensors as buffers within the context; tensors that the module assigns to them end up in the dict."""
    name_of = {id(buffer): name for name, buffer in all_buffers(module).items() if name in buffers}
    given = dict(buffers)
    slots = _slots(module)
    try:
        for layer, key, own in slots:
            if id(own) in name_of:
                layer._buffers[key] = given[name_of[id(own)]]
        yield
    finally:
        for layer, key, own in slots:
            if id(own) in name_of and (now := layer._buffers[key]) is not given[name_of[id(own)]] and now is not None:
                buffers[name_of[id(own)]] = now
            layer._buffers[key] = own


def write_buffers(module: Callable[..., Any], written: dict[str, Tensor]) -> None:
    """Copy these values into the buffers, in place; `written` may contain only some of them."""
    with torch.no_grad():
        for name, buffer in all_buffers(module).items():
            if name in written:
                buffer.copy_(written[name])


@contextmanager
def preserved_buffers(module: Callable[..., Any]) -> Iterator[None]:
    """Restore the values of the buffers after the context."""
    slots = _slots(module)
    before = {id(own): own.detach().clone() for _, _, own in slots}
    try:
        yield
    finally:
        for layer, key, own in slots:
            if layer._buffers[key] is not own:
                layer._buffers[key] = own
            # `data`: graphs recorded within stay valid, since training does not read running statistics
            own.data.copy_(before[id(own)])


@contextmanager
def preserved_attributes(module: Callable[..., Any]) -> Iterator[None]:
    """Restore the plain attributes of the layers, such as counters, after the context."""
    layers = [layer for each in modules_of(module) for layer in each.modules()]
    layers = [layer for layer in layers if not isinstance(layer, torch.jit.ScriptModule)]  # these have no attributes
    before = [(layer, dict(vars(layer)), dict(layer._parameters)) for layer in layers]
    try:
        yield
    finally:
        for layer, attributes, parameters in before:
            for name in [name for name in vars(layer) if name not in attributes]:
                del layer.__dict__[name]
            layer.__dict__.update(attributes)
            for name, parameter in parameters.items():
                if layer._parameters.get(name) is not parameter:
                    layer._parameters[name] = parameter


@contextmanager
def preserved_state(module: Callable[..., Any]) -> Iterator[None]:
    """`preserved_buffers` and `preserved_attributes`."""
    with preserved_attributes(module), preserved_buffers(module):
        yield


def _slots(module: Callable[..., Any]) -> list[tuple[nn.Module, str, Tensor]]:
    """Return each layer, key and tensor of a buffer."""
    layers = [layer for each in modules_of(module) for layer in each.modules()]
    return [(layer, key, own) for layer in layers for key, own in layer._buffers.items() if own is not None]
