import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from jacmatch.errors import InputError
from jacmatch.models import ResNet, WideResNet, build, count_parameters

SHAPE = (3, 32, 32)


def counted_resnet(n, widths, channels, outputs):
    """Stem; n blocks of two 3×3 convolutions a stage; a 1×1 one where width or size changes; BatchNorm after each."""
    total = 9 * channels * widths[0] + 2 * widths[0]
    for stage, (a, b) in enumerate(itertools.pairwise(widths)):
        total += 9 * a * b + 9 * b * b + 4 * b + (n - 1) * (18 * b * b + 4 * b)
        if stage > 0 or a != b:
            total += a * b + 2 * b
    return total + widths[-1] * outputs + outputs


def counted_wrn(n, factor, channels, outputs):
    """As above, but BatchNorm before each 3×3 convolution and none with the 1×1 one."""
    widths = [16, 16 * factor, 32 * factor, 64 * factor]
    total = 9 * channels * 16
    for stage, (a, b) in enumerate(itertools.pairwise(widths)):
        total += 2 * a + 9 * a * b + 2 * b + 9 * b * b + (n - 1) * (18 * b * b + 4 * b)
        if stage > 0 or a != b:
            total += a * b
    return total + 2 * widths[-1] + widths[-1] * outputs + outputs


@pytest.mark.parametrize(
    ("name", "n", "paper_millions", "ten_outputs"),
    [
        ("resnet8", 1, None, 78_042),
        ("resnet20", 3, 0.27, 272_474),
        ("resnet32", 5, 0.46, 466_906),
        ("resnet56", 9, 0.85, 855_770),
        ("resnet110", 18, 1.7, 1_730_714),
    ],
)
def test_cifar_resnets_have_the_published_size(name, n, paper_millions, ten_outputs):
    count = count_parameters(build(name, 10, SHAPE))
    assert count == ten_outputs == counted_resnet(n, (16, 16, 32, 64), 3, 10)
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert projections == 2_752  # what option B has more than He's option A, whose millions the paper gives
    if paper_millions is not None:
        digits = 1 if name == "resnet110" else 2
        assert math.floor((count - projections) / 10 ** (6 - digits) + 0.5) / 10**digits == paper_millions


@pytest.mark.parametrize(("name", "n", "total"), [("resnet8x4", 1, 1_233_540), ("resnet32x4", 5, 7_433_860)])
def test_fourfold_resnets_have_the_published_size(name, n, total):
    assert count_parameters(build(name, 100, SHAPE)) == total == counted_resnet(n, (32, 64, 128, 256), 3, 100)


@pytest.mark.parametrize(
    ("name", "n", "factor", "total", "paper_millions"),
    [("wrn-16-2", 2, 2, 703_284, 0.7), ("wrn-40-1", 6, 1, 569_780, 0.6), ("wrn-40-2", 6, 2, 2_255_156, 2.2)],
)
def test_wide_resnets_have_the_published_size(name, n, factor, total, paper_millions):
    assert count_parameters(build(name, 100, SHAPE)) == total == counted_wrn(n, factor, 3, 100)
    # The paper counts for ten classes.
    assert round(counted_wrn(n, factor, 3, 10) / 1e6, 1) == paper_millions


def norm(x, state, name):
    """BatchNorm in eval mode."""
    mean, variance = (state[f"{name}.running_{which}"][None, :, None, None] for which in ("mean", "var"))
    scale, shift = (state[f"{name}.{which}"][None, :, None, None] for which in ("weight", "bias"))
    return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift


def head(x, state):
    return x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3]) @ state["linear.weight"].T + state["linear.bias"]


def resnet_by_definition(state, n, x):
    x = norm(F.conv2d((x - state["mean"]) / state["std"], state["conv1.weight"], padding=1), state, "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(n):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), state, f"{name}.bn1")
            y = norm(F.conv2d(y.clamp(min=0), state[f"{name}.conv2.weight"], padding=1), state, f"{name}.bn2")
            if f"{name}.shortcut.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride), state, f"{name}.shortcut.1")
            x = (x + y).clamp(min=0)
    return head(x, state)


def wrn_by_definition(state, n, x):
    x = F.conv2d((x - state["mean"]) / state["std"], state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(n):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            activated = norm(x, state, f"{name}.bn1").clamp(min=0)
            y = F.conv2d(activated, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(norm(y, state, f"{name}.bn2").clamp(min=0), state[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.weight" in state:
                x = F.conv2d(activated, state[f"{name}.shortcut.weight"], stride=stride)
            x = x + y
    return head(norm(x, state, "bn1").clamp(min=0), state)


@pytest.mark.parametrize(
    ("name", "n", "definition"),
    [
        ("resnet8", 1, resnet_by_definition),
        ("resnet20", 3, resnet_by_definition),
        ("resnet8x4", 1, resnet_by_definition),
        ("wrn-16-2", 2, wrn_by_definition),
        ("wrn-40-1", 6, wrn_by_definition),
    ],
)
def test_outputs_equal_the_definition(name, n, definition):
    model = build(name, 5, (3, 12, 9), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)).double()
    x = torch.rand(3, 3, 12, 9, dtype=torch.float64)
    model(x)  # running statistics other than 0 and 1
    torch.testing.assert_close(model.eval()(x), definition(model.state_dict(), n, x), rtol=1e-10, atol=1e-10)


def test_the_names_are_those_of_public_cifar_resnet56_weights():
    parts = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *[f"bn1.{part}" for part in parts], "linear.weight", "linear.bias"]
    for stage in (1, 2, 3):
        for block in range(9):
            prefix = f"layer{stage}.{block}"
            expected += [f"{prefix}.conv1.weight", f"{prefix}.conv2.weight"]
            expected += [f"{prefix}.{bn}.{part}" for bn in ("bn1", "bn2") for part in parts]
        if stage > 1:
            expected += [f"layer{stage}.0.shortcut.0.weight", *[f"layer{stage}.0.shortcut.1.{part}" for part in parts]]
    assert set(build("resnet56", 10, SHAPE).state_dict()) - {"mean", "std"} == set(expected)
    assert len(expected) == 344


@pytest.mark.parametrize("name", ["resnet8", "wrn-16-2"])
def test_stages_have_full_half_and_quarter_resolution(name):
    model = build(name, 5, (1, 28, 20)).eval()
    x = model.conv1(torch.rand(1, 1, 28, 20))
    sizes = [tuple((x := stage(x)).shape[2:]) for stage in (model.layer1, model.layer2, model.layer3)]
    assert sizes == [(28, 20), (14, 10), (7, 5)]


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn-16-2"])
def test_small_images(name):
    assert build(name, 2, (1, 5, 5)).eval()(torch.rand(1, 1, 5, 5)).isfinite().all()
    with pytest.raises(InputError, match=r"must have at least 5 pixels per side.*Got \(1, 4, 9\)"):
        build(name, 2, (1, 4, 9))


@pytest.mark.parametrize("depth", [0, 2, -4, 9, 18])
def test_a_depth_that_no_resnet_has_is_refused(depth):
    with pytest.raises(InputError, match=f"`depth` of `ResNet` must be 6n\\+2 with n ≥ 1. Got {depth}"):
        ResNet(depth, 10, SHAPE)


@pytest.mark.parametrize("depth", [0, 4, -2, 20])
def test_a_depth_that_no_wide_resnet_has_is_refused(depth):
    with pytest.raises(InputError, match=f"`depth` of `WideResNet` must be 6n\\+4 with n ≥ 1. Got {depth}"):
        WideResNet(depth, 2, 10, SHAPE)


def test_a_factor_below_one_is_refused():
    with pytest.raises(InputError, match=r"`factor` of `WideResNet` must be at least 1. Got 0"):
        WideResNet(16, 0, 10, SHAPE)


@pytest.mark.parametrize("name", ["resnet32x4", "wrn-40-2"])
def test_convolutions_start_with_hes_variance_and_the_linear_layer_without_bias(name):
    model = build(name, 10, SHAPE)
    weight = model.layer3[1].conv2.weight
    expected = math.sqrt(2 / (9 * weight.shape[0]))
    assert weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel()))
    assert model.linear.bias.abs().sum() == 0
