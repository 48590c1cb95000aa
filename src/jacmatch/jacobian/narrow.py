"""The last layer of a network with fewer features than outputs: the full Jacobian needs a pass for each feature only.

With y = W h + b, h of F features and y of K > F outputs, J_y = W J_h: F backward passes and one product instead of K.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.jacobian.modules import Module
from jacmatch.jacobian.readouts import Context


class Behind:
    """A readout: the features behind the last layer where that is linear and narrow, the outputs themselves elsewhere.

    Attributes:
        weight: W of the last layer (K, F) after a pass that found one, else None.
    """

    layers: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self._last: tuple[nn.Linear, Tensor, Tensor] | None = None

    def __call__(
        self, outputs: Float[Tensor, "batch *out"], features: Mapping[str, Tensor], context: Context
    ) -> Float[Tensor, "batch *feature"]:
        """Returns h, or the outputs."""
        layer, given, returned = self._last or (None, None, None)
        self._last = None
        if layer is None or given is None or returned is not outputs or given.dim() != 2:
            return outputs
        self.weight = layer.weight
        return given

    def note(self, layer: nn.Linear, given: tuple[Any, ...], returned: Tensor) -> None:
        """A forward hook."""
        self._last = (layer, given[0], returned) if given else None


@contextmanager
def behind_the_last_layer(module: Module) -> Iterator[Behind]:
    """The readout, for calls of the module within the context."""
    readout = Behind()
    layers = module.modules() if isinstance(module, nn.Module) else ()
    handles = [layer.register_forward_hook(readout.note) for layer in layers if _is_narrow(layer)]
    try:
        yield readout
    finally:
        for handle in handles:
            handle.remove()


def _is_narrow(layer: nn.Module) -> bool:
    """Whether it is y = W h + b with fewer features than outputs, and nothing else: no hook, no parametrisation."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return bool(layer.in_features < layer.out_features)
