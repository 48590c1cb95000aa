"""Networks on flattened inputs: perceptrons, also with outputs in raw units, and the mean of a Gaussian process."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError, unknown_name
from jacmatch.models.inputs import RawInputs, Shape, Statistics, check_sizes, one_for_each


class Sine(nn.Module):
    """The sine of each entry."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return sin x."""
        return x.sin()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sine": Sine,
}


class MLP(RawInputs):
    """A fully connected network on flattened inputs of any shape, with one activation after each hidden layer.

    The weights have He's initialization (gain 5/3 for tanh), and the biases are zero.

    Args:
        outputs, shape, mean, std: As in `RawInputs`.
        hidden: Widths of the hidden layers; empty for an affine map.
        activation: A name in `ACTIVATIONS`. All but "relu" are smooth: Jacobians of a ReLU network are piecewise
            constant, which a smooth target's Jacobian is not.
    """

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
        super().__init__("mlp", outputs, shape, mean, std)
        if activation not in ACTIVATIONS:
            raise unknown_name("`activation` of `mlp`", activation, ACTIVATIONS)
        if any(width < 1 for width in hidden):
            raise InputError("`hidden` of `mlp` must be widths of at least 1.", got=tuple(hidden))
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
        return self.layers(self.standardized(x).flatten(1))  # type: ignore[no-any-return]


def mlp_from_layout(layout: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None) -> MLP:
    """The network of a layout: widths of the hidden layers joined by hyphens, then an activation if not "silu"."""
    items = layout.split("-")
    activation = "silu" if items[-1].isdigit() else items.pop()
    if not items or not all(item.isascii() and item.isdigit() for item in items):
        rule = "`mlp:LAYOUT` must be widths joined by hyphens, then an activation or none."
        raise InputError(rule, got=repr(layout), do="Two layers of 64 are 64-64, with tanh 64-64-tanh.")
    return MLP(outputs, shape, mean, std, hidden=tuple(int(item) for item in items), activation=activation)


class ScaledMLP(nn.Module):
    """A perceptron that takes and returns raw units: y = m + t · net((x − mean)/std).

    The means and scales are buffers, which are saved and exported with the weights.

    Args:
        network: Gives outputs of order 1, and scales its inputs itself.
        y_mean: Added to the outputs, one number for each or one for all.
        y_scale: Multiplies them, above 0.
    """

    y_mean: Tensor
    y_scale: Tensor

    def __init__(self, network: MLP, y_mean: Statistics = None, y_scale: Statistics = None) -> None:
        super().__init__()
        last = network.layers[-1]
        assert isinstance(last, nn.Linear)
        self.shape, self.network = network.shape, network
        for name, given in (("y_mean", y_mean), ("y_scale", y_scale)):
            what, scale = f"`{name}` of `scaled_mlp`", name == "y_scale"
            numbers = one_for_each(last.out_features, "outputs", what, given, scale=scale, varies="an output")
            self.register_buffer(name, numbers)

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch out"]:
        """Raw outputs for raw inputs."""
        return self.y_mean + self.y_scale * self.network(x)  # type: ignore[no-any-return]


def scaled_mlp(
    inputs: int | Shape,
    outputs: int,
    hidden: Sequence[int] = (64, 64),
    activation: str = "softplus",
    x_mean: Statistics | Tensor = None,
    x_scale: Statistics | Tensor = None,
    y_mean: Statistics | Tensor = None,
    y_scale: Statistics | Tensor = None,
) -> ScaledMLP:
    """Build a perceptron that takes and returns raw units; see `ScaledMLP`.

    Args:
        inputs: Number of input elements, or the shape of a sample.
        outputs: Number of outputs.
        hidden: Widths of the hidden layers.
        activation: A name in `ACTIVATIONS`. All are smooth except "relu", whose Jacobian is piecewise constant.
        x_mean: Mean that is subtracted from the raw inputs: one number per entry of the first axis, or one for all.
        x_scale: Scale by which the difference is divided, above 0.
        y_mean: Mean that is added to the scaled outputs.
        y_scale: Scale by which the outputs are multiplied, above 0.

    Example:
        >>> scaled_mlp(2, 1, y_mean=[5.0], y_scale=[0.1])(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    shape = (inputs,) if isinstance(inputs, int) else tuple(inputs)
    network = MLP(outputs, shape, _numbers(x_mean), _numbers(x_scale), hidden=hidden, activation=activation)
    return ScaledMLP(network, _numbers(y_mean), _numbers(y_scale))


def scaled_mlp_from_layout(
    layout: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None
) -> ScaledMLP:
    """The network of a layout such as "64-64-softplus" as in `mlp_from_layout`; its outputs are not scaled yet."""
    return ScaledMLP(mlp_from_layout(layout, outputs, shape, mean, std))


def _numbers(given: Statistics | Tensor) -> Statistics:
    if isinstance(given, Tensor):
        return [float(value) for value in given.detach().flatten().tolist()]
    return given


NO_CONSTANT = -1000.0
"""The logarithm of 0."""


class ProcessMean(nn.Module):
    """The mean y = m + t Σₙ k(uₙ) (aₙ + Σᵢ uₙᵢ ρ(uₙᵢ) bₙᵢ), uₙ = (z − zₙ)/ℓ, in raw units and float64 inside.

    k = Π (exp(−½ uᵢ²) + wᵢ)/(1 + wᵢ), and ρ is the first term's fraction of the sum. All numbers are buffers, w as its
    logarithm. Outputs whose partials are known at the same samples share their length scales ℓ and constants w. An
    output with a sign s of ±1 is s exp(y).

    References:
        Rasmussen & Williams 2006, section 9.4.
    """

    points: Tensor
    lengths: Tensor
    constants: Tensor
    groups: Tensor
    signs: Tensor
    values: Tensor
    partials: Tensor
    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    def __init__(self, outputs: int, shape: Shape, points: int, groups: int = 1) -> None:
        super().__init__()
        check_sizes("gaussian-process", outputs, shape)
        d = math.prod(shape)
        sizes = {"points": (points, d), "values": (points, outputs), "partials": (points, d, outputs)}
        sizes |= {"x_mean": (d,), "y_mean": (outputs,), "signs": (outputs,)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        for name, size in {"lengths": (groups, d), "x_scale": (d,), "y_scale": (outputs,)}.items():
            self.register_buffer(name, torch.ones(size, dtype=torch.float64))
        self.register_buffer("constants", torch.full((groups, d), NO_CONSTANT, dtype=torch.float64))
        self.register_buffer("groups", torch.zeros(outputs, dtype=torch.int64))

    def forward(self, x: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch out"]:
        """Return the mean for raw inputs."""
        z = (x.flatten(1).double() - self.x_mean) / self.x_scale
        y = torch.zeros(1, dtype=torch.float64, device=x.device)
        for group, (lengths, logarithm) in enumerate(zip(self.lengths, self.constants, strict=True)):
            u = (z[:, None] - self.points) / lengths
            half, w = 0.5 * u.square(), logarithm.exp()
            k = ((torch.exp(-half) + w) / (1 + w)).prod(2)
            shares = u * torch.sigmoid(-(half + logarithm))
            mean = k @ self.values + (k[:, :, None] * shares).flatten(1) @ self.partials.flatten(0, 1)
            y = y + mean * (self.groups == group)
        y = self.y_mean + self.y_scale * y
        some = self.signs.abs()
        return ((1 - some) * y + self.signs * (some * y).exp()).to(x.dtype)


def process_mean_from_layout(
    layout: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None
) -> ProcessMean:
    """Build the process of a layout, POINTS or POINTS-GROUPS; its weights contain the scaling.

    Example:
        >>> process_mean_from_layout("10-2", 1, (3,)).points.shape
        torch.Size([10, 3])
    """
    numbers = layout.split("-")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise InputError("`gaussian-process:LAYOUT` must be POINTS or POINTS-GROUPS.", got=repr(layout))
    return ProcessMean(outputs, shape, *map(int, numbers))
