"""Operations in a form in which a pass with derivatives can be compiled.

A compiled pass is differentiated by `torch.func.vjp` while it is traced. An `autograd.Function` silently loses its
second derivative there, so operations without one, or that need another one, are composed of plain operations.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from jacmatch.jacobian.rules.batch_norm import move_running_statistics


def _below(x: Tensor) -> Tensor:
    """Return the tensor outside of the one `torch.func.vjp`: with its graph by the parameters, none by the input."""
    below: Tensor = torch._C._functorch._unwrap_for_grad(x, 1)
    return below


def batch_norm(
    frozen: bool,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` as γ (x − μ) / √(σ² + ε) + β, statistics in float32 at least."""
    if training:
        seen = _below(x) if frozen else x
        dimensions = [0, *range(2, x.dim())]
        seen = seen.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(seen, dimensions, unbiased=False)
        if running_mean is not None and running_var is not None:
            move_running_statistics(running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        var, mean = running_var.clone(), running_mean.clone()
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return x * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, softmax(QKᵀ / √d) V."""
    if enable_gqa:
        key, value = (z.repeat_interleave(query.shape[-3] // z.shape[-3], -3) for z in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
    return functional.dropout(scores.softmax(-1), dropout_p) @ value
