"""The contents of a network or function: the modules, tensors and buffers that it uses; a key that outlives it; a copy.

A user's training step often creates a new function each time, `lambda x: network(x, mask)`. Two such functions count as
equal if their code and modules are the same, and all other objects in them have the same types. Buffers are identified
by object and not by name: a BatchNorm layer registered under two names has one running mean.
"""

import copy
import random
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from operator import attrgetter, itemgetter, methodcaller
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

_DEPTH = 4
"""Depth to which functions inside functions are inspected."""

_ITEMS = 64
"""Items of a container or an object that are inspected: a function may contain a data set."""


def modules_of(function: Any) -> list[nn.Module]:
    """Return the networks that a function uses: itself, or those in its closure, arguments, object and globals."""
    networks: dict[int, nn.Module] = {}
    for each in _walk(function, _DEPTH):
        if isinstance(each, nn.Module):
            networks.setdefault(id(each), each)
    return list(networks.values())


def layers_of(function: Any) -> list[nn.Module]:
    """Return each layer of its networks once, in the order of `modules()`, which takes longer."""
    layers: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [*reversed(modules_of(function))]
    while waiting:
        layer = waiting.pop()
        if layer is not None and id(layer) not in layers:
            layers[id(layer)] = layer
            waiting += reversed(layer._modules.values())
    return list(layers.values())


def tensors_of(function: Any) -> list[Tensor]:
    """Return the tensors that a function contains besides those of its networks."""
    tensors = {id(each): each for each in _walk(function, _DEPTH) if isinstance(each, Tensor)}
    return list(tensors.values())


def key_of(function: Any, depth: int = _DEPTH, *, numbers: bool = False) -> Hashable:
    """Return a key, equal for functions with the same code and networks whose other contents have equal types.

    With `numbers`, equal functions contain equal numbers, too: `lambda out: out[n]` selects an output by one.
    """
    if isinstance(function, nn.Module):
        return "module", id(function)
    if isinstance(function, Tensor):
        return "tensor", tuple(function.shape), function.dtype, function.device, function.requires_grad
    if function is None or isinstance(function, str | bool | bytes | torch.dtype | torch.device | type):
        return cast(Hashable, function)
    if isinstance(function, attrgetter | itemgetter | methodcaller):
        return repr(function)
    if depth == 0 or isinstance(function, int | float | complex):  # a count or a temperature may change in each step
        return repr(function) if numbers and depth else str(type(function))
    contents = tuple(key_of(each, depth - 1, numbers=numbers) for each in _contents(function))
    if isinstance(function, types.FunctionType):
        space = function.__globals__
        named = [space[name] for name in function.__code__.co_names if isinstance(space.get(name), str | int | float)]
        return function.__code__, contents, tuple(key_of(each, depth - 1, numbers=numbers) for each in named)
    if isinstance(function, partial | types.MethodType):
        return type(function), contents
    return function if isinstance(function, types.BuiltinFunctionType) else (type(function), contents)


def copy_in(function: Any, dtype: torch.dtype | None) -> Any:
    """Return a copy that shares no parameter and no buffer with the function, in this type if one is given."""
    memo: dict[int, Any] = {}
    for layer in layers_of(function):
        for value in vars(layer).values():  # a result that a hook left behind, which deepcopy refuses
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return _copied(function, dtype, memo, _DEPTH)


def _copied(value: Any, dtype: torch.dtype | None, memo: dict[int, Any], depth: int) -> Any:
    if isinstance(value, nn.Module):
        network = copy.deepcopy(value, memo)
        return network if dtype is None else network.to(dtype)
    if isinstance(value, Tensor):
        copied = memo.get(id(value))
        if copied is None:
            to = value.dtype if dtype is None or not value.is_floating_point() else dtype
            copied = value.detach().to(to, copy=True).requires_grad_(value.requires_grad)
            memo[id(value)] = copied
        return copied
    if depth == 0 or not (modules_of(value) or tensors_of(value)):
        return value

    def again(each: Any) -> Any:
        return _copied(each, dtype, memo, depth - 1)

    if isinstance(value, dict):
        return {name: again(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(again(each) for each in value)
    if isinstance(value, partial):
        return partial(again(value.func), *map(again, value.args), **{k: again(v) for k, v in value.keywords.items()})
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, again(value.__self__))
    if isinstance(value, types.FunctionType):
        return _function(value, again)
    made = copy.copy(value)  # an object: a copy, with copies of the networks and tensors in its attributes
    for name, each in vars(value).items():
        object.__setattr__(made, name, again(each))
    return made


def _function(function: types.FunctionType, again: Callable[[Any], Any]) -> types.FunctionType:
    """Return a function with the same code and copied contents."""
    cells = tuple(types.CellType(again(each)) if _filled(cell) else types.CellType() for cell, each in _cells(function))
    names = {name: again(each) for name, each in _globals(function)}
    space = {**function.__globals__, **names} if names else function.__globals__
    made = types.FunctionType(function.__code__, space, function.__name__, None, cells)
    made.__defaults__ = tuple(map(again, function.__defaults__)) if function.__defaults__ else None
    made.__kwdefaults__ = {k: again(v) for k, v in function.__kwdefaults__.items()} if function.__kwdefaults__ else None
    return made


def _walk(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if depth and not isinstance(value, nn.Module | Tensor):
        for each in _contents(value):
            yield from _walk(each, depth - 1)


def _contents(value: Any) -> list[Any]:
    """Return the contents of a function, a container or an object with attributes."""
    if isinstance(value, types.FunctionType):
        closure = [each for _, each in _cells(value)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*closure, *defaults, *(each for _, each in _globals(value))]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, dict):
        return list(islice(value.values(), _ITEMS))
    if isinstance(value, list | tuple):
        return list(value[:_ITEMS])
    if isinstance(value, type | types.ModuleType) or not hasattr(value, "__dict__"):
        return []
    return list(islice(vars(value).values(), _ITEMS))


def _cells(function: types.FunctionType) -> list[tuple[types.CellType, Any]]:
    return [(cell, cell.cell_contents if _filled(cell) else None) for cell in function.__closure__ or ()]


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _globals(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Return the networks, tensors and functions of the same file that the code names."""
    space, kinds = function.__globals__, (nn.Module, Tensor, types.FunctionType)
    if str(space.get("__name__")).partition(".")[0] == "torch":
        return []
    named = [(name, space[name]) for name in function.__code__.co_names if isinstance(space.get(name), kinds)]
    own = [each for each in named if not isinstance(each[1], types.FunctionType) or each[1].__globals__ is space]
    return [each for each in own if each[1] is not function]


def all_buffers(module: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the buffers of a network, each under one name; for a plain function those of the networks it uses."""
    if isinstance(module, nn.Module):
        return dict(module.named_buffers())
    named = [(f"{number}.", each.named_buffers()) for number, each in enumerate(modules_of(module))]
    return {prefix + name: buffer for prefix, each in named for name, buffer in each}


def buffers_in_training(module: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the buffers that a forward pass may write: all if any submodule is in training mode, else none."""
    return all_buffers(module) if any(map(trains, layers_of(module))) else {}


def trains(layer: nn.Module) -> bool:
    """Return whether a layer is in training mode; a frozen module of TorchScript has no mode."""
    return bool(getattr(layer, "training", False))


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
    layers = [layer for layer in layers_of(module) if not isinstance(layer, torch.jit.ScriptModule)]  # no attributes
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


GeneratorStates = tuple[Any, Any, list[Tensor]]


def generator_states(device: torch.device) -> GeneratorStates:
    """Return the states of the global generators: of Python, of NumPy, of torch on the CPU and on a GPU."""
    of_torch = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return random.getstate(), numpy.random.get_state(legacy=False), of_torch


def set_generator_states(states: GeneratorStates, device: torch.device) -> None:
    """Set the states that `generator_states` returned."""
    python, of_numpy, of_torch = states
    random.setstate(python)
    numpy.random.set_state(of_numpy)
    torch.set_rng_state(of_torch[0])
    for state in of_torch[1:]:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved_generators(device: torch.device) -> Iterator[None]:
    """Restore the states of the global generators after the context."""
    states = generator_states(device)
    try:
        yield
    finally:
        set_generator_states(states, device)


def seed_generators(seed: int, device: torch.device, *, of_torch: bool = False) -> None:
    """Seed the global generators of Python, NumPy and torch, or of torch alone.

    While CUDA is not initialized, each call of `torch.manual_seed` would queue a CUDA call with a stack trace.
    """
    if not of_torch:
        random.seed(seed)
        with suppress(TypeError):  # only NumPy's first generator can be seeded, and a user may have set another
            numpy.random.seed(seed)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def preserved_state(module: Callable[..., Any]) -> Iterator[None]:
    """`preserved_buffers` and `preserved_attributes`."""
    with preserved_attributes(module), preserved_buffers(module):
        yield


def _slots(module: Callable[..., Any]) -> list[tuple[nn.Module, str, Tensor]]:
    """Return each layer, key and tensor of a buffer."""
    return [(layer, key, own) for layer in layers_of(module) for key, own in layer._buffers.items() if own is not None]
