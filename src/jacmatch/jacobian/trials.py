"""One engine tried: its product, and the gradient of a penalty on that product.

The second is what training uses, and where derivatives can be silently wrong while the first is right. Both are
compared with differences of values, on a copy of the module in float64 where one can be had. Only float64 allows steps
that are so small that no ReLU of a large network switches within them: at a switch the penalty jumps, and a difference
across the jump is no derivative.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import verdicts
from jacmatch.jacobian.engines import Function, Products, parameter_gradients, replayed
from jacmatch.jacobian.modules import Module, preserved_buffers, twice_differentiable
from jacmatch.jacobian.readouts import Context, Logits
from jacmatch.jacobian.verdicts import Verdict

TOLERANCE = 0.02
"""Relative error above which an engine counts as wrong. Rounding in float32 mostly stays below 10⁻³."""

_ROUGH = 0.2
"""Uncertainty of a difference from which it is no reference."""

_SEED = 0
Trial = Callable[[Function, Tensor], Products]


@dataclass(frozen=True)
class Reference:
    """Jv by differences, the module it was taken from, and how far it can be trusted."""

    module: Module
    x: Tensor
    fine: bool
    """Whether the module computes in float64 all through."""
    tangents: Tensor
    values: Tensor
    products: Tensor
    rows: Tensor
    uncertainty: float
    moves: bool
    """Whether the outputs depend on the input, beyond rounding."""

    @staticmethod
    def of(module: Module, x: Tensor, generator: torch.Generator) -> "Reference":
        """The reference for this module at x, in float64 where it can be had."""
        scale = float(x.double().square().mean().sqrt()) or 1.0
        tangents = torch.randn((1, *x.shape), generator=generator).to(x.device, torch.float64) * scale
        exact, z = _in_float64(module, x)
        fine = _is_fine(exact, z, tangents)
        if not fine and z.dtype != x.dtype:
            exact, z = module, x
        tangents = tangents.to(z.dtype)
        with torch.no_grad(), twice_differentiable(exact, statistics=True):
            torch.manual_seed(_SEED)
            values_at = replayed(plain(exact), z)
            values = values_at(z).detach()
            products, error = _along(lambda t: values_at(z + t * tangents[0]), fine, z.dtype)
        rows = torch.randn((1, *values.shape), generator=generator).to(z)
        moves = float(products.detach().abs().max()) > torch.finfo(z.dtype).eps * float(values.abs().max())
        return Reference(exact, z, fine, tangents, values, products[None], rows, error, moves)

    def of_the_values_of(self, trial: Trial) -> "Reference":
        """The reference for an engine that draws other random numbers: differences of its own values."""
        with torch.no_grad(), preserved_buffers(self.module):
            function, v = plain(self.module), self.tangents[0]
            products, error = _along(lambda t: trial(function, self.x + t * v).values, self.fine, self.x.dtype)
        return replace(self, products=products[None], uncertainty=error)

    @property
    def tolerance(self) -> float:
        """The error above which an engine counts as wrong; infinite where the differences are too rough to tell."""
        return _tolerance(self.uncertainty, self.fine)

    def cotangents(self, z: Tensor) -> Tensor:
        """U of uᵀJv, in the type of z.

        They ask for a gradient, so that a backward marked `once_differentiable` leaves its mark in the graph even where
        nothing else that it was given does.
        """
        return self.rows.to(z.dtype, copy=True).requires_grad_()

    def error(self, name: str, products: Tensor) -> float:
        """How far the products are from the reference, relative to its size.

        What engine and reference share is uᵀJv for the reverse engine, Jv for the others. The parts of uᵀJv may cancel,
        so its error is measured against their size.
        """
        products = products.detach().to(self.tangents.dtype)
        if name != "reverse":
            return _relative(products, self.products)
        parts = self.products * self.rows
        return abs(float((products * self.tangents).sum() - parts.sum())) / _size(parts)


def plain(module: Module) -> Function:
    """The outputs of the module as a function."""
    return Function(module, Logits(), Context(), (), "batch")


def _in_float64(module: Module, x: Tensor) -> tuple[Module, Tensor]:
    """A copy of the module in float64 and x alike; themselves where that cannot be had."""
    if x.dtype == torch.float64:
        return module, x
    try:
        exact = copy.deepcopy(module).double() if isinstance(module, nn.Module) else module
        with torch.no_grad():
            values = replayed(plain(exact), x)(x.double())
        if values.dtype == torch.float64:
            return exact, x.double()
    except (RuntimeError, TypeError, NotImplementedError):
        pass  # the module has float32 built in, or cannot be copied
    return module, x


def _is_fine(module: Module, x: Tensor, tangents: Tensor) -> bool:
    """Whether values follow moves that are lost in float32, as a cast in the middle of a module would make it."""
    if x.dtype != torch.float64:
        return False
    with torch.no_grad():
        values_at = replayed(plain(module), x)
        here = values_at(x)
        moved = values_at(x + 1e-2 * tangents[0]) != here
        for h, rounding in ((1e-11, 0.1), (1e-9, 0.02)):
            once, twice = (values_at(x + t * tangents[0]) - here for t in (h, 2 * h))
            even = (twice != 0) & ((twice - 2 * once).abs() <= rounding * twice.abs())
            if int((even & moved).sum()) * 2 >= int(moved.sum()):
                return True
    return False


def _along(values_at: Callable[[float], Tensor], fine: bool, dtype: torch.dtype) -> tuple[Tensor, float]:
    """d/dt of the values at t = 0, and its relative error.

    Two steps are compared, first the smallest, where no kink lies between, then larger ones if rounding spoils those.
    """
    best, error = torch.zeros(()), math.inf
    coarse = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** (1 / 3)
    for h in (1e-9, 1e-7, 1e-5) if fine else (coarse, 4 * coarse):
        near = (values_at(h) - values_at(-h)) / (2 * h)
        far = (values_at(2 * h) - values_at(-2 * h)) / (4 * h)
        change = _relative(near, far) if near.any() else 1.0
        if change < error:
            best, error = (4 * near - far) / 3, change
        if error < TOLERANCE / 10:
            break
    return best, error


def _tolerance(error: float, fine: bool) -> float:
    return max(TOLERANCE if fine else 5 * TOLERANCE, 3 * error) if error < _ROUGH else math.inf


def _relative(got: Tensor, truth: Tensor) -> float:
    return float((got - truth).norm() / truth.norm().clamp(min=1e-30))


def _size(parts: Tensor) -> float:
    """The size of a sum: its own, or what it would be without cancellation."""
    return max(float(parts.sum().abs()), float(parts.norm()), 1e-30)


def judge(name: str, trial: Trial, module: Module, x: Tensor, reference: Reference) -> Verdict:
    """`right`, or what is wrong with one engine: first its product, then the gradient of a penalty on it."""
    seeded = _reseeded(trial)
    try:
        with preserved_buffers(module):
            own = seeded(plain(module), x)
            if not torch.isfinite(own.products).all():
                return verdicts.not_finite(f"Engine '{name}' returns NaN or Inf although the outputs are finite.")
            exact = own if reference.x.dtype == x.dtype else seeded(plain(reference.module), reference.x)
            if reference.moves and not torch.allclose(exact.values, reference.values, rtol=1e-3, atol=1e-6):
                reference = reference.of_the_values_of(seeded)
            verdict = _judge_product(name, own, exact, reference)
            if verdict[0] != "right" or not reference.moves:
                return verdict
            state, findings = _judge_gradient(name, seeded, own, exact, module, reference)
            return state, [*verdict[1], *findings]
    except UnsupportedError as failure:
        return verdicts.refused(name, failure, moves=reference.moves)
    except RuntimeError as failure:
        reason = str(failure).strip().splitlines()[0][:200]
        if "once_differentiable" in reason or "not implemented" in reason:
            return verdicts.once(reason.rstrip("."))
        return verdicts.fails(name, reason)


def _reseeded(trial: Trial) -> Trial:
    """The trial with the random numbers that the reference saw, so that dropout has one mask everywhere."""

    def seeded(function: Function, x: Tensor) -> Products:
        torch.manual_seed(_SEED)
        return trial(function, x)

    return seeded


def _judge_product(name: str, own: Products, exact: Products, reference: Reference) -> Verdict:
    # Dropout may have drawn another mask in the other type.
    comparable = torch.allclose(own.values.double(), exact.values.double(), rtol=1e-2, atol=1e-4)
    judged = own if name == "differences" and comparable else exact
    error = reference.error(name, judged.products)
    if reference.moves and (not error <= reference.tolerance or not judged.products.any()):
        return verdicts.wrong(name, judged.products, error)
    error = _relative(own.products.detach().double(), exact.products.detach().double())
    if judged is own or not reference.moves or not comparable or error <= reference.tolerance:
        return verdicts.RIGHT
    return verdicts.rounded(f"Engine '{name}'", own.products.dtype, error)


def _judge_gradient(
    name: str, trial: Trial, own: Products, exact: Products, module: Module, reference: Reference
) -> Verdict:
    """Compares ∂/∂θ ‖product‖² in one random direction of θ with differences of ‖product‖² itself."""
    if not (isinstance(module, nn.Module) and isinstance(reference.module, nn.Module)):
        return verdicts.RIGHT
    pairs = [(p, q) for p, q in zip(module.parameters(), reference.module.parameters(), strict=True) if p.requires_grad]
    if not pairs:
        return verdicts.RIGHT
    penalty, exact_penalty = own.products.square().sum(), exact.products.square().sum()
    if meets_once_differentiable(penalty):
        return verdicts.once("its backward is marked once_differentiable")
    mine = parameter_gradients(penalty, [p for p, _ in pairs])
    sharp = mine if own is exact else parameter_gradients(exact_penalty, [q for _, q in pairs])
    if all(g is None for g in sharp):
        return verdicts.without_parameters(name)
    if not all(bool(torch.isfinite(g).all()) for g in mine if g is not None):
        return verdicts.not_finite(f"The parameter gradient of a penalty by engine '{name}' is NaN or Inf.")
    generator = torch.Generator().manual_seed(1)
    moves = [torch.randn(q.shape, generator=generator).to(q) * _step(q) for _, q in pairs]
    truth, uncertainty = _penalty_slope(trial, [q for _, q in pairs], moves, reference)
    slope, size = _slope(sharp, moves)
    error = abs(slope - truth) / max(abs(truth), size)
    if not error <= max(reference.tolerance, _tolerance(uncertainty, reference.fine)):
        return verdicts.wrong_gradient(name, error)
    error = abs(_slope(mine, moves)[0] - slope) / size
    if own is exact or name == "differences" or error <= 5 * TOLERANCE:
        return verdicts.RIGHT
    return verdicts.rounded(f"The parameter gradient of a penalty by engine '{name}'", own.products.dtype, error)


def _step(parameter: Tensor) -> Tensor:
    return parameter.detach().square().mean().sqrt() + 1e-3


def _slope(gradients: list[Tensor | None], moves: list[Tensor]) -> tuple[float, float]:
    """The derivative along the move, and its size."""
    pairs = [(g.detach().to(m), m) for g, m in zip(gradients, moves, strict=True) if g is not None]
    parts = torch.cat([(g * m).flatten() for g, m in pairs])
    return float(parts.sum()), _size(parts)


def _penalty_slope(
    trial: Trial, parameters: list[nn.Parameter], moves: list[Tensor], reference: Reference
) -> tuple[float, float]:
    saved = [q.detach().clone() for q in parameters]

    def at(step: float) -> Tensor:
        for q, before, move in zip(parameters, saved, moves, strict=True):
            q.copy_(before + step * move)
        return trial(plain(reference.module), reference.x).products.square().sum()

    with torch.no_grad():
        try:
            slope, uncertainty = _along(at, reference.fine, reference.x.dtype)
        finally:
            for q, before in zip(parameters, saved, strict=True):
                q.copy_(before)
    return float(slope), uncertainty


def meets_once_differentiable(loss: Tensor) -> bool:
    """Whether a backward marked `once_differentiable` is in the graph: autograd steps over it without a word."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("autograd::Error"):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
