"""Scaled-dot-product attention with its tangents: one pass for both, and a backward pass of its own.

With S = s Q Kᵀ + mask, P = softmax(S) and D = Ṡ − ⟨P, Ṡ⟩ (a sum over the keys), the output is P V and its tangent
(P ∘ D) V + P V̇. PyTorch's fused kernels have no forward mode and no double backward; its math kernel stores about ten
matrices of the size of S in such a pass. Here queries are taken in blocks, so that memory is linear in their number.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from jacmatch.errors import InputError
from jacmatch.jacobian.rules.base import Pair, in_dual_pass, joined, parts_of

BLOCK = 256
"""Queries in a block. With one block, P and D are stored; with more, they are computed again in the backward pass."""

Tangents = Sequence[Tensor | None]


def attention_jvp(
    query: Float[Tensor, "... target width"],
    key: Float[Tensor, "... source width"],
    value: Float[Tensor, "... source depth"],
    tangents: Tangents,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Pair:
    """Return scaled-dot-product attention and its Jacobian-vector product, computed in one pass.

    The function is that of `torch.nn.functional.scaled_dot_product_attention`, softmax(s Q Kᵀ + mask) V. Both results
    are differentiable, twice and more, with respect to query, key, value and their tangents. Memory is linear in the
    number of queries; only derivatives of the backward pass need matrices of queries by keys.

    Args:
        query: Q.
        key: K.
        value: V.
        tangents: Q̇, K̇ and V̇, each of the shape of its tensor, or None where the tensor is constant. Several directions
            have one more dimension in front: (P, *query.shape), in all of them.
        attn_mask: Which keys a query sees (bool), or what is added to the scores (float). It is a constant.
        dropout_p: Probability of dropping an entry of P; one mask serves output and tangents.
        is_causal: Whether query i sees the keys 0 … i only.
        scale: s; None is 1/√width.
        enable_gqa: Whether key and value may have fewer heads (dimension −3), each for several heads of the query.

    Returns:
        The output (*batch, target, depth), and its tangent of the same shape, or (P, *batch, target, depth). A query
        that sees no key has the output 0.

    Raises:
        InputError: A shape does not fit, no tangent is given, or the mask requires a gradient.

    References:
        Dao et al. 2022, arXiv:2205.14135 (blocks of queries).

    Example:
        >>> q, k, v, q_t = torch.randn(4, 2, 3, 5, 8).unbind()
        >>> output, tangent = attention_jvp(q, k, v, (q_t, None, None), is_causal=True)
        >>> output.shape, tangent.shape
        (torch.Size([2, 3, 5, 8]), torch.Size([2, 3, 5, 8]))
    """
    tensors: tuple[Tensor, ...] = (query, key, value)
    several = _check(tensors, tangents, attn_mask, dropout_p, is_causal)
    if enable_gqa:
        tensors = (query, *_for_each_head(query, key, value))
        tangents = (tangents[0], *(None if z is None else _for_each_head(query, z)[0] for z in tangents[1:]))
    batch = torch.broadcast_shapes(*(z.shape[:-2] for z in tensors))  # type: ignore[no-untyped-call]
    q, k, v = (z.expand(*batch, *z.shape[-2:]) for z in tensors)
    moved = [None if z is None else (z if several else z[None]).expand(-1, *batch, *z.shape[-2:]) for z in tangents]
    kind = torch.promote_types(query.dtype, torch.float32)
    scores = _Scores(
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        attn_mask,
        is_causal,
        dropout_p,
        int(torch.randint(2**62, ())) if dropout_p else 0,
    )
    # each product of matrices would copy what is not contiguous
    wide = [None if z is None else z.to(kind).contiguous() for z in (q, k, v, *moved)]
    output, tangent = _Attention.apply(scores, *wide)  # type: ignore[no-untyped-call]
    return output.to(query.dtype), (tangent if several else tangent[0]).to(query.dtype)


def _for_each_head(query: Tensor, *shared: Tensor) -> list[Tensor]:
    """Keys and values of which one head serves several heads of the query, repeated."""
    return [z.repeat_interleave(query.shape[-3] // z.shape[-3], -3) for z in shared]


def _check(tensors: Sequence[Tensor], tangents: Tangents, mask: Tensor | None, dropout_p: float, causal: bool) -> bool:
    """Return whether the tangents are several directions; refuse what does not fit."""
    if len(tangents) != 3 or all(each is None for each in tangents):
        rule = "`tangents` of `attention_jvp` must be those of query, key and value, at most two of them None."
        raise InputError(rule, got=f"{len(tangents)}, {sum(z is None for z in tangents)} of them None")
    pairs = [(t.shape, t.dim() - z.dim(), z.shape) for z, t in zip(tensors, tangents, strict=True) if t is not None]
    leading = {tuple(shape[:more]) for shape, more, _ in pairs}
    fits = all(shape[more:] == wanted for shape, more, wanted in pairs)
    if not fits or len(leading) > 1 or max(map(len, leading)) > 1:
        rule = "Each of `tangents` of `attention_jvp` must have the shape of its tensor, or (P, *shape) in all of them."
        shapes = [None if t is None else tuple(t.shape) for t in tangents]
        raise InputError(rule, got=f"{shapes} for {[tuple(z.shape) for z in tensors]}")
    if mask is not None and (causal or mask.requires_grad):
        rule = "`attn_mask` of `attention_jvp` must be a constant, and not be given with `is_causal`."
        raise InputError(rule, do="Detach it, or differentiate the math kernel by torch.func.jvp.")
    if not 0 <= dropout_p < 1:
        raise InputError("`dropout_p` of `attention_jvp` must be in [0, 1).", got=dropout_p)
    return bool(leading.pop())


class _Scores:
    """How P and D are made of queries and keys: scale, mask and dropout."""

    def __init__(self, scale: float, mask: Tensor | None, causal: bool, dropout: float, seed: int) -> None:
        self.scale, self.mask, self.causal, self.dropout, self.seed = scale, mask, causal, dropout, seed

    def probabilities(self, q: Tensor, k: Tensor, first: int) -> Tensor:
        """P of a block of queries whose first has this index; 0 where a query sees no key."""
        scores = (q * self.scale) @ k.mT
        mask = self.mask
        if self.causal:
            row = torch.arange(first, first + q.shape[-2], device=q.device)
            mask = torch.arange(k.shape[-2], device=q.device) <= row[:, None]
        elif mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., first : first + q.shape[-2], :]
        if mask is None:
            return scores.softmax(-1)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        unseen = (scores == -math.inf).all(-1, keepdim=True)
        return scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)

    def moved(self, p: Tensor, q: Tensor, k: Tensor, q_t: Tensor | None, k_t: Tensor | None) -> Tensor | None:
        """D = Ṡ − ⟨P, Ṡ⟩ for each direction."""
        parts = [] if q_t is None else [(q_t * self.scale) @ k.mT]
        if k_t is not None:
            parts.append((q * self.scale) @ k_t.mT)
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return total - (p * total).sum(-1, keepdim=True)

    def dropped(self, p: Tensor, first: int) -> Callable[[Tensor], Tensor]:
        """The dropout of this block, the same each time."""
        if not self.dropout:
            return lambda z: z
        generator = torch.Generator(p.device).manual_seed(self.seed + first)
        keep = torch.rand(p.shape, device=p.device, generator=generator) >= self.dropout
        mask = keep.to(p.dtype) / (1 - self.dropout)
        return lambda z: z * mask


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, first + BLOCK) for first in range(0, max(count, 1), BLOCK))


class _Attention(torch.autograd.Function):
    """Output and tangents (P, *batch, target, depth); tangents of arguments are (P, *batch, …) or None."""

    @staticmethod
    def forward(ctx: Any, scores: _Scores, q: Tensor, k: Tensor, v: Tensor, *tangents: Tensor | None) -> Pair:
        q_t, k_t, v_t = tangents
        outputs, moved = [], []
        stored: tuple[Tensor | None, ...] = ()
        for block in _blocks(q.shape[-2]):
            rows, rows_t = q[..., block, :], None if q_t is None else q_t[..., block, :]
            p = scores.probabilities(rows, k, block.start)
            d = scores.moved(p, rows, k, rows_t, k_t)
            drop = scores.dropped(p, block.start)
            outputs.append(drop(p) @ v)
            parts = [] if d is None else [drop(p * d) @ v]
            if v_t is not None:
                parts.append(drop(p) @ v_t)
            moved.append(parts[0] if len(parts) == 1 else parts[0] + parts[1])
            stored = (p, d)
        ctx.scores, ctx.single = scores, len(outputs) == 1
        ctx.save_for_backward(q, k, v, *tangents, *(stored if ctx.single else ()))
        return _together(outputs), _together(moved)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_t: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, q_t, k_t, v_t, *stored = ctx.saved_tensors
        scores, g, g_t = ctx.scores, g.contiguous(), g_t.contiguous()
        totals: list[Tensor | None] = [None] * 4
        rows_of: tuple[list[Any], list[Any]] = ([], [])
        for block in _blocks(q.shape[-2]):
            rows, rows_t = q[..., block, :], None if q_t is None else q_t[..., block, :]
            if stored and not torch.is_grad_enabled():
                p, d = stored
            else:
                p = scores.probabilities(rows, k, block.start)
                d = scores.moved(p, rows, k, rows_t, k_t)
            by_rows, *by_keys = _gradients(
                scores, p, d, scores.dropped(p, block.start), (rows, k, v), (rows_t, k_t, v_t),
                (g[..., block, :], g_t[..., block, :]),
            )  # fmt: skip
            for each, part in zip(rows_of, by_rows, strict=True):
                each.append(part)
            totals = [_sum(total, part) for total, part in zip(totals, by_keys, strict=True)]
        by_q, by_q_t = (None if each[0] is None else _together(each) for each in rows_of)
        by_k, by_k_t, by_v, by_v_t = totals
        return None, by_q, by_k, by_v, by_q_t, by_k_t, by_v_t


def _gradients(
    scores: _Scores,
    p: Tensor,
    d: Tensor | None,
    drop: Callable[[Tensor], Tensor],
    arguments: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    gradients: Pair,
) -> tuple[Any, ...]:
    """Return the gradients of a block w.r.t. (q, q̇), k, k̇, v and v̇.

    With A = Ḡ Vᵀ and B = G Vᵀ + Σ Ḡ V̇ᵀ (Ḡ the gradients w.r.t. the tangents, sums over directions), the gradient w.r.t.
    Ṡ is E = P ∘ (A − ⟨P, A⟩), and with W = P ∘ B + Σ E ∘ D that w.r.t. S is W − P ⟨1, W⟩.
    """
    (q, k, v), (q_t, k_t, v_t), (g, g_t) = arguments, tangents, gradients
    by_p = g @ v.mT
    if v_t is not None:
        by_p = by_p + (g_t @ v_t.mT).sum(0)
    w, e, weights = p * drop(by_p), None, drop(p)
    by_v, by_v_t = weights.mT @ g, None if v_t is None else weights.mT @ g_t
    if d is not None:
        a = drop(g_t @ v.mT)
        e = p * (a - (p * a).sum(-1, keepdim=True))
        w = w + (e * d).sum(0)
        by_v = by_v + (drop(p * d).mT @ g_t).sum(0)
    by_s = (w - p * w.sum(-1, keepdim=True)) * scores.scale
    by_q, by_k = by_s @ k, by_s.mT @ q
    by_q_t = by_k_t = None
    if e is not None:
        e = e * scores.scale
        if q_t is not None:
            by_q_t, by_k = e @ k, by_k + (e.mT @ q_t).sum(0)
        if k_t is not None:
            by_k_t, by_q = e.mT @ q, by_q + (e @ k_t).sum(0)
    return (by_q, by_q_t), by_k, by_k_t, by_v, by_v_t


def _together(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total + part


def attention(
    traced: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: by `attention_jvp` in a dual pass, else by PyTorch.

    To be `traced`, it is composed of plain operations.
    """
    mask = attn_mask
    if traced:
        if enable_gqa:
            key, value = _for_each_head(query, key, value)
        scores = _Scores(1 / math.sqrt(query.shape[-1]) if scale is None else scale, mask, is_causal, 0.0, 0)
        return functional.dropout(scores.probabilities(query, key, 0), dropout_p) @ value
    constant = mask is None or not (mask.requires_grad or is_causal)
    if constant and not dropout_p and not torch.is_autocast_enabled(query.device.type) and in_dual_pass(mask):
        (q, q_t), (k, k_t), (v, v_t) = (parts_of(each) for each in (query, key, value))
        if not (q_t is None and k_t is None and v_t is None):
            rule = partial(attention_jvp, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
            return joined(rule, q, k, v, (q_t, k_t, v_t))
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
