"""Perceptrons whose scalers are inside."""

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.models import build, load_weights, save_weights, scaled_mlp


def test_raw_units_on_both_sides():
    torch.manual_seed(0)
    mean, std, m, t = [1.0, -2.0], [0.5, 4.0], torch.tensor([100.0, 0.0, 3.0]), [10.0, 1e-3, 2.0]
    net = scaled_mlp(2, 3, (8,), "tanh", mean, std, m, t)
    x = torch.randn(5, 2)
    first, _, last = net.network.layers
    hidden = torch.tanh((x - torch.tensor(mean)) / torch.tensor(std) @ first.weight.T + first.bias)
    assert torch.allclose(net(x), m + torch.tensor(t) * (hidden @ last.weight.T + last.bias), atol=1e-5)


def test_scalers_are_saved_with_the_weights(tmp_path):
    net = scaled_mlp(2, 1, (4, 4), "softplus", [1.0, 2.0], [3.0, 4.0], [5.0], [6.0])
    save_weights(net, tmp_path / "net.safetensors")
    again = build("scaled-mlp:4-4-softplus", 1, (2,))
    load_weights(again, tmp_path / "net.safetensors")
    x = torch.randn(3, 2)
    assert torch.equal(again(x), net(x))


def test_wrong_scalers_are_refused():
    with pytest.raises(InputError, match="`y_scale` of `scaled_mlp` must be finite and above 0"):
        scaled_mlp(2, 1, y_scale=[0.0])
    with pytest.raises(InputError, match="`y_mean` of `scaled_mlp` must have one number, or one for each of the 3"):
        scaled_mlp(2, 3, y_mean=[0.0, 1.0])
    with pytest.raises(InputError, match="`y_mean` of `scaled_mlp` must be finite"):
        scaled_mlp(2, 1, y_mean=[float("nan")])
