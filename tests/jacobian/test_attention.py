"""`attention_jvp` against torch.func.jvp of the math kernel and against finite differences of its own results."""

from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacmatch.errors import InputError
from jacmatch.jacobian import attention_jvp
from jacmatch.jacobian.rules import attention as rules

DOUBLE = torch.float64


def tensors(*shapes, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype) for shape in shapes]


def reference(arguments, tangents, **settings):
    """By the math kernel, or the definition: with a query that sees no key, gradients of the math kernel are NaN."""
    mask = settings.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        function = partial(masked_attention, mask)
    else:
        function = partial(functional.scaled_dot_product_attention, **settings)
    tangents = [torch.zeros_like(z) if t is None else t for z, t in zip(arguments, tangents, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, tuple(arguments), tuple(tangents))


def masked_attention(mask, q, k, v):
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * mask
    total = weights.sum(-1, keepdim=True)
    return weights / (total + (total == 0)) @ v


FULLY_MASKED = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
CASES = {
    "plain": ((2, 3, 3, 5), (2, 3, 4, 5), (2, 3, 4, 2), {}),
    "without heads": ((3, 5), (4, 5), (4, 2), {}),
    "scale": ((2, 3, 5), (2, 4, 5), (2, 4, 2), {"scale": 0.3}),
    "causal": ((2, 4, 5), (2, 4, 5), (2, 4, 5), {"is_causal": True}),
    "causal, more keys": ((2, 3, 5), (2, 4, 5), (2, 4, 5), {"is_causal": True}),
    "a query that sees no key": ((2, 3, 5), (2, 4, 5), (2, 4, 2), {"attn_mask": FULLY_MASKED}),
    "mask of one row": ((2, 3, 5), (2, 4, 5), (2, 4, 2), {"attn_mask": FULLY_MASKED[:1]}),
    "float mask": ((2, 3, 5), (2, 4, 5), (2, 4, 2), {"attn_mask": tensors((2, 3, 4))[0]}),
    "one token": ((2, 3, 1, 5), (2, 3, 1, 5), (2, 3, 1, 5), {}),
    "one query": ((2, 1, 5), (2, 4, 5), (2, 4, 5), {}),
    "empty batch": ((0, 3, 4, 5), (0, 3, 4, 5), (0, 3, 4, 5), {}),
    "grouped heads": ((2, 4, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5), {"enable_gqa": True}),
}
MOVING = [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (True, False, True)]


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("case", CASES)
def test_values_tangents_and_gradients_are_those_of_the_math_kernel(case, moving, block, monkeypatch):
    monkeypatch.setattr(rules, "BLOCK", block)
    *shapes, settings = CASES[case]
    leaves = [z.requires_grad_() for z in tensors(*shapes, *shapes)]
    tangents = [z if moves else None for z, moves in zip(leaves[3:], moving, strict=True)]
    results = []
    for function in (partial(attention_jvp, *leaves[:3], tangents), partial(reference, leaves[:3], tangents)):
        output, tangent = function(**settings)
        weights = tensors(output.shape, tangent.shape, seed=1)
        loss = (output * weights[0]).sum() + (tangent * weights[1]).sum()
        results.append([output, tangent, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            *torch.broadcast_tensors(*(zero.to(DOUBLE) if z is None else z for z in (ours, theirs)))
        )


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"attn_mask": FULLY_MASKED[:, :3]}])
def test_gradcheck_and_gradgradcheck(settings, block, monkeypatch):
    monkeypatch.setattr(rules, "BLOCK", block)
    leaves = [z.requires_grad_() for z in tensors(*[(1, 3, 2)] * 6)]

    def function(q, k, v, *tangents):
        return attention_jvp(q, k, v, tangents, **settings)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4)


@pytest.mark.parametrize("block", [2, 256])
def test_several_directions_are_single_ones_stacked(block, monkeypatch):
    monkeypatch.setattr(rules, "BLOCK", block)
    q, k, v = (z.requires_grad_() for z in tensors((2, 3, 5), (2, 4, 5), (2, 4, 2)))
    several = tensors((3, 2, 3, 5), (3, 2, 4, 5), (3, 2, 4, 2), seed=1)
    output, tangents = attention_jvp(q, k, v, several)
    single = [attention_jvp(q, k, v, [z[number] for z in several]) for number in range(3)]
    torch.testing.assert_close(tangents, torch.stack([tangent for _, tangent in single]))
    torch.testing.assert_close(output, single[0][0])
    losses = tangents.square().sum(), sum(tangent.square().sum() for _, tangent in single)
    gradients = [torch.autograd.grad(loss, (q, k, v)) for loss in losses]
    torch.testing.assert_close(*gradients)


def test_layouts_and_types():
    q, k, v, *tangents = (z.transpose(-2, -1) for z in tensors(*[(2, 5, 3)] * 6))
    for result, expected in zip(attention_jvp(q, k, v, tangents), reference((q, k, v), tangents), strict=True):
        torch.testing.assert_close(result, expected)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            given = [z.to(dtype) for z in (q, k, v, *tangents)]
            exact = reference([z.double() for z in given[:3]], [z.double() for z in given[3:]])
            for low, high in zip(attention_jvp(*given[:3], given[3:]), exact, strict=True):
                assert low.dtype == dtype
                torch.testing.assert_close(low.double(), high, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("block", [2, 256])
def test_dropout_has_one_mask_for_value_tangent_and_gradient(block, monkeypatch):
    """With V = I the output is P itself, dropped: the mask is seen, and the tangent must be zero where it is."""
    monkeypatch.setattr(rules, "BLOCK", block)
    q, k, q_t = tensors((4, 3), (5, 3), (4, 3))
    q.requires_grad_()
    torch.manual_seed(0)
    output, tangent = attention_jvp(q, k, torch.eye(5, dtype=DOUBLE), (q_t, None, None), dropout_p=0.4)
    dropped = output == 0
    assert 0 < dropped.sum() < 20
    p, p_t = reference((q, k, torch.eye(5, dtype=DOUBLE)), (q_t, None, None))
    torch.testing.assert_close(output, (p / 0.6).masked_fill(dropped, 0))
    torch.testing.assert_close(tangent, (p_t / 0.6).masked_fill(dropped, 0))
    ours = torch.autograd.grad(output.square().sum() + tangent.square().sum(), q)
    losses = [(z / 0.6).masked_fill(dropped, 0).square().sum() for z in (p, p_t)]
    torch.testing.assert_close(ours, torch.autograd.grad(losses[0] + losses[1], q))


@pytest.mark.parametrize(
    ("tangents", "settings", "message"),
    [
        ((None, None, None), {}, r"at most two of them None\. Got 3, 3 of them None"),
        ((torch.ones(3, 4), None), {}, r"must be those of query, key and value"),
        ((torch.ones(3, 5), None, None), {}, r"must have the shape of its tensor.* Got \[\(3, 5\), None, None\]"),
        ((torch.ones(2, 3, 4), torch.ones(3, 4), None), {}, r"or \(P, \*shape\) in all of them"),
        ((torch.ones(3, 4), None, None), {"attn_mask": torch.ones(3, 3).requires_grad_()}, r"must be a constant"),
        ((torch.ones(3, 4), None, None), {"attn_mask": torch.ones(3, 3), "is_causal": True}, r"not be given with"),
        ((torch.ones(3, 4), None, None), {"dropout_p": 1.0}, r"`dropout_p` .* must be in \[0, 1\)\. Got 1\.0"),
    ],
)
def test_what_does_not_fit_is_refused(tangents, settings, message):
    with pytest.raises(InputError, match=message):
        attention_jvp(*torch.ones(3, 3, 4), tangents, **settings)
