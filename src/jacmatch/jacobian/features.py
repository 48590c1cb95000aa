"""The results of a network: its outputs, and features of layers by their dotted path."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from jacmatch.errors import InputError, UnsupportedError, unknown_name
from jacmatch.jacobian.arguments import Arguments
from jacmatch.jacobian.callables import key_of, preserved_buffers, preserved_generators, replaced_buffers
from jacmatch.jacobian.modules import Module, call

Select = Callable[[Any], Tensor]
"""Selects the outputs from what a network returned, for example `lambda out: out.logits`."""


def output_tensor(output: Any) -> Tensor:
    """Return the output tensor of a network's return value: the tensor itself, the only one in it, or its `logits`.

    Raises:
        InputError: there are several tensors and none is called `logits` or `out`, there is no tensor, or its type
            is complex or integer.

    Example:
        >>> output_tensor({"logits": torch.ones(2, 3), "loss": torch.ones(())}).shape
        torch.Size([2, 3])
    """
    outputs = _tensor_in(output)
    if not outputs.is_floating_point():
        rule = "A network must return real floating-point outputs."
        do = "Return .real, .imag, .abs() or .float()."
        raise InputError(rule, got=str(outputs.dtype).removeprefix("torch."), do=do)
    return outputs


def _tensor_in(output: Any) -> Tensor:
    """Return the tensor that `output_tensor` selects, of whatever type."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "out"):
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    parts = _parts(output)
    if len(parts) == 1:
        return next(iter(parts.values()))
    first = next(iter(parts), "[0]")
    rule = "A network must return one tensor, or a dictionary or object with `logits`."
    do = f"Select one: output=lambda out: out{first}; for doctor a function such as lambda x: module(x){first}."
    raise InputError(rule, got=_described(output, parts), do=do)


def _parts(output: Any) -> dict[str, Tensor]:
    """Return the tensors in a tuple, list, dictionary or dataclass (also nested), by the code that selects them."""
    if isinstance(output, Mapping):
        pairs = [(f"[{key!r}]", value) for key, value in output.items()]
    elif isinstance(output, list | tuple):
        pairs = [(f"[{number}]", value) for number, value in enumerate(output)]
    elif hasattr(output, "__dict__") and not isinstance(output, type | nn.Module):
        pairs = [(f".{name}", value) for name, value in vars(output).items()]
    else:
        return {}
    parts: dict[str, Tensor] = {}
    for select, value in pairs:
        inner = {"": value} if isinstance(value, Tensor) else _parts(value) if isinstance(value, _NESTED) else {}
        parts |= {f"{select}{rest}": tensor for rest, tensor in inner.items()}
    return parts


_NESTED = (list, tuple, Mapping)


def _described(output: Any, parts: Mapping[str, Tensor]) -> str:
    """Return the type of an output and the shapes of its tensors, never their values."""
    kind = "a dictionary" if isinstance(output, Mapping) else f"a {type(output).__name__}"
    if not parts:
        return f"{kind} without a tensor"
    shapes = [f"{select} {tuple(tensor.shape)}" for select, tensor in list(parts.items())[:6]]
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    return f"{kind} of {len(parts)} tensors, {', '.join(shapes)}{more}"


@dataclass(slots=True)  # so that `key_of` does not look into it: it changes in each call
class Structure:
    """A tuple or dictionary of tensors (B, …), possibly nested, as one tensor (B, N)."""

    spec: TreeSpec | None = None  # the tuple or dictionary without its tensors; None for a tensor, which is unchanged
    shapes: tuple[torch.Size, ...] = ()  # shape of a sample in each tensor

    def __deepcopy__(self, memo: Any) -> "Structure":
        return self  # as the `Selection` that writes it

    def read(self, name: str, tree: Any) -> Tensor:
        """Return the tensors of a batch as one, and store their structure."""
        leaves, self.spec = tree_flatten(tree)
        if tree is (leaves[0] if leaves else None):
            self.spec = None
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.dim():
                got = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
                do = "Leave out what has no derivative; return a dictionary instead of an object: {'depth': out.depth}."
                raise InputError(f"{name} must be one or several floating-point tensors (B, …).", got=got, do=do)
        if len({len(leaf) for leaf in leaves}) != 1:
            got = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or "none"
            raise InputError(f"{name} must be tensors with the same number of samples.", got=got)
        self.shapes = tuple(leaf.shape[1:] for leaf in leaves)
        return leaves[0] if self.spec is None else torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)

    def pack(self, name: str, tree: Any) -> Tensor:
        """Return directions of this structure as one tensor (B, N), or (P, B, N)."""
        if self.spec is None:
            if not isinstance(tree, Tensor):
                raise InputError(f"{name} must be one tensor.", got=type(tree).__name__)
            return tree
        leaves = _leaves_like(tree_unflatten(range(len(self.shapes)), self.spec), tree)
        pairs = [
            (leaf.shape[: leaf.dim() - len(of)], leaf.shape[leaf.dim() - len(of) :])
            for leaf, of in zip(leaves, self.shapes, strict=False)
            if isinstance(leaf, Tensor)
        ]
        fits = len(leaves) == len(self.shapes) and tuple(of for _, of in pairs) == self.shapes
        if not fits or len({lead for lead, _ in pairs}) != 1:
            wanted = tree_unflatten([tuple(shape) for shape in self.shapes], self.spec)
            got = tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, tree)
            raise InputError(f"{name} must have the structure and shapes (probes, batch, …) of {wanted}.", got=got)
        return torch.cat([leaf.reshape(*lead, -1) for leaf, (lead, _) in zip(leaves, pairs, strict=True)], -1)

    def unpack(self, packed: Tensor, axis: int = -1) -> Any:
        """Return the structure of the tensors that this dimension contains."""
        if self.spec is None:
            return packed
        parts: Any = torch.split(packed, [shape.numel() for shape in self.shapes], axis)
        pairs = zip(parts, self.shapes, strict=True)
        parts = [torch.unflatten(part, axis, shape) if shape else part.squeeze(axis) for part, shape in pairs]
        return tree_unflatten(parts, self.spec)


def _leaves_like(like: Any, tree: Any) -> list[Any]:
    """Return the leaves of a tree in the order of another, whatever the order of its keys; [] for another structure."""
    if isinstance(like, Mapping) and isinstance(tree, Mapping):
        keys = list(like) if like.keys() == tree.keys() else []
        pairs = [(like[key], tree[key]) for key in keys]
    elif isinstance(like, _NESTED) and isinstance(tree, _NESTED) and not isinstance(tree, Mapping):
        pairs = list(zip(like, tree, strict=True)) if len(like) == len(tree) else []
    else:
        leaves, spec = tree_flatten(tree)
        return leaves if spec == tree_flatten(like)[1] else []
    parts = [_leaves_like(*pair) for pair in pairs]
    return [leaf for part in parts for leaf in part]


class Selection:
    """A forward hook, or a function around a function, that selects the outputs and packs several as one tensor."""

    def __init__(self, output: Callable[[Any], Any], module: Module | None = None, *, several: bool = False) -> None:
        self.output, self.module, self.structure = output, module, Structure() if several else None

    @property
    def key(self) -> Hashable:
        """A key that differs from that of other selections."""
        return key_of(self.output, numbers=True)

    def __deepcopy__(self, memo: Any) -> "Selection":
        return self

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        """Return the selected outputs, of the module at these arguments or of what a hook got."""
        returned = given[2] if self.module is None else self.module(*given, **named)
        try:
            selected = self.output(returned)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            got = f"{type(error).__name__} ({error}) for {_described(returned, _parts(returned))}"
            raise InputError("`output` must select a tensor from what the network returns.", got=got) from error
        if self.structure is not None:
            return self.structure.read("What `output` selects", selected)
        if not isinstance(selected, Tensor):
            got = _described(selected, _parts(selected))
            raise InputError("`output` must select one tensor from what the network returns.", got=got)
        return selected


@contextmanager
def selecting(module: Module, output: Select | Selection | None) -> Iterator[None]:
    """Context in which the module returns what `output` selects from its outputs."""
    if output is None or not isinstance(module, nn.Module) or output in module._forward_hooks.values():
        yield
        return
    with module.register_forward_hook(output if isinstance(output, Selection) else Selection(output)):
        yield


def selection_of(module: Module) -> Selection | None:
    """Return the active selection, so that passes in the backward pass can use it after its context has ended."""
    hooks = module._forward_hooks.values() if isinstance(module, nn.Module) else ()
    return next((hook for hook in hooks if isinstance(hook, Selection)), None)


def class_dimension(module: Module, x: Tensor, arguments: Arguments | None = None) -> int | None:
    """Return the dimension of the classes if the layer that computes the outputs determines it, else None.

    It is −1 if the returned tensor is the unmodified output of an `nn.Linear`, and 1 if it is that of a convolution.
    The module is run once, without gradients; its buffers and the states of the random number generators are
    restored.
    """
    hooked = bool(nn.modules.module._global_forward_hooks)
    if not isinstance(module, nn.Module) or hooked or torch.compiler.is_compiling() or x.is_inference():
        return None
    made: list[tuple[Tensor, int, int]] = []

    def note(dimension: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        made.append((output, output._version, dimension))

    with ExitStack() as hooks, torch.no_grad(), preserved_generators(x.device), preserved_buffers(module):
        for layer in module.modules():
            forward = type(layer).forward
            dimension = -1 if forward is nn.Linear.forward else 1 if forward in _CONVOLUTIONS else None
            if dimension is not None and not layer._forward_hooks:
                hooks.enter_context(layer.register_forward_hook(partial(note, dimension)))
        outputs = output_tensor(call(module, x, arguments))
    dimensions = {dimension for tensor, version, dimension in made if tensor is outputs and version == outputs._version}
    return dimensions.pop() if len(dimensions) == 1 else None


_CONVOLUTIONS = tuple(
    getattr(nn, f"Conv{kind}{dimensions}d").forward for kind in ("", "Transpose") for dimensions in (1, 2, 3)
)


def run(
    module: Module,
    x: Tensor,
    layers: tuple[str, ...] = (),
    buffers: dict[str, Tensor] | None = None,
    arguments: Arguments | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs of the module at x, and the features of the named layers; `buffers` replace its own.

    The features are recorded while this function runs and are returned from it, so that a transform of this function
    (`torch.func.jvp`, say) treats them as results like any other.

    Raises:
        InputError: a layer does not exist, or never ran.
    """
    features: dict[str, Tensor] = {}
    with _caught(module, layers, features):
        if buffers:
            outputs = output_tensor(_with_buffers(module, x, buffers, arguments))
        else:
            outputs = output_tensor(call(module, x, arguments))
    missing = [layer for layer in layers if layer not in features]
    if missing:
        raise InputError("Every layer of a readout must run once in a forward pass.", got=f"never ran: {missing}")
    return outputs, features


def _with_buffers(module: Module, x: Tensor, buffers: dict[str, Tensor], arguments: Arguments | None) -> Any:
    # traceable by the compiler; ties by name would write a shared layer twice
    if torch.compiler.is_compiling() and isinstance(module, nn.Module):
        inputs = ((x,), None) if arguments is None else arguments.split(x)
        return functional_call(module, buffers, *inputs, tie_weights=False)
    with replaced_buffers(module, buffers):
        return call(module, x, arguments)


@contextmanager
def _caught(module: Module, layers: tuple[str, ...], features: dict[str, Tensor]) -> Iterator[None]:
    if not layers:
        yield
        return
    if not isinstance(module, nn.Module):
        raise UnsupportedError(
            f"Features of layers {list(layers)} can be computed only for an nn.Module; got {type(module).__name__}. "
            "Use a readout of the outputs."
        )
    known = dict(module.named_modules())
    with ExitStack() as hooks:
        for layer in layers:
            if layer not in known:
                raise unknown_name("The layer of a readout", layer, [name for name in known if name])
            hooks.enter_context(known[layer].register_forward_hook(partial(_catch, layer, features)))
        yield


def _catch(layer: str, features: dict[str, Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    # An in-place activation may follow and overwrite the returned tensor.
    # If a layer returns several tensors, its features are the first.
    first = output[0] if isinstance(output, list | tuple) and output else output
    features[layer] = output_tensor(first).clone()


def from_embeddings(
    module: nn.Module, layer: str, tokens: Int[Tensor, "batch *position"]
) -> tuple[Float[Tensor, "batch *position dimension"], Callable[[Tensor], Any]]:
    """Return the embeddings of the tokens, and the network as a function of them.

    Token ids have no derivative.

    Args:
        module: A network that takes tokens.
        layer: Dotted path of its embedding layer.
        tokens: The input.

    Raises:
        InputError: there is no such layer.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
        >>> e, function = from_embeddings(net, "0", torch.tensor([[1, 2], [3, 4]]))
        >>> tuple(e.shape), torch.equal(function(e), net(torch.tensor([[1, 2], [3, 4]])))
        ((2, 2, 4), True)
    """
    known = dict(module.named_modules())
    if layer not in known:
        raise unknown_name("`layer` of `from_embeddings`", layer, [name for name in known if name])
    embedding = known[layer]
    with torch.no_grad():
        embeddings = output_tensor(embedding(tokens))

    def function(x: Tensor) -> Any:
        with embedding.register_forward_hook(lambda *_: x):
            return module(tokens)

    return embeddings, function
