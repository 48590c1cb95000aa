"""A network for images of another size, and a network of which only the first outputs count."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from jacmatch.errors import InputError
from jacmatch.models.inputs import Shape


class Resized(nn.Module):
    """A network that sees the images resized: `network` of the bilinear interpolation of x to `size` × `size` pixels.

    The interpolation is linear in x and without antialiasing, so derivatives are by the raw images as they are given;
    a student on the same images then has a Jacobian by the same input.
    """

    def __init__(self, network: nn.Module, shape: Shape, size: int) -> None:
        """Wraps the network.

        Args:
            network: Takes images of `size` × `size` pixels.
            shape: Shape of an image as it is given, (channels, height, width).
            size: Pixels a side, at least 1.

        Raises:
            InputError: `shape` is not that of an image, or `size` is below 1.
        """
        super().__init__()
        if len(shape) != 3:
            raise InputError("`shape` of `Resized` must be (channels, height, width).", got=shape)
        if size < 1:
            raise InputError("`size` of `Resized` must be at least 1.", got=size)
        self.shape, self.size = tuple(shape), size
        self.network = network

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Any:
        """What the network returns for the resized images."""
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"The input of `Resized` must have samples of the shape it was built for, {self.shape}.",
                got=tuple(x.shape[1:]),
                do="Build it with the `shape` of this data.",
            )
        size = (self.size, self.size)
        return self.network(functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=False))


class FirstOutputs(nn.Module):
    """The first outputs of a network with two heads in one last layer: those of the task; `network` has all.

    Example:
        >>> both = nn.Linear(3, 7)
        >>> FirstOutputs(both, 2)(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, network: nn.Module, outputs: int) -> None:
        """Wraps the network.

        Args:
            network: Gives at least `outputs` outputs.
            outputs: How many of them count, at least 1.

        Raises:
            InputError: `outputs` is below 1.
        """
        super().__init__()
        if outputs < 1:
            raise InputError("`outputs` of `FirstOutputs` must be at least 1.", got=outputs)
        self.network, self.outputs = network, outputs

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch out"]:
        """The first outputs."""
        return self.network(x)[:, : self.outputs]  # type: ignore[no-any-return]

    def cut(self, empty: nn.Module, x: Float[Tensor, "batch *input"]) -> nn.Module:
        """`empty` with the weights that give these outputs; of a tensor that has more rows, the first are taken.

        Args:
            empty: The same architecture, built with `outputs` outputs.
            x: A few inputs on which the two are compared.

        Raises:
            InputError: The outputs are not a linear last layer's, so they cannot be cut off.
        """
        whole = self.network.state_dict()
        wanted = empty.state_dict()
        rule = "A network with two heads must have its outputs in a last linear layer, so that one can be cut off."
        if whole.keys() != wanted.keys() or any(
            whole[name].shape[1:] != value.shape[1:] or len(whole[name].flatten()) < len(value.flatten())
            for name, value in wanted.items()
        ):
            raise InputError(rule, got="weights of unlike shapes")
        empty.load_state_dict(
            {name: whole[name][: len(value)] if value.dim() else whole[name] for name, value in wanted.items()}
        )
        empty.to(x.device).eval()
        with torch.no_grad():
            same = torch.allclose(empty(x), self.to(x.device).eval()(x), rtol=1e-3, atol=1e-4)
        if not same:
            raise InputError(rule, got="other outputs without the second head")
        return empty
