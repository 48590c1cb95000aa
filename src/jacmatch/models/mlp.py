"""Fully connected networks, and what every model of this package takes: outputs, the shape of a sample, its scaling.

A model is built as ``f(outputs, shape, mean, std)`` and maps *raw* inputs (images in [0, 1]) to `outputs` numbers. It
scales the raw input itself, by its buffers `mean` and `std`: two models with different preprocessing then have
Jacobians with respect to the same input, which is what makes them comparable.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError, unknown_name

Shape = tuple[int, ...]
"""The shape of one sample: (channels, height, width) of an image, (features,) of a vector."""
Statistics = Sequence[float] | None
"""One number per channel, or one for all; None leaves the input as it is."""

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


class Normalized(nn.Module):
    """A network of another library on raw inputs: outputs of `network` at (x − mean)/std."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, shape: Shape, mean: Statistics = None, std: Statistics = None) -> None:
        """Wraps the network.

        Args:
            network: Takes normalised inputs.
            shape: Shape of one sample.
            mean: Subtracted from the raw input, per channel or one for all.
            std: Divides the difference, above 0.
        """
        super().__init__()
        self.shape = tuple(shape)
        mean_buffer, std_buffer = statistics("Normalized", shape, mean, std)
        self.register_buffer("mean", mean_buffer)
        self.register_buffer("std", std_buffer)
        self.network = network

    def forward(self, x: Float[Tensor, "batch *input"]) -> Any:
        """What the network returns for the normalised inputs."""
        return self.network(standardized(self, x))


def check_sizes(caller: str, outputs: int, shape: Shape) -> None:
    """Nothing, if a model can have these outputs and this sample shape.

    Raises:
        InputError: If `outputs` or an entry of `shape` is below 1, or `shape` is empty.
    """
    if outputs < 1:
        raise InputError(f"`outputs` of `{caller}` must be at least 1.", got=outputs)
    if not shape or any(side < 1 for side in shape):
        raise InputError(f"`shape` of `{caller}` must have at least one axis, each of at least 1.", got=shape)


def statistics(
    caller: str, shape: Shape, mean: Statistics, std: Statistics
) -> tuple[Float[Tensor, "1 *channel"], Float[Tensor, "1 *channel"]]:
    """The buffers `mean` and `std`, one entry per channel (first axis of `shape`), broadcastable over batch and pixels.

    Raises:
        InputError: If there is neither one number nor one per channel, one is not finite, or an `std` is not above 0.
    """
    channels = shape[0]
    buffers = []
    for name, values, neutral in (("mean", mean, 0.0), ("std", std, 1.0)):
        entries = [neutral] if values is None else [float(value) for value in values]
        if len(entries) not in {1, channels}:
            raise InputError(
                f"`{name}` of `{caller}` must have one number, or one for each of the {channels} channels of `shape`.",
                got=f"{len(entries)} numbers",
            )
        if not all(math.isfinite(entry) and (name == "mean" or entry > 0) for entry in entries):
            raise InputError(
                f"`{name}` of `{caller}` must be finite{'' if name == 'mean' else ' and above 0'}.",
                got=tuple(entries),
                do="" if name == "mean" else "For a channel that never varies give 1.",
            )
        buffer = torch.tensor(entries).expand(channels).reshape(1, channels, *[1] * (len(shape) - 1))
        buffers.append(buffer.contiguous())
    return buffers[0], buffers[1]


def standardized(model: nn.Module, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch *input"]:
    """(x − mean)/std with the model's own buffers.

    Raises:
        InputError: If a sample has not the shape that the model was built for; a grey image would otherwise be
            broadcast silently to the three channels of `mean`.
    """
    expected = model.shape
    if tuple(x.shape[1:]) != expected:
        raise InputError(
            f"The input of `{type(model).__name__}` must have samples of the shape it was built for, {expected}.",
            got=tuple(x.shape[1:]),
            do="Build the model with the `shape` of this data.",
        )
    return (x - model.mean) / model.std  # type: ignore[operator]


def check_image(caller: str, shape: Shape, halvings: int) -> None:
    """Nothing, if a convolutional network that halves the image this often before a 3×3 convolution can take it.

    The rule: every 3×3 convolution sees at least two pixels a side, n > 2^halvings with sizes rounded up. On a single
    pixel eight of its nine weights would only ever meet the padding: counted as parameters, never trained.

    Raises:
        InputError: If `shape` is not (channels, height, width) or the image is too small.
    """
    if len(shape) != 3:
        raise InputError(
            f"`shape` of `{caller}` must be (channels, height, width).", got=shape, do="For vectors use `mlp`."
        )
    least = 2**halvings + 1
    if min(shape[1:]) < least:
        raise InputError(
            f"`shape` of `{caller}` must have at least {least} pixels a side: it halves the image {halvings} times "
            "before its last 3×3 convolution.",
            got=shape,
            do="For 8×8 images take `vgg4`, `cnn5`, `cnn3` or a ResNet, for smaller ones `vgg:LAYOUT` or `mlp`.",
        )
