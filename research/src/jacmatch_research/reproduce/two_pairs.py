"""Two pairs of teacher and student in plain torch.nn, as a user writes them: none is in the catalog of models.

Both halve the image three times, so they take 8 × 8 digits as well as images of 28 or 32 pixels.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from jacmatch.models.inputs import Normalized, Statistics

Shape = tuple[int, ...]


def convolutional(outputs: int, shape: Shape, widths: Sequence[int]) -> nn.Sequential:
    """Three 3×3 convolutions of stride 2 with ReLU, then a linear layer; no normalization."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
        channels, side = width, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, outputs))


class Block(nn.Module):
    """relu(x′ + BN(conv(relu(BN(conv(x)))))), x′ a 1×1 convolution of x with BatchNorm."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.skip = nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        hidden = functional.relu(self.first_norm(self.first(x)))
        output: Tensor = functional.relu(self.skip(x) + self.second_norm(self.second(hidden)))
        return output


def residual(outputs: int, shape: Shape, widths: Sequence[int]) -> nn.Sequential:
    """A convolution of stride 2, one residual block per width (stride 2 from the second on), mean, linear layer."""
    channels = widths[0]
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]
    for number, width in enumerate(widths):
        layers.append(Block(channels, width, 2 if number else 1))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def convolutional_teacher(outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """Three convolutions with 32, 64 and 128 channels."""
    return Normalized(convolutional(outputs, shape, (32, 64, 128)), shape, mean, std)


def convolutional_student(outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """Three convolutions with 16, 32 and 64 channels."""
    return Normalized(convolutional(outputs, shape, (16, 32, 64)), shape, mean, std)


def residual_teacher(outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """Three residual blocks with 24, 48 and 96 channels."""
    return Normalized(residual(outputs, shape, (24, 48, 96)), shape, mean, std)


def residual_student(outputs: int, shape: Shape, mean: Statistics, std: Statistics) -> nn.Module:
    """Three residual blocks with 12, 24 and 48 channels."""
    return Normalized(residual(outputs, shape, (12, 24, 48)), shape, mean, std)
