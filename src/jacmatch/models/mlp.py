"""Fully connected networks on flattened inputs."""

import itertools
import math
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError, unknown_name
from jacmatch.models.inputs import Shape, Statistics, check_sizes, standardized, statistics

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


class MLP(nn.Module):
    """A fully connected network on flattened inputs of any shape, with one activation after each hidden layer."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        outputs: int,
        shape: Shape,
        mean: Statistics = None,
        std: Statistics = None,
        *,
        hidden: Sequence[int] = (128, 128),
        activation: str = "silu",
    ) -> None:
        """Builds the network with He's initialisation (gain 5/3 for tanh) and zero biases.

        Args:
            outputs: Number of outputs, at least 1.
            shape: Shape of one sample.
            mean: Subtracted from the raw input, per entry of the first axis of `shape` or one for all.
            std: Divides the difference, above 0.
            hidden: Widths of the hidden layers; empty for an affine map.
            activation: A name in `ACTIVATIONS`. All but "relu" are smooth: Jacobians of a ReLU network are piecewise
                constant, which a smooth target's Jacobian is not.

        Raises:
            InputError: If a number is not positive, the statistics do not fit `shape`, or the activation is unknown.
        """
        super().__init__()
        check_sizes("mlp", outputs, shape)
        if activation not in ACTIVATIONS:
            raise unknown_name("`activation` of `mlp`", activation, ACTIVATIONS)
        if any(width < 1 for width in hidden):
            raise InputError("`hidden` of `mlp` must be widths of at least 1.", got=tuple(hidden))
        self.shape = tuple(shape)
        mean_buffer, std_buffer = statistics("mlp", shape, mean, std)
        self.register_buffer("mean", mean_buffer)
        self.register_buffer("std", std_buffer)
        widths = [math.prod(shape), *hidden, outputs]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="tanh" if activation == "tanh" else "relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch out"]:
        """Outputs for raw inputs."""
        return self.layers(standardized(self, x).flatten(1))  # type: ignore[no-any-return]


def mlp(
    outputs: int,
    shape: Shape,
    mean: Statistics = None,
    std: Statistics = None,
    *,
    hidden: Sequence[int] = (128, 128),
    activation: str = "silu",
) -> MLP:
    """A fully connected network with two hidden layers of 128 and a smooth activation, or as asked; see `MLP`.

    Example:
        >>> import torch
        >>> net = mlp(3, (2,), hidden=(5,))
        >>> net(torch.zeros(4, 2)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([4, 3]), 33)
    """
    return MLP(outputs, shape, mean, std, hidden=hidden, activation=activation)


def mlp_from_layout(layout: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None) -> MLP:
    """The network of a layout: widths of the hidden layers joined by hyphens, then an activation if not "silu".

    Raises:
        InputError: If a width is not a positive number, or the activation is unknown.

    Example:
        >>> [type(layer).__name__ for layer in mlp_from_layout("8-4-tanh", 1, (2,)).layers]
        ['Linear', 'Tanh', 'Linear', 'Tanh', 'Linear']
    """
    *items, last = layout.split("-")
    activation = "silu"
    if last.isdigit():
        items.append(last)
    else:
        activation = last
    if not items or not all(item.isascii() and item.isdigit() for item in items):
        raise InputError(
            "`mlp:LAYOUT` must be widths joined by hyphens, then an activation or none.",
            got=repr(layout),
            do="Two layers of 64 are 64-64, with tanh 64-64-tanh.",
        )
    return mlp(outputs, shape, mean, std, hidden=tuple(int(item) for item in items), activation=activation)
