"""Residual networks for small images: CIFAR ResNets and Wide ResNets, as the distillation literature uses them.

All have three stages `layer1`, `layer2`, `layer3` at full, half and quarter resolution, global average pooling and one
linear layer; they take images of at least 5 × 5 pixels.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.models.inputs import RawInputs, Shape, Statistics, check_image

STANDARD = (16, 16, 32, 64)
FOURFOLD = (32, 64, 128, 256)


class ResNet(RawInputs):
    """A CIFAR ResNet of depth 6n+2: a stem, then three stages of n basic blocks.

    Where the resolution or the width changes, the shortcut is a 1×1 convolution with BatchNorm (He's option B, which
    the distillation literature uses). Option A of the original CIFAR networks, zero padding, has 2,752 fewer parameters
    at widths 16, 32, 64: 269,722 instead of 272,474 for ResNet-20 with ten outputs.

    Args:
        depth: 6n+2, n ≥ 1.
        outputs, shape, mean, std: As in `RawInputs`; images of at least 5 × 5 pixels.
        widths: Channels of the stem and of the three stages.

    References:
        He et al. 2015, arXiv:1512.03385, section 4.2. Stem and widths of the x4 variants: Tian et al. 2019,
        arXiv:1910.10699.
    """

    def __init__(
        self,
        depth: int,
        outputs: int,
        shape: Shape,
        mean: Statistics = None,
        std: Statistics = None,
        *,
        widths: tuple[int, int, int, int] = STANDARD,
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            raise InputError("`depth` of `ResNet` must be 6n+2 with n ≥ 1.", got=depth, do="Use 8, 14, 20, 26, 32, …")
        super().__init__(f"resnet{depth}", outputs, shape, mean, std)
        check_image(f"resnet{depth}", shape, halvings=2)
        stem, first, second, third = widths
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(shape[0], stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(BasicBlock, stem, first, blocks, stride=1)
        self.layer2 = _stage(BasicBlock, first, second, blocks, stride=2)
        self.layer3 = _stage(BasicBlock, second, third, blocks, stride=2)
        self.linear = nn.Linear(third, outputs)
        _initialize(self)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch out"]:
        """Outputs for raw images."""
        maps = F.relu(self.bn1(self.conv1(self.standardized(x))))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return self.linear(F.adaptive_avg_pool2d(maps, 1).flatten(1))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, each with BatchNorm, plus the shortcut; ReLU after the first and after the sum."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(fan_in, fan_out, stride)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = _conv3x3(fan_out, fan_out)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            projection = nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(fan_out))

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch out_channel out_height out_width"]:
        """Feature maps after the last ReLU."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class WideResNet(RawInputs):
    """A Wide ResNet of depth 6n+4 without dropout: a stem of 16 channels, then three stages of n pre-activation blocks.

    Args:
        depth: 6n+4, n ≥ 1.
        factor: Widths of the stages as multiples of 16, 32, 64; at least 1.
        outputs, shape, mean, std: As in `RawInputs`; images of at least 5 × 5 pixels.

    References:
        Zagoruyko & Komodakis 2016, arXiv:1605.07146.
    """

    def __init__(
        self, depth: int, factor: int, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None
    ) -> None:
        if depth < 10 or depth % 6 != 4:
            raise InputError("`depth` of `WideResNet` must be 6n+4 with n ≥ 1.", got=depth, do="10, 16, 22, 28 … fit.")
        if factor < 1:
            raise InputError("`factor` of `WideResNet` must be at least 1.", got=factor)
        super().__init__(f"wrn-{depth}-{factor}", outputs, shape, mean, std)
        check_image(f"wrn-{depth}-{factor}", shape, halvings=2)
        blocks = (depth - 4) // 6
        self.conv1 = _conv3x3(shape[0], 16)
        self.layer1 = _stage(PreactivationBlock, 16, 16 * factor, blocks, stride=1)
        self.layer2 = _stage(PreactivationBlock, 16 * factor, 32 * factor, blocks, stride=2)
        self.layer3 = _stage(PreactivationBlock, 32 * factor, 64 * factor, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * factor)
        self.linear = nn.Linear(64 * factor, outputs)
        _initialize(self)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch out"]:
        """Outputs for raw images."""
        maps = self.layer3(self.layer2(self.layer1(self.conv1(self.standardized(x)))))
        maps = F.relu(self.bn1(maps))
        return self.linear(F.adaptive_avg_pool2d(maps, 1).flatten(1))  # type: ignore[no-any-return]


class PreactivationBlock(nn.Module):
    """BatchNorm, ReLU, 3×3 convolution, twice, plus the shortcut; a projection shares the first BatchNorm and ReLU."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(fan_in)
        self.conv1 = _conv3x3(fan_in, fan_out, stride)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.conv2 = _conv3x3(fan_out, fan_out)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False)

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch out_channel out_height out_width"]:
        """Feature maps before the activation that follows."""
        activated = F.relu(self.bn1(x))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _stage(
    block: type[BasicBlock] | type[PreactivationBlock], fan_in: int, fan_out: int, count: int, stride: int
) -> nn.Sequential:
    """Blocks of one width; the first one changes width and resolution."""
    later = [block(fan_out, fan_out, 1) for _ in range(count - 1)]
    return nn.Sequential(block(fan_in, fan_out, stride), *later)


def _conv3x3(fan_in: int, fan_out: int, stride: int = 1) -> nn.Conv2d:
    """3×3 convolution without bias that keeps the image size, up to the stride."""
    return nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)


def _initialize(model: nn.Module) -> None:
    """He's initialization of the convolutions, from the fan out; a linear layer starts with zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
