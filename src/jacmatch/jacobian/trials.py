"""One engine tried against differences: its product, and the gradient of a penalty on that product.

The second is what training uses, and where derivatives can be silently wrong while the first is right.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import differences
from jacmatch.jacobian.diagnosis import Finding
from jacmatch.jacobian.engines import Function, Products, parameter_gradients, replayed
from jacmatch.jacobian.modules import Module, preserved_buffers, twice_differentiable
from jacmatch.jacobian.readouts import Context, Logits

TOLERANCE = 0.02
"""Relative error above which an engine counts as wrong. Rounding in float32 stays below 10⁻³."""

_SEED = 0
Trial = Callable[[Function, Tensor], Products]


@dataclass(frozen=True)
class Reference:
    """Jv by differences, the module it was taken from, and how far it can be trusted."""

    module: Module
    x: Tensor
    tangents: Tensor
    products: Tensor
    rows: Tensor
    tolerance: float

    @staticmethod
    def of(module: Module, x: Tensor, generator: torch.Generator) -> "Reference":
        """The reference for this module at x, in float64 where it can be had."""
        exact, z = _in_float64(module, x)
        tangents = torch.randn((1, *x.shape), generator=generator).to(z)
        function = Function(exact, Logits(), Context(), (), "batch")
        with torch.no_grad(), twice_differentiable(exact, statistics=True):
            scale = float(z.square().mean().sqrt()) or 1.0
            torch.manual_seed(_SEED)
            products, error = differences.with_error(replayed(function, z), z, tangents * scale)
        rows = torch.randn(products.shape, generator=generator).to(z)
        tolerance = min(0.5, max(TOLERANCE if z.dtype == torch.float64 else 0.1, 3 * error))
        return Reference(exact, z, tangents * scale, products, rows, tolerance)

    @property
    def moves(self) -> bool:
        """Whether the outputs depend on the input at all."""
        return float(self.products.abs().max()) > 0

    def cotangents(self, z: Tensor) -> Tensor:
        """U of uᵀJv, in the type of z."""
        return self.rows.to(z.dtype)

    def along(self, name: str, products: Tensor) -> Tensor:
        """The number that engine and reference share: uᵀJv for the reverse engine, Jv for the others."""
        if name == "reverse":
            return (products.to(self.tangents.dtype) * self.tangents).sum()
        return products.to(self.tangents.dtype)

    def truth(self, name: str) -> Tensor:
        """What `along` should return."""
        return (self.products * self.rows).sum() if name == "reverse" else self.products


def _in_float64(module: Module, x: Tensor) -> tuple[Module, Tensor]:
    if x.dtype == torch.float64:
        return module, x
    try:
        exact = copy.deepcopy(module).double() if isinstance(module, nn.Module) else module
        with torch.no_grad():
            values = replayed(Function(exact, Logits(), Context(), (), "batch"), x)(x.double())
        if values.dtype == torch.float64:
            return exact, x.double()
    except (RuntimeError, TypeError, NotImplementedError):
        pass  # the module has float32 built in, or cannot be copied
    return module, x


def judge(
    name: str,
    trial: Trial,
    module: Module,
    x: Tensor,
    reference: Reference,
) -> tuple[str, Finding | None]:
    """`right`, or what is wrong with one engine: first its product, then the gradient of a penalty on it."""
    function = Function(module, Logits(), Context(), (), "batch")
    try:
        with preserved_buffers(module):
            products = _reseeded(trial)(function, x).products
            if not torch.isfinite(products).all():
                what = f"Engine '{name}' returns NaN or Inf although the outputs are finite."
                return "NaN", Finding("nan-derivative", "fault", what, "Look for sqrt, norm or division at zero.")
            error = _relative(reference.along(name, products), reference.truth(name))
            if error > reference.tolerance and reference.moves:
                return _wrong(name, products, error)
            return _judge_gradient(name, _reseeded(trial), module, x, reference)
    except UnsupportedError as failure:
        return _refused(name, failure, reference)
    except RuntimeError as failure:
        reason = str(failure).strip().splitlines()[0][:200]
        if "once_differentiable" in reason or "not implemented" in reason:
            return _once(reason)
        return reason, Finding("engine-fails", "fault", f"Engine '{name}' fails: {reason}", "Use another engine.")


def _reseeded(trial: Trial) -> Trial:
    """The trial with the random numbers that the reference saw, so that dropout has one mask everywhere."""

    def seeded(function: Function, x: Tensor) -> Products:
        torch.manual_seed(_SEED)
        return trial(function, x)

    return seeded


def _relative(got: Tensor, truth: Tensor) -> float:
    return float((got - truth).detach().norm() / truth.detach().norm().clamp(min=1e-30))


def _once(reason: str) -> tuple[str, Finding]:
    what = f"A derivative in the module can be taken only once: {reason}."
    way_out = "Write its backward in torch operations, without once_differentiable; or engine='differences'."
    return "once only", Finding("once-differentiable", "fault", what, way_out)


def _has_error_node(loss: Tensor) -> bool:
    """Whether a backward marked `once_differentiable` is in the graph: autograd steps over it without a word."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if "Error" in node.name():
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _wrong(name: str, products: Tensor, error: float) -> tuple[str, Finding]:
    if not products.any():
        what = f"Engine '{name}' returns zero although the outputs move: an operation has no {name}-mode rule."
        return "silently zero", Finding(f"{name}-zero", "fault", what, "Use an engine that is right; see above.")
    if name == "differences":
        what = (
            f"Differences in {products.dtype} are off by {error:.0%}: the module is too curved or too noisy for them."
        )
        return f"off by {error:.0%}", Finding("differences-inaccurate", "note", what, "Use an engine that is right.")
    what = (
        f"Engine '{name}' is off by {error:.0%}: a part of the derivative is missing (detach, .data, numpy, no_grad)."
    )
    return f"wrong by {error:.0%}", Finding(
        "partly-detached", "fault", what, "Remove what cuts the graph, or engine='differences'."
    )


def _refused(name: str, failure: UnsupportedError, reference: Reference) -> tuple[str, Finding | None]:
    reason = str(failure)
    if "detaches" in reason:
        if not reference.moves:
            return "no derivative", None
        what = "The outputs move with the input, but are cut off from it: something detaches them."
        way_out = "Remove .detach(), .data, numpy or no_grad from the module, or engine='differences'."
        return "detached", Finding("detached", "fault", what, way_out)
    severity: Literal["fault", "note"] = "fault" if name == "reverse" else "note"
    return reason[:160], Finding(f"{name}-unsupported", severity, reason[:300], "Use an engine that is right.")


def _judge_gradient(
    name: str, trial: Trial, module: Module, x: Tensor, reference: Reference
) -> tuple[str, Finding | None]:
    """Compares ∂/∂θ ‖product‖² in one random direction of θ with differences of ‖product‖² itself."""
    if not (isinstance(module, nn.Module) and isinstance(reference.module, nn.Module) and reference.moves):
        return "right", None
    trained = [p for p in module.parameters() if p.requires_grad]
    exact = [q for p, q in zip(module.parameters(), reference.module.parameters(), strict=True) if p.requires_grad]
    if not trained:
        return "right", None
    penalty = trial(Function(module, Logits(), Context(), (), "batch"), x).products.square().sum()
    gradients = parameter_gradients(penalty, trained)
    generator = torch.Generator().manual_seed(1)
    moves = [torch.randn(q.shape, generator=generator).to(q) * (q.square().mean().sqrt() + 1e-3) for q in exact]
    if all(g is None for g in gradients) or _has_error_node(penalty):
        return _once("its derivative does not depend on the parameters any more")
    slope = sum(float((g.to(m) * m).sum().detach()) for g, m in zip(gradients, moves, strict=True) if g is not None)

    def at(step: float) -> float:
        with torch.no_grad():
            for q, m in zip(exact, moves, strict=True):
                q.add_(m, alpha=step)
            try:
                function = Function(reference.module, Logits(), Context(), (), "batch")
                return float(trial(function, reference.x).products.square().sum())
            finally:
                for q, m in zip(exact, moves, strict=True):
                    q.sub_(m, alpha=step)

    saved = [q.detach().clone() for q in exact]
    h = float(torch.finfo(reference.x.dtype).eps) ** (1 / 3) * 4
    truth = (at(h) - at(-h)) / (2 * h)
    with torch.no_grad():
        for q, before in zip(exact, saved, strict=True):
            q.copy_(before)
    error = abs(slope - truth) / max(abs(truth), 1e-6 * float(penalty.detach()), 1e-30)
    tolerance = 0.5 if name == "differences" and reference.x.dtype != torch.float64 else 5 * reference.tolerance
    if error > tolerance:
        what = f"The parameter gradient of a penalty by engine '{name}' is off by {error:.0%}."
        return f"gradient wrong by {error:.0%}", Finding(
            "wrong-gradient", "fault", what, "Report the module; use an engine that is right."
        )
    return "right", None
