"""Vision transformers for small images."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.models.inputs import RawInputs, Shape, Statistics

MOST_PATCHES = 256


class VisionTransformer(RawInputs):
    """A vision transformer with a class token, learned positions and normalization before each sublayer.

    Parameters are named as in timm, whose weights (and DeiT's) of the same patch, width, depth and image size load.
    Attention is `F.scaled_dot_product_attention`: its fused kernels have neither forward mode nor double backward, so
    Jacobian terms need its math kernel around the differentiated pass, which `jacmatch.vjp` and `jacmatch.jvp` choose.
    Weights and positions start from a normal of standard deviation 0.02 cut at ±2, as those of DeiT.

    Args:
        outputs, shape, mean, std: As in `RawInputs`.
        patch: Side length of a patch in pixels; None takes `default_patch`.
        width: Length of a token, a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads.

    References:
        Dosovitskiy et al. 2020, arXiv:2010.11929. Touvron et al. 2020, arXiv:2012.12877.
    """

    def __init__(
        self,
        outputs: int,
        shape: Shape,
        mean: Statistics = None,
        std: Statistics = None,
        *,
        patch: int | None = None,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
    ) -> None:
        super().__init__("vit", outputs, shape, mean, std)
        if min(width, depth, heads) < 1 or width % heads:
            rule = "`width`, `depth` and `heads` of `vit` must be at least 1, and `width` a multiple of `heads`."
            raise InputError(rule, got=f"width {width}, depth {depth}, heads {heads}")
        patch, patches = _cut(shape, patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(shape[0], width, patch, stride=patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)
        self._initialize()

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch out"]:
        """Outputs for raw images."""
        patches = self.patch_embed(self.standardized(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])  # type: ignore[no-any-return]

    def _initialize(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Attention and a two-layer perceptron of fourfold width, each on the normalized tokens and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        layers = OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        """Tokens after both sublayers."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        """Each token's weighted mean of values, all heads side by side, projected."""
        split = self.qkv(tokens).reshape(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _cut(shape: Shape, patch: int | None) -> tuple[int, int]:
    """The side and the number of the patches."""
    if len(shape) != 3:
        raise InputError("`shape` of `vit` must be (channels, height, width).", got=shape, do="For vectors use `mlp`.")
    _, height, width = shape
    side = default_patch(height, width) if patch is None else patch
    if side < 1 or height % side or width % side:
        rule = "`patch` of `vit` must divide the height and the width of the image."
        raise InputError(rule, got=f"{side} for {shape}")
    return side, (height // side) * (width // side)


def default_patch(height: int, width: int) -> int:
    """The patch side for an image: the largest that divides both sides and leaves about seven patches per side or more.

    max {p : p | height, p | width, p ≤ max(2, ⌊min(height, width)/7⌋)}: 2 for 8 pixels, 4 for 28 and 32, 8 for 64, 32
    for 224.
    """
    limit = max(2, min(height, width) // 7)
    patch = max(side for side in range(1, limit + 1) if height % side == 0 and width % side == 0)
    patches = (height // patch) * (width // patch)
    if patches > MOST_PATCHES:
        rule = f"`shape` of `vit` must have sides with a common divisor that leaves at most {MOST_PATCHES} patches."
        do = "Pad or resize the images, or give `patch`."
        raise InputError(rule, got=f"{height}×{width} pixels, {patches} patches of side {patch}", do=do)
    return patch
