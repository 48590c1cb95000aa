import math

import pytest
import torch
import torch.nn.functional as F

from jacmatch.errors import InputError
from jacmatch.models import CATALOG, VGG, build, count_parameters
from jacmatch.models.vgg import parse_layout

# Written down from the paper, not from the code.
VGG9 = "64-M-128-M-256-256-M-512-512-M-512-512-M"
VGG4 = "64-M-128-M-512-M"


def counted(layout, channels, outputs):
    """3×3 weights, two numbers per channel of each BatchNorm, one linear layer with biases."""
    widths = [int(item) for item in layout.replace("M-", "").replace("-M", "").split("-")]
    convolutions = sum(9 * a * b for a, b in zip([channels, *widths[:-1]], widths, strict=True))
    return convolutions + 2 * sum(widths) + widths[-1] * outputs + outputs


def by_definition(net, layout, x):
    """The paper's network in functional form, in eval mode, from the parameters in the order of the layout."""
    state = net.state_dict()
    x = (x - state["mean"]) / state["std"]
    number = 0
    for item in layout.split("-"):
        if item == "M":
            x = F.max_pool2d(x, 2, 2)
            continue
        number += 1
        name = f"features.conv{number}"
        assert state[f"{name}.conv.weight"].shape[0] == int(item)
        x = F.conv2d(x, state[f"{name}.conv.weight"], padding=1)
        mean, variance = (state[f"{name}.bn.running_{which}"][None, :, None, None] for which in ("mean", "var"))
        scale, shift = (state[f"{name}.bn.{which}"][None, :, None, None] for which in ("weight", "bias"))
        x = ((x - mean) / torch.sqrt(variance + 1e-5) * scale + shift).clamp(min=0)
    return x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3]) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize(
    ("name", "layout"), [("vgg9", VGG9), ("vgg4", VGG4), ("cnn5", "32-32-M-64-64-M"), ("cnn3", "16-M-32-M")]
)
def test_the_network_is_its_layout(name, layout):
    net = CATALOG[name](5, (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)).double()
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    net(x)  # running statistics other than 0 and 1
    net.eval()
    torch.testing.assert_close(net(x), by_definition(net, layout, x), rtol=1e-12, atol=1e-12)
    assert count_parameters(net) == counted(layout, 3, 5)


def test_vgg9_has_eight_convolutions_and_one_linear_layer_and_the_sum_done_by_hand():
    convolutions = 1_728 + 73_728 + 294_912 + 589_824 + 1_179_648 + 3 * 2_359_296
    assert convolutions == 9_217_728
    for outputs, total in ((10, 9_228_362), (100, 9_274_532)):
        net = CATALOG["vgg9"](outputs, (3, 32, 32))
        assert count_parameters(net) == convolutions + 2 * 2_752 + 512 * outputs + outputs == total
    kinds = [type(module).__name__ for module in net.modules()]
    assert [kinds.count(kind) for kind in ("Conv2d", "BatchNorm2d", "MaxPool2d", "Linear")] == [8, 8, 5, 1]


def test_vgg4_has_three_convolutions_and_one_linear_layer_and_the_sum_done_by_hand():
    convolutions = 1_728 + 73_728 + 589_824
    for outputs, total in ((10, 671_818), (100, 717_988)):
        net = CATALOG["vgg4"](outputs, (3, 32, 32))
        assert count_parameters(net) == convolutions + 2 * 704 + 512 * outputs + outputs == total
    kinds = [type(module).__name__ for module in net.modules()]
    assert [kinds.count(kind) for kind in ("Conv2d", "BatchNorm2d", "MaxPool2d", "Linear")] == [3, 3, 3, 1]


def test_the_digit_networks_by_hand():
    assert count_parameters(CATALOG["cnn5"](10, (1, 8, 8))) == 288 + 9_216 + 18_432 + 36_864 + 2 * 192 + 650 == 65_834
    assert count_parameters(CATALOG["cnn3"](10, (1, 8, 8))) == 144 + 4_608 + 2 * 48 + 330 == 5_178


@pytest.mark.parametrize(
    ("name", "side", "sides"),
    [
        ("vgg9", 32, [16, 8, 4, 2, 1]),
        ("vgg9", 28, [14, 7, 4, 2, 1]),
        ("vgg9", 17, [9, 5, 3, 2, 1]),
        ("vgg9", 64, [32, 16, 8, 4, 2]),
        ("vgg4", 28, [14, 7, 4]),
        ("vgg4", 8, [4, 2, 1]),
        ("vgg4", 5, [3, 2, 1]),
        ("cnn3", 8, [4, 2]),
    ],
)
def test_pools_round_up_and_never_lose_the_image(name, side, sides):
    net = CATALOG[name](3, (1, side, side)).eval()
    x = torch.rand(1, 1, side, side)
    seen = []
    for module in net.features:
        x = module(x)
        if isinstance(module, torch.nn.MaxPool2d):
            assert x.shape[2] == x.shape[3]
            seen.append(x.shape[2])
    assert seen == sides


@pytest.mark.parametrize(("name", "least"), [("vgg9", 17), ("vgg4", 5), ("cnn5", 3), ("cnn3", 3)])
def test_images_on_which_a_convolution_would_see_one_pixel_are_refused(name, least):
    assert build(name, 2, (1, least, least + 9)).eval()(torch.rand(1, 1, least, least + 9)).isfinite().all()
    for shape in ((1, least - 1, least + 9), (1, least + 9, least - 1)):
        with pytest.raises(InputError, match=rf"must have at least {least} pixels per side.*Got \(1.*cnn3"):
            build(name, 2, shape)


def test_the_paper_layout_can_be_written_on_the_command_line():
    torch.manual_seed(3)
    written = build(f"vgg:{VGG4}", 7, (3, 32, 32), (0.5,), (0.2,)).state_dict()
    torch.manual_seed(3)
    named = build("vgg4", 7, (3, 32, 32), (0.5,), (0.2,)).state_dict()
    assert written.keys() == named.keys()
    assert all(torch.equal(written[key], named[key]) for key in named)


@pytest.mark.parametrize("layout", ["", "M", "64-", "64-N", "64-M-0", "64,M", "-8", "６４"])
def test_layouts_that_cannot_be_read_are_refused(layout):
    with pytest.raises(InputError, match=r"`layout` of `vgg` must be channel counts and M.*VGG-4 is 64-M-128-M-512-M"):
        parse_layout(layout)
    with pytest.raises(InputError, match=r"`layout` of `vgg`"):
        VGG(layout, 2, (3, 32, 32))


def test_convolutions_start_with_hes_variance_from_the_fan_out():
    weight = CATALOG["vgg9"](10, (3, 32, 32)).features.conv8.conv.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=5 / math.sqrt(2 * weight.numel()))
