"""VGG networks in the paper's notation: a layout such as 64-M-128-M, global average pooling, one linear layer."""

from collections import OrderedDict

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.models.inputs import RawInputs, Shape, Statistics, check_image

VGG9 = "64-M-128-M-256-256-M-512-512-M-512-512-M"  # the paper's teacher: 9.2 million parameters, from 17 pixels
VGG4 = "64-M-128-M-512-M"  # the paper's student: 0.7 million parameters, from 5 pixels
CNN5, CNN3 = "32-32-M-64-64-M", "16-M-32-M"  # for small gray images such as digits; not from a paper


class VGG(RawInputs):
    """A plain convolutional network with a given layout and He's initialization.

    A number means a 3×3 convolution with that many channels → BatchNorm → ReLU, and M means 2×2 max-pooling with stride
    2. The modules are named `features.conv1`, `features.pool1`, … in the order of the layout, and `classifier`.

    Pooling keeps incomplete windows at the border, n → ⌈n/2⌉. For sides divisible by 2^pools, as CIFAR's 32, this is
    the paper's network. 28 pixels become 28, 14, 7, 4, 2, 1 in VGG-9; without incomplete windows they would vanish. The
    convolutions have no bias: BatchNorm would subtract it again (the paper does not say).

    Args:
        layout: Channel counts and M, joined by hyphens.
        outputs, shape, mean, std: As in `RawInputs`; no 3×3 convolution may get a single pixel.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443; layouts from the workshop precursor "Local Affine Approximators"
        (NIPS 2017 LLD). Simonyan & Zisserman 2014, arXiv:1409.1556.
    """

    def __init__(
        self, layout: str, outputs: int, shape: Shape, mean: Statistics = None, std: Statistics = None
    ) -> None:
        items = parse_layout(layout)
        super().__init__(f"vgg:{layout}", outputs, shape, mean, std)
        last = max(position for position, item in enumerate(items) if item != "M")
        check_image(f"vgg:{layout}", shape, items[:last].count("M"))
        features: OrderedDict[str, nn.Module] = OrderedDict()
        channels, convolutions, pools = shape[0], 0, 0
        for item in items:
            if item == "M":
                pools += 1
                features[f"pool{pools}"] = nn.MaxPool2d(2, stride=2, ceil_mode=True)
            else:
                width, convolutions = int(item), convolutions + 1
                convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                # Not in place: an in-place ReLU as the first operation on the input breaks forward mode.
                layers = OrderedDict(conv=convolution, bn=nn.BatchNorm2d(width), relu=nn.ReLU())
                features[f"conv{convolutions}"] = nn.Sequential(layers)
                channels = width
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels, outputs)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch out"]:
        """Outputs for raw images."""
        maps = self.features(self.standardized(x))
        return self.classifier(F.adaptive_avg_pool2d(maps, 1).flatten(1))  # type: ignore[no-any-return]


def parse_layout(layout: str) -> list[str]:
    """The items of a layout."""
    items = layout.split("-")
    widths = [item for item in items if item != "M"]
    if not widths or not all(item.isascii() and item.isdigit() and int(item) > 0 for item in widths):
        rule = "`layout` of `vgg` must be channel counts and M for max-pooling, joined by hyphens."
        raise InputError(rule, got=repr(layout), do=f"VGG-4 is {VGG4}.")
    return items
