"""The interface of all models: number of outputs, shape of a sample, and scaling of the raw input.

A model is built as ``f(outputs, shape, mean, std)`` and maps *raw* inputs (images in [0, 1]) to `outputs` numbers. It
scales the raw input itself, by its buffers `mean` and `std`. Two models with different preprocessing therefore have
Jacobians with respect to the same input, and can be compared.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.errors import InputError

Shape = tuple[int, ...]
"""The shape of one sample: (channels, height, width) of an image, (features,) of a vector."""
Statistics = Sequence[float] | None
"""One number per channel, or one for all; None leaves the input as it is."""


class RawInputs(nn.Module):
    """A model on raw inputs: it scales them by its buffers `mean` and `std`.

    Args:
        caller: Name of the model, for error messages.
        outputs: Number of outputs, at least 1.
        shape: Shape of one sample, (channels, height, width) of an image.
        mean: Subtracted from the raw input, one number for each channel (first axis of `shape`) or one for all.
        std: Divides the difference, above 0.

    Raises:
        InputError: A number is out of range, or the statistics do not fit `shape`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, caller: str, outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> None:
        super().__init__()
        check_sizes(caller, outputs, shape)
        self.shape = tuple(shape)
        for name, buffer in zip(("mean", "std"), statistics(caller, shape, mean, std), strict=True):
            self.register_buffer(name, buffer)

    def standardized(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch *input"]:
        """Return (x − mean)/std. A gray image would otherwise be broadcast silently to the three channels of `mean`."""
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"The input of `{type(self).__name__}` must have samples of the shape it was built for, {self.shape}.",
                got=tuple(x.shape[1:]),
                do="Build the model with the `shape` of this data.",
            )
        return (x - self.mean) / self.std


class Normalized(RawInputs):
    """Wrapper of a network of another library: `network` at (x − mean)/std for raw inputs x."""

    def __init__(self, network: nn.Module, shape: Shape, mean: Statistics = None, std: Statistics = None) -> None:
        super().__init__("Normalized", 1, shape, mean, std)
        self.network = network

    def forward(self, x: Float[Tensor, "batch *input"]) -> Any:
        """Return the network's outputs for the normalized inputs."""
        return self.network(self.standardized(x))


def check_sizes(caller: str, outputs: int, shape: Shape) -> None:
    """Check that a model can have these outputs and this sample shape."""
    if outputs < 1:
        raise InputError(f"`outputs` of `{caller}` must be at least 1.", got=outputs)
    if not shape or any(side < 1 for side in shape):
        raise InputError(f"`shape` of `{caller}` must have at least one axis, each of at least 1.", got=shape)


def statistics(
    caller: str, shape: Shape, mean: Statistics, std: Statistics
) -> tuple[Float[Tensor, "1 *channel"], Float[Tensor, "1 *channel"]]:
    """Return the buffers `mean` and `std`, one entry per channel (first axis), broadcastable over batch and pixels."""
    where = "channels of `shape`"
    buffers = [
        one_for_each(shape[0], where, f"`{name}` of `{caller}`", values, scale=name == "std", varies="a channel")
        for name, values in (("mean", mean), ("std", std))
    ]
    first, second = (buffer.reshape(1, shape[0], *[1] * (len(shape) - 1)) for buffer in buffers)
    return first, second


def one_for_each(count: int, of: str, name: str, values: Statistics, *, scale: bool, varies: str) -> Tensor:
    """Return `count` numbers: as given, one number repeated, or neutral values for None; a scale must be above 0."""
    entries = [1.0 if scale else 0.0] if values is None else [float(value) for value in values]
    if len(entries) not in {1, count}:
        rule = f"{name} must have one number, or one for each of the {count} {of}."
        raise InputError(rule, got=f"{len(entries)} numbers")
    if not all(math.isfinite(entry) and (entry > 0 or not scale) for entry in entries):
        rule, do = f"{name} must be finite{' and above 0' if scale else ''}.", f"For {varies} that never varies give 1."
        raise InputError(rule, got=tuple(entries), do=do if scale else "")
    return torch.tensor(entries).expand(count).clone()


def check_image(caller: str, shape: Shape, halvings: int) -> None:
    """Check that an image is large enough for a convolutional network with this many halvings.

    The rule: every 3×3 convolution sees at least two pixels per side, n > 2^halvings with sizes rounded up. On a single
    pixel, eight of its nine weights would only see the padding: they would be parameters, but never trained.
    """
    if len(shape) != 3:
        rule = f"`shape` of `{caller}` must be (channels, height, width)."
        raise InputError(rule, got=shape, do="For vectors use `mlp`.")
    least = 2**halvings + 1
    if min(shape[1:]) < least:
        raise InputError(
            f"`shape` of `{caller}` must have at least {least} pixels per side: it halves the image {halvings} times "
            "before its last 3×3 convolution.",
            got=shape,
            do="For 8×8 images take `vgg4`, `cnn5`, `cnn3` or a ResNet, for smaller ones `vgg:LAYOUT` or `mlp`.",
        )


class Resized(nn.Module):
    """Wrapper that resizes images to `size` × `size` pixels by bilinear interpolation, then calls `network`.

    The interpolation is linear in x and has no antialiasing. Derivatives are with respect to the raw images, so they
    can be compared with those of a student on the same images. `shape` (C, H, W) is that of the raw images.
    """

    def __init__(self, network: nn.Module, shape: Shape, size: int) -> None:
        super().__init__()
        if len(shape) != 3:
            raise InputError("`shape` of `Resized` must be (channels, height, width).", got=shape)
        if size < 1:
            raise InputError("`size` of `Resized` must be at least 1.", got=size)
        self.shape, self.size = tuple(shape), size
        self.network = network

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Any:
        """Return the network's outputs for the resized images."""
        if tuple(x.shape[1:]) != self.shape:
            rule = f"The input of `Resized` must have samples of the shape it was built for, {self.shape}."
            raise InputError(rule, got=tuple(x.shape[1:]), do="Build it with the `shape` of this data.")
        size = (self.size, self.size)
        return self.network(functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=False))


class FirstOutputs(nn.Module):
    """The first outputs of a network with two heads in one last layer; `network` has all outputs.

    Example:
        >>> both = nn.Linear(3, 7)
        >>> FirstOutputs(both, 2)(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, network: nn.Module, outputs: int) -> None:
        super().__init__()
        if outputs < 1:
            raise InputError("`outputs` of `FirstOutputs` must be at least 1.", got=outputs)
        self.network, self.outputs = network, outputs

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch out"]:
        """The first outputs."""
        return self.network(x)[:, : self.outputs]  # type: ignore[no-any-return]

    def cut(self, empty: nn.Module, x: Float[Tensor, "batch *input"]) -> nn.Module:
        """Copy the weights of these outputs into `empty` and return it; of a larger tensor, the first rows are copied.

        Args:
            empty: The same architecture, built with `outputs` outputs.
            x: A few inputs on which the two are compared.

        Raises:
            InputError: The outputs do not come from a linear last layer, so none can be removed.
        """
        whole = self.network.state_dict()
        wanted = empty.state_dict()
        rule = "A network with two heads must end in a linear layer, so that one can be removed."
        if whole.keys() != wanted.keys() or any(
            whole[name].shape[1:] != value.shape[1:] or len(whole[name].flatten()) < len(value.flatten())
            for name, value in wanted.items()
        ):
            raise InputError(rule, got="weights of different shapes")
        empty.load_state_dict(
            {name: whole[name][: len(value)] if value.dim() else whole[name] for name, value in wanted.items()}
        )
        empty.to(x.device).eval()
        with torch.no_grad():
            same = torch.allclose(empty(x), self.to(x.device).eval()(x), rtol=1e-3, atol=1e-4)
        if not same:
            raise InputError(rule, got="other outputs without the second head")
        return empty
