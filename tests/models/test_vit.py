import math

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.models import VisionTransformer, count_parameters
from jacmatch.models.vit import default_patch


def counted(patch, patches, width, depth, channels, outputs):
    """Patch map, class token, positions; a block has two norms, qkv, projection, a perceptron; norm, head."""
    embedding = channels * patch * patch * width + width + width + (patches + 1) * width
    block = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + 8 * width * width + 5 * width
    return embedding + depth * block + 2 * width + width * outputs + outputs


def test_the_published_size_of_vit_tiny():
    """DeiT's table gives 5.7 million for 224 pixels, patches of 16, 1,000 classes."""
    net = VisionTransformer(1000, (3, 224, 224), patch=16)
    assert count_parameters(net) == counted(16, 196, 192, 12, 3, 1000) == 5_717_416


@pytest.mark.parametrize(
    ("shape", "patch", "patches"), [((3, 32, 32), 4, 64), ((1, 28, 28), 4, 49), ((1, 8, 8), 2, 16)]
)
def test_vit_tiny_on_small_images(shape, patch, patches):
    assert count_parameters(VisionTransformer(10, shape)) == counted(patch, patches, 192, 12, shape[0], 10)


def layer_norm(x, state, name):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def by_definition(state, image, patch, depth, heads):
    """One image through the transformer, loops over patches and heads."""
    image = (image - state["mean"][0]) / state["std"][0]
    kernel = state["patch_embed.proj.weight"]
    tokens = [state["cls_token"][0, 0]]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            cut = image[:, top : top + patch, left : left + patch]
            tokens.append((kernel * cut).sum(dim=(1, 2, 3)) + state["patch_embed.proj.bias"])
    x = torch.stack(tokens) + state["pos_embed"][0]
    width = x.shape[1]
    size = width // heads
    for number in range(depth):
        name = f"blocks.{number}"
        qkv = linear(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
        parts = []
        for head in range(heads):
            q, k, v = (qkv[:, start + head * size : start + (head + 1) * size] for start in (0, width, 2 * width))
            scores = torch.exp(q @ k.T / math.sqrt(size))
            parts.append(scores / scores.sum(1, keepdim=True) @ v)
        x = x + linear(torch.cat(parts, dim=1), state, f"{name}.attn.proj")
        hidden = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, state, f"{name}.mlp.fc2")
    return linear(layer_norm(x, state, "norm")[0], state, "head")


def test_outputs_equal_the_definition():
    net = VisionTransformer(5, (2, 6, 9), (0.4, 0.6), (0.2, 0.3), patch=3, width=12, depth=2, heads=3).double()
    with torch.no_grad():
        for parameter in net.parameters():  # weights of 0.02 would leave attention nearly uniform
            parameter.copy_(torch.randn_like(parameter))
    x = torch.rand(3, 2, 6, 9, dtype=torch.float64)
    expected = torch.stack([by_definition(net.state_dict(), image, 3, 2, 3) for image in x])
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("height", "width", "patch"),
    [
        (28, 28, 4),
        (32, 32, 4),
        (8, 8, 2),
        (64, 64, 8),
        (96, 96, 12),
        (224, 224, 32),
        (7, 7, 1),
        (16, 16, 2),
        (28, 56, 4),
    ],
)
def test_the_patch_rule(height, width, patch):
    assert default_patch(height, width) == patch


@pytest.mark.parametrize(("height", "width"), [(29, 29), (31, 31), (32, 45)])
def test_images_without_a_common_divisor_are_refused(height, width):
    with pytest.raises(InputError, match=r"leaves at most 256 patches. Got .* patches of side 1. Pad or resize"):
        VisionTransformer(10, (3, height, width))


@pytest.mark.parametrize("patch", [0, -1, 5, 64])
def test_patches_that_do_not_divide_are_refused(patch):
    with pytest.raises(InputError, match=rf"`patch` of `vit` must divide .* Got {patch} for \(3, 32, 32\)"):
        VisionTransformer(10, (3, 32, 32), patch=patch)


@pytest.mark.parametrize("sizes", [{"width": 10, "heads": 3}, {"depth": 0}, {"heads": 0}, {"width": -3}])
def test_sizes_that_make_no_transformer_are_refused(sizes):
    with pytest.raises(InputError, match=r"`width` a multiple of `heads`. Got width"):
        VisionTransformer(10, (3, 32, 32), **sizes)


def test_weights_start_as_published():
    net = VisionTransformer(10, (3, 32, 32))
    weight = net.blocks[0].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * weight.numel()))
    assert net.blocks[0].attn.qkv.bias.abs().sum() == 0
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * net.pos_embed.numel()))


@pytest.mark.ci
def test_it_is_exported_for_any_batch_size():
    network = VisionTransformer(3, (3, 8, 8), depth=2).eval()
    program = torch.export.export(network, (torch.rand(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.rand(7, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), network(x))
