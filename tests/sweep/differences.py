"""What the sweep compares with: central differences of fourth order in float64, by two steps that must agree.

With random directions w on the input side, u on the output side and p in the space of the parameters, the derivatives
are checked by the numbers

    ∂ₜ f(x + t w),        uᵀ∂ₜ f(x + t w),        ∂ₑ ∂ₜ uᵀf(x + t w; θ + e p),

at 0: the product J w itself, uᵀJ against w, and the parameter gradient of uᵀJ w against p, which every parameter
gradient of a loss on products is made of. A derivative that is wrong anywhere agrees with probability 0.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configurations import couples

STEPS = (2e-3, 1e-4, 5e-6)
"""Tried in turn, each with its half, until a pair agrees."""
AGREE = 1e-6
ROUGH = 1e-3
"""Relative difference of the two steps from which there is no reference."""


@dataclass(frozen=True)
class Estimate:
    """A derivative by differences, and how far the two steps are apart, relative to its size."""

    value: Tensor
    uncertainty: float

    @property
    def known(self) -> bool:
        return self.uncertainty < ROUGH


@dataclass(frozen=True)
class Reference:
    """All that a configuration is compared with."""

    outputs: Tensor
    w: Tensor
    u: Tensor
    directions: list[Tensor]
    product: Estimate
    """J w, (B, K)."""
    own: Estimate
    """The same with the other samples held, sample by sample: what a Jacobian of each sample gives."""
    gradient: Estimate
    """The parameter gradient of uᵀJ w along the directions; of `own` it is `own_gradient`."""
    own_gradient: Estimate
    coupled: bool
    random: bool


class NoReferenceError(Exception):
    """There is nothing to compare with; the message says why."""


def reference(network: nn.Module, x: Tensor) -> Reference:
    """The reference at x.

    Raises:
        NoReferenceError: the outputs are not finite, not floating, empty, or have 16 bits.
    """
    parameters = [each for each in network.parameters() if each.requires_grad]
    generator = torch.Generator().manual_seed(1)
    value = _Values(network, parameters)
    with torch.no_grad():
        outputs = value(x)
        if not torch.isfinite(outputs).all() or not outputs.numel():
            raise NoReferenceError("outputs not finite" if outputs.numel() else "no outputs")
        if outputs.dtype.itemsize == 2:  # their differences are those of rounding; the derivative of a cast is 1
            raise NoReferenceError("outputs of 16 bits")
        torch.manual_seed(1)
        with value.restored():
            random = not torch.equal(network(x.clone()), outputs)
        size = float(x.square().mean().sqrt()) or 1.0
        w = torch.randn(x.shape, generator=generator, dtype=x.dtype) * size
        u = torch.randn(outputs.shape, generator=generator, dtype=x.dtype)
        sizes = [float(each.detach().square().mean().sqrt()) + 0.1 for each in parameters]
        draws = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in parameters]
        p = [size * draw for size, draw in zip(sizes, draws, strict=True)]
        value.directions = p
        coupled = couples(network, x)
        scale = float(outputs.abs().max())

        def along(t: float, e: float = 0.0) -> Tensor:
            return value(x + t * w, e)

        def each(t: float, e: float = 0.0) -> Tensor:
            rows = []
            for number in range(len(x)):
                moved = x.clone()
                moved[number] += t * w[number]
                rows.append(value(moved, e)[number])
            return torch.stack(rows)

        product, gradient = _derivative(along, scale), _mixed(along, u, scale)
        own = _derivative(each, scale) if coupled else product
        own_gradient = _mixed(each, u, scale) if coupled else gradient
    return Reference(outputs, w, u, p, product, own, gradient, own_gradient, coupled, random)


class _Values:
    """The outputs with one seed, at parameters moved by e p; buffers and parameters are left as they were."""

    def __init__(self, network: nn.Module, parameters: list[nn.Parameter]) -> None:
        self._network, self._parameters, self.directions = network, parameters, list[Tensor]()

    def __call__(self, x: Tensor, e: float = 0.0) -> Tensor:
        with self.restored():
            for parameter, p in zip(self._parameters, self.directions, strict=False):
                parameter.add_(e * p)
            torch.manual_seed(0)
            return self._network(x.clone()).clone()

    @contextmanager
    def restored(self) -> Iterator[None]:
        tensors = [*self._network.parameters(), *self._network.buffers()]
        before = [each.clone() for each in tensors]
        try:
            yield
        finally:
            for each, saved in zip(tensors, before, strict=True):
                each.copy_(saved)


def _fourth(values_at: Callable[[float], Tensor], h: float) -> Tensor:
    return (8 * (values_at(h) - values_at(-h)) - (values_at(2 * h) - values_at(-2 * h))) / (12 * h)


def _derivative(along: Callable[[float], Tensor], scale: float) -> Estimate:
    return _best(lambda h: _fourth(along, h), lambda h: 1e-13 * scale / h)


def _mixed(along: Callable[[float, float], Tensor], u: Tensor, scale: float) -> Estimate:
    def at(h: float) -> Tensor:
        return _fourth(lambda e: (u * _fourth(lambda t: along(t, e), h)).sum(), h)

    return _best(at, lambda h: 1e-13 * scale * float(u.norm()) / h**2, STEPS[:2])


def _best(
    at: Callable[[float], Tensor], rounding: Callable[[float], float], steps: tuple[float, ...] = STEPS
) -> Estimate:
    """The estimate of the pair of steps that agrees best; what is below rounding is zero."""
    best = Estimate(torch.zeros(()), float("inf"))
    for h in steps:
        wide, near = at(h), at(h / 2)
        size = max(float(near.norm()), rounding(h) / AGREE)
        apart, magnitude = float((wide - near).norm()) / size, float(near.norm())
        if magnitude > 1e-3 * rounding(h):  # not zero, and perhaps not far enough above rounding to be known
            apart = max(apart, rounding(h) / magnitude)
        if not apart >= best.uncertainty and torch.isfinite(near).all():
            best = Estimate(near, apart)
        if best.uncertainty < AGREE:
            break
    return best
