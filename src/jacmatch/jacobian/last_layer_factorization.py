"""The last layer of a network with fewer features than outputs: the full Jacobian needs a pass for each feature only.

With y = W h + b, h of F features and y of K > F outputs, J_y = W J_h: F backward passes and one product instead of K.
It is applied only to calls in which the network returns the result of that layer unmodified.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from jacmatch.jacobian.modules import Module
from jacmatch.jacobian.readouts import Context


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
    layers = module.modules() if isinstance(module, nn.Module) else ()
    handles = [layer.register_forward_hook(readout.note) for layer in layers if _is_factorizable(layer)]
    try:
        yield readout
    finally:
        for handle in handles:
            handle.remove()


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
