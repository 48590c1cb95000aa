"""Tensors of any shape, type and layout, drawn by a few small numbers so that a counterexample can be read."""

import torch
from hypothesis import strategies as st

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
"""Of one input."""
sizes = st.integers(1, 5)
seeds = st.integers(0, 2**31)
layouts = st.sampled_from(("contiguous", "transposed", "strided", "offset"))
"""How a tensor lies in memory."""


def numbers(seed, *shape, dtype=torch.float64):
    """Normal numbers, another set for each seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x, layout):
    """The same numbers, laid out in another way."""
    if layout == "transposed":
        other = x.movedim(0, -1).contiguous().movedim(-1, 0)
    elif layout == "strided":
        other = torch.stack([x, x + 1], -1)[..., 0]
    elif layout == "offset":
        other = torch.cat([x[:1] + 1, x])[1:]
    else:
        other = x.contiguous()
    assert torch.equal(other, x)
    return other
