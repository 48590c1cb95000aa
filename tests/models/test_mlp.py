import math

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.models import MLP, Normalized, count_parameters
from jacmatch.models.mlp import ACTIVATIONS, mlp_from_layout

FORMULAS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "softplus": lambda z: torch.log(1 + torch.exp(z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "tanh": lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)),
    "relu": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "sine": lambda z: torch.exp(1j * z).imag,
}


def test_every_activation_has_a_formula_here():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", FORMULAS)
def test_outputs_equal_the_formula(activation):
    net = MLP(2, (3, 2), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0), hidden=(5, 4), activation=activation).double()
    x = torch.randn(6, 3, 2, dtype=torch.float64)
    z = ((x - torch.tensor([0.1, 0.2, 0.3])[None, :, None]) / torch.tensor([1.0, 2.0, 4.0])[None, :, None]).reshape(
        6, 6
    )
    first, second, last = (module for module in net.layers if isinstance(module, torch.nn.Linear))
    z = FORMULAS[activation](z @ first.weight.T + first.bias)
    z = FORMULAS[activation](z @ second.weight.T + second.bias)
    torch.testing.assert_close(net(x), z @ last.weight.T + last.bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 4, 5), (2, 2, 2, 2)])
def test_any_shape_is_flattened_and_counted(shape):
    size = math.prod(shape)
    net = MLP(3, shape, (0.5,), (2.0,), hidden=(6, 5))
    assert count_parameters(net) == (size * 6 + 6) + (6 * 5 + 5) + (5 * 3 + 3)
    assert net(torch.randn(2, *shape)).shape == (2, 3)
    assert net.mean.shape == (1, shape[0], *[1] * (len(shape) - 1))


def test_the_default_is_smooth_and_has_two_layers_of_128():
    net = MLP(10, (16,))
    assert count_parameters(net) == 16 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert [type(module).__name__ for module in net.layers] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]


def test_no_hidden_layer_is_an_affine_map():
    net = MLP(2, (3,), hidden=()).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(net(x) - net(torch.zeros_like(x)), x @ net.layers[0].weight.T)


@pytest.mark.parametrize(("activation", "gain"), [("silu", math.sqrt(2)), ("relu", math.sqrt(2)), ("tanh", 5 / 3)])
def test_weights_start_with_hes_variance_and_zero_biases(activation, gain):
    net = MLP(1, (400,), hidden=(500,), activation=activation)
    weight = net.layers[0].weight
    # Standard deviation of a sample standard deviation: σ/√(2n); five of them.
    assert weight.std().item() == pytest.approx(gain / math.sqrt(400), rel=5 / math.sqrt(2 * weight.numel()))
    assert all(module.bias.abs().sum() == 0 for module in net.layers if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize(
    ("layout", "widths", "activation"),
    [("64", [64], "SiLU"), ("8-4", [8, 4], "SiLU"), ("8-4-2-tanh", [8, 4, 2], "Tanh"), ("5-relu", [5], "ReLU")],
)
def test_layouts_are_read(layout, widths, activation):
    net = mlp_from_layout(layout, 1, (3,), (0.5,), (2.0,))
    linear = [module for module in net.layers if isinstance(module, torch.nn.Linear)]
    assert [module.out_features for module in linear] == [*widths, 1]
    assert {type(module).__name__ for module in net.layers} == {"Linear", activation}
    assert net.mean.item() == pytest.approx(0.5) if net.mean.numel() == 1 else net.mean.unique().item() == 0.5


@pytest.mark.parametrize("layout", ["", "tanh", "8--4", "8-x-4", "-8", "８"])
def test_layouts_that_cannot_be_read_are_refused(layout):
    with pytest.raises(InputError, match=r"`mlp:LAYOUT` must be widths joined by hyphens.*Two layers of 64 are 64-64"):
        mlp_from_layout(layout, 1, (3,))


def test_a_width_of_zero_is_refused():
    with pytest.raises(InputError, match=r"`hidden` of `mlp` must be widths of at least 1. Got \(8, 0\)"):
        mlp_from_layout("8-0", 1, (3,))


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(InputError, match=r"`activation` of `mlp` must be a known name. Got 'silo'. Nearest: silu"):
        MLP(1, (3,), activation="silo")


def test_normalized_hands_the_scaled_input_to_the_network():
    inner = torch.nn.Flatten()
    wrapped = Normalized(inner, (2, 1, 1), (1.0, 3.0), (2.0, 4.0))
    x = torch.tensor([[5.0, 7.0], [1.0, 3.0]]).reshape(2, 2, 1, 1)
    torch.testing.assert_close(wrapped(x), torch.tensor([[2.0, 1.0], [0.0, 0.0]]))
