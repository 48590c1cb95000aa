"""What a network returns: its outputs, and features of layers asked for by their dotted path."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from jacmatch.errors import InputError, UnsupportedError, unknown_name
from jacmatch.jacobian.buffers import replaced_buffers
from jacmatch.jacobian.modules import Module


def output_tensor(output: Any) -> Tensor:
    """The logits in what a network returned: a tensor, the first of a tuple, or `logits` of a mapping or object.

    Raises:
        InputError: no tensor can be told apart from the others.

    Example:
        >>> output_tensor({"logits": torch.ones(2, 3), "loss": None}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "out"):
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    candidates = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(candidates, list | tuple) and candidates and isinstance(candidates[0], Tensor):
        if isinstance(output, Mapping) and sum(isinstance(value, Tensor) for value in candidates) > 1:
            raise InputError(
                "A network that returns a dictionary must have `logits` or `out` in it, or one tensor only.",
                got=f"keys {sorted(output)}",
                do="Wrap it in a function that returns the tensor to differentiate.",
            )
        return candidates[0]
    raise InputError(
        "A network must return a tensor, a tuple that begins with one, or a dictionary or object with `logits`.",
        got=type(output).__name__,
        do="Wrap it in a function that returns the tensor to differentiate.",
    )


def run(
    module: Module, x: Tensor, layers: tuple[str, ...] = (), buffers: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs of the module at x, and the features of the named layers; `buffers` take the place of its own.

    The features are caught while this function runs and are returned from it, so that a transform of this function
    (`torch.func.jvp`, say) sees them as results like any other.

    Raises:
        InputError: a layer does not exist, or never ran.
    """
    features: dict[str, Tensor] = {}
    with _caught(module, layers, features):
        if buffers and isinstance(module, nn.Module):
            outputs = output_tensor(_with_buffers(module, x, buffers))
        else:
            outputs = output_tensor(module(x))
    missing = [layer for layer in layers if layer not in features]
    if missing:
        raise InputError("Every layer of a readout must run once in a forward pass.", got=f"never ran: {missing}")
    return outputs, features


def _with_buffers(module: nn.Module, x: Tensor, buffers: dict[str, Tensor]) -> Any:
    if torch.compiler.is_compiling():  # the compiler follows this one; ties by name would write a shared layer twice
        return functional_call(module, buffers, (x,), tie_weights=False)
    with replaced_buffers(module, buffers):
        return module(x)


@contextmanager
def _caught(module: Module, layers: tuple[str, ...], features: dict[str, Tensor]) -> Iterator[None]:
    if not layers:
        yield
        return
    if not isinstance(module, nn.Module):
        raise UnsupportedError(
            f"Features of layers {list(layers)} can be had from an nn.Module only; got {type(module).__name__}. "
            "Use a readout of the outputs."
        )
    known = dict(module.named_modules())
    handles = []
    try:
        for layer in layers:
            if layer not in known:
                raise unknown_name("The layer of a readout", layer, [name for name in known if name])
            handles.append(known[layer].register_forward_hook(_catcher(layer, features)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _catcher(layer: str, features: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def catch(module: nn.Module, inputs: Any, output: Any) -> None:
        # An in-place activation may follow and overwrite what was returned here.
        features[layer] = output_tensor(output).clone()

    return catch


def from_embeddings(
    module: nn.Module, layer: str, tokens: Int[Tensor, "batch *position"]
) -> tuple[Float[Tensor, "batch *position dimension"], Callable[[Tensor], Any]]:
    """The embeddings of the tokens, and the network as a function of them: text has no derivative in its tokens.

    Args:
        module: A network of tokens.
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
        handle = embedding.register_forward_hook(lambda *_: x)
        try:
            return module(tokens)
        finally:
            handle.remove()

    return embeddings, function
