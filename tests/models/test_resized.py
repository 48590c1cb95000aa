"""Images of another size for a teacher, and one of two heads for a student."""

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.jacobian import vjp
from jacmatch.models import FirstOutputs, Normalized, Resized, build


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_resizing_is_linear_and_the_derivative_is_by_the_raw_image():
    """y = W R x with the matrix R of the interpolation: the product vᵀJ is vᵀ W R."""
    inner = nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 5, 3)).double()
    network = Resized(inner, (2, 4, 4), 5)
    x, v = images(6, 2, 4, 4), images(6, 3)
    unit = torch.eye(32, dtype=torch.float64).view(32, 2, 4, 4)
    matrix = nn.functional.interpolate(unit, (5, 5), mode="bilinear", align_corners=False).flatten(1)
    y, row = vjp(network, x, v)
    weight = inner[1].weight @ matrix.T
    torch.testing.assert_close(y, x.flatten(1) @ weight.T + inner[1].bias)
    torch.testing.assert_close(row.flatten(1), v @ weight)


def test_a_pixel_of_a_doubled_image_is_a_mean_of_its_neighbors():
    """One row 0, 4 becomes 0, 1, 3, 4: weights ¾ and ¼ inside, the border repeated."""
    wide = Resized(nn.Identity(), (1, 2, 2), 4)(torch.tensor([[[[0.0, 4.0], [0.0, 4.0]]]]))
    assert wide[0, 0, 1].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("spec", ["cnn3", "mlp:6", "resnet8"])
def test_one_head_is_cut_off(spec):
    torch.manual_seed(0)
    both = build(spec, outputs=3 + 5, shape=(1, 8, 8), mean=(0.3,), std=(0.4,))
    student = FirstOutputs(both, 3)
    x = images(4, 1, 8, 8).float()
    cut = student.cut(build(spec, outputs=3, shape=(1, 8, 8)), x)
    torch.testing.assert_close(cut(x), both.eval()(x)[:, :3])
    assert cut(x).shape == (4, 3)


class Mixed(nn.Module):
    """A network whose outputs depend on how many there are."""

    def __init__(self, outputs):
        super().__init__()
        self.last = nn.Linear(4, outputs)

    def forward(self, x):
        return self.last(x).softmax(1)


def test_what_cannot_be_cut_off_is_refused():
    x = torch.rand(2, 4)
    with pytest.raises(InputError, match=r"must end in a linear layer.*Got other outputs without the second head"):
        FirstOutputs(Mixed(7), 3).cut(Mixed(3), x)
    with pytest.raises(InputError, match=r"must end in a linear layer.*Got weights of different shapes"):
        FirstOutputs(Mixed(7), 3).cut(nn.Linear(4, 3), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Resized(nn.Identity(), (64,), 8), r"`shape` of `Resized` must be \(channels, height, width\)\. Got"),
        (lambda: Resized(nn.Identity(), (1, 8, 8), 0), r"`size` of `Resized` must be at least 1\. Got 0"),
        (
            lambda: Resized(nn.Identity(), (1, 8, 8), 4)(torch.ones(1, 1, 8, 9)),
            r"input of `Resized` must have .* built for, \(1, 8, 8\)\. Got \(1, 8, 9\)",
        ),
        (lambda: FirstOutputs(nn.Identity(), 0), r"`outputs` of `FirstOutputs` must be at least 1\. Got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_normalization_stays_inside():
    inner = Normalized(nn.Flatten(), (1, 2, 2), (0.5,), (0.5,))
    x = torch.full((1, 1, 4, 4), 0.75)
    assert Resized(inner, (1, 4, 4), 2)(x).tolist() == [[0.5] * 4]
