"""The check of one engine: its product, and the gradient of a penalty on that product.

Training uses the gradient, which can be silently wrong even if the product is right. A penalty on derivatives jumps
where the input of a ReLU changes its sign, so its finite differences need the small steps that only a float64 reference
allows.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import findings
from jacmatch.jacobian.callables import (
    modules_of,
    preserved_attributes,
    preserved_buffers,
    preserved_state,
    seed_generators,
    tensors_of,
)
from jacmatch.jacobian.engines import graph_leaves, meets_once_differentiable, parameter_gradients, reverse_vjp
from jacmatch.jacobian.findings import Verdict
from jacmatch.jacobian.finite_differences import (
    SEED,
    SMALLEST_STEP,
    STRICT,
    TOLERANCE,
    EngineRun,
    Reference,
    derivative_along,
    relative_difference,
    replayed_values,
    size_of_sum,
    tolerance_for,
)
from jacmatch.jacobian.function import Function, Products, replayed

Value = TypeVar("Value")
MANY_PARAMETERS = 2_000_000
"""Number of parameters above which engines are compared on fewer samples and directions."""

_STEPS, _STEPS_OF_DIFFERENCES = (1e-9, 1e-8, 1e-7), (1e-6, 1e-5, 1e-4)
"""Steps of the parameters, in float64; products by differences are rounded to 10⁻¹⁰, which shorter steps would show."""

_STILL = 1e-6
"""Size of a product, relative to the values, above which it is not a rounded zero."""

_CERTAIN_IN_OWN_TYPE = 0.1
"""Error above which an engine is certainly wrong without a float64 copy, if the uncertainty is a tenth of it."""


def is_small(*modules: nn.Module) -> bool:
    """Return whether there are few enough parameters for checks to use more samples and directions."""
    return sum(p.numel() for module in modules for p in module.parameters()) <= MANY_PARAMETERS


def not_finite_at(name: str, engine: EngineRun, function: Function, x: Tensor) -> Verdict | None:
    """Return a verdict if an engine returns NaN or infinity at finite values (mostly at zeros), else None."""
    module = function.module
    try:
        with preserved_buffers(module):
            products = _reseeded(engine)(function, x).products
            if not torch.isfinite(products).all():
                return findings.not_finite(f"Engine '{name}' returns NaN or Inf although the outputs are finite.")
            parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            gradients = parameter_gradients(products.square().sum(), trained) if trained else []
    except (RuntimeError, UnsupportedError):
        return None  # `judge` reports it
    if _all_finite(gradients):
        return None
    return findings.not_finite(f"The parameter gradient of a penalty by engine '{name}' is NaN or Inf.")


def judge(
    name: str,
    engine: EngineRun,
    function: Function,
    x: Tensor,
    reference: Reference,
    *,
    of_rows: bool = False,
    rounding: bool = True,
) -> Verdict:
    """Return whether an engine is right: first its product, then, with gradients enabled, the gradient of a penalty.

    `of_rows` says that the products are vᵀJ; `rounding` compares the module's own type too.
    """
    seeded = _reseeded(engine)
    try:
        with preserved_state(reference.function.module), preserved_buffers(function.module), ExitStack() as stack:
            z = reference.x.detach().requires_grad_(torch.is_grad_enabled())
            # differences of numbers in 16 bits are far from those in 64
            apart = name == "differences" if reference.function.widened else rounding and reference.x.dtype != x.dtype
            own = seeded(function, x) if apart else None
            stack.enter_context(reference.function.precision())
            exact = seeded(reference.function, z)
            own = exact if own is None else own
            if (changed := _other_outputs(reference)) is not None:
                return changed
            if reference.moves and not torch.allclose(exact.values, reference.values, rtol=1e-3, atol=1e-6):
                if reference.single:
                    return findings.UNKNOWN
                reference = reference.for_values_of(seeded)
            verdict = _judge_product(name, own, exact, reference, of_rows)
            if not verdict.is_right or not torch.is_grad_enabled():
                return verdict
            if not reference.moves:
                return _judge_gradient_of_zero(name, seeded, exact, reference, z) or verdict
            if verdict.state != "right":
                return verdict
            try:
                second = _judge_gradient(name, seeded, own, exact, function, reference, z)
            except (RuntimeError, UnsupportedError):
                if (reason := _why_untrainable(reference)) is None:
                    raise
                return findings.untrainable(reason)
            return replace(second, findings=(*verdict.findings, *second.findings))
    except UnsupportedError as failure:
        return findings.refused(name, failure, moves=reference.moves)
    except (RuntimeError, NotImplementedError, AssertionError) as failure:
        reason = findings.first_line(failure)
        if "once_differentiable" in reason or "not implemented" in reason:
            return findings.once(reason.rstrip("."))
        return findings.fails(name, reason)


def _why_untrainable(reference: Reference) -> str | None:
    """Return the error that ordinary training raises because of an in-place operation; None if it raises none."""
    x = reference.x.detach()
    try:
        values = reference.function(x.clone())[0]
        parameter_gradients(values.sum(), _trained(reference.function, values, x))
    except RuntimeError as failure:
        reason = findings.first_line(failure)
        return reason if "inplace" in reason else None
    return None


def _reseeded(engine: EngineRun) -> EngineRun:
    """Return the engine with the random numbers and buffers of the reference, so that dropout uses the same mask."""

    def seeded(function: Function, x: Tensor) -> Products:
        seed_generators(SEED, x.device)
        with preserved_state(function.module):
            return engine(function, x)

    return seeded


def _other_outputs(reference: Reference) -> Verdict | None:
    """Return a verdict if a pass with derivatives changes the values of an ordinary call, apart from random numbers."""

    def ordinary(seed: int) -> Tensor:
        seed_generators(seed, reference.x.device)
        # without gradients, an encoder in evaluation mode skips what is padded
        with torch.enable_grad(), preserved_attributes(reference.function.module):
            return replayed(reference.function, reference.x)(reference.x.detach().requires_grad_()).detach()

    error = relative_difference(reference.values, values := ordinary(SEED))
    if not error > (1e-6 if reference.fine else 0.05) or float(values.norm()) == 0:
        return None
    if relative_difference(ordinary(SEED + 1), values) > 1e-9 or relative_difference(ordinary(SEED), values) > 1e-9:
        return None  # a fused operator draws different masks, or no two calls are equal
    return findings.other_outputs(error)


def _judge_product(name: str, own: Products, exact: Products, reference: Reference, of_rows: bool) -> Verdict:
    # Dropout may have drawn a different mask in the other type.
    comparable = torch.allclose(own.values.double(), exact.values.double(), rtol=1e-2, atol=1e-4)
    comparable |= reference.function.widened
    judged = own if name == "differences" and comparable else exact
    if not torch.isfinite(judged.products).all():
        return findings.not_finite(f"Engine '{name}' returns NaN or Inf although the outputs are finite.")
    if not reference.moves and reference.fine and float(judged.products.detach().abs().max()) > _STILL * _scale(own):
        steps = "Differences with smaller steps are zero"
        return findings.wrong_differences(steps, 1.0) if name == "differences" else findings.not_zero(name)
    error = reference.error(judged.products, of_rows=of_rows)
    if reference.single and not error <= reference.tolerance:
        return findings.UNKNOWN
    if name == "differences" and reference.moves and math.isinf(reference.tolerance) and reference.repeats:
        what = f"Differences with two steps disagree by {reference.uncertainty:.0%}"
        return findings.wrong_differences(what, reference.uncertainty)
    tolerance = max(reference.tolerance, TOLERANCE) if name == "differences" else reference.tolerance
    if reference.moves and (not error <= tolerance or not judged.products.any()):
        return findings.wrong(name, judged.products, error, certain=_is_certain(reference, error))
    if judged is own or not reference.moves or not comparable:
        return _right(reference)
    error = relative_difference(own.products.detach().double(), exact.products.detach().double())
    if error <= TOLERANCE:
        return _right(reference)
    return findings.rounded(f"Engine '{name}'", own.products.dtype, error)


def _scale(products: Products) -> float:
    return float(products.values.detach().abs().max()) + 1e-12


def _right(reference: Reference) -> Verdict:
    return findings.RIGHT if reference.moves and reference.tolerance < 1 else findings.UNKNOWN


def _is_certain(reference: Reference, error: float) -> bool:
    """Return whether a far larger step gives the same difference; not so if the function computes in float32."""
    if not reference.fine:
        return error > max(_CERTAIN_IN_OWN_TYPE, 10 * reference.uncertainty)
    with torch.no_grad():
        seed_generators(SEED, reference.x.device)
        values_at, v, h = replayed_values(reference.function, reference.x), reference.tangents[0], 1e-5
        far = (values_at(reference.x + h * v) - values_at(reference.x - h * v)) / (2 * h)
    return relative_difference(far, reference.products[0]) < error / 3


def _judge_gradient(
    name: str, engine: EngineRun, own: Products, exact: Products, function: Function, reference: Reference, x: Tensor
) -> Verdict:
    """Compare ∂/∂θ ‖product‖² in random directions of θ with differences of ‖product‖² itself."""
    parameters = _trained(reference.function, exact.values, x)
    if not parameters:
        return _right(reference)
    penalty = exact.products.square().sum()
    if meets_once_differentiable(penalty):
        return findings.once("its backward is marked once_differentiable")
    gradients = parameter_gradients(penalty, parameters)
    if not _all_finite(gradients):
        return findings.not_finite(f"The parameter gradient of a penalty by engine '{name}' is NaN or Inf.")
    if reference.single and name == "differences":
        return findings.UNKNOWN
    steps = _STEPS_OF_DIFFERENCES if name == "differences" else _STEPS
    generator, state = torch.Generator().manual_seed(1), _right(reference)
    least = (1e-6 if reference.fine else 1e-2) * float(penalty.detach())
    # a missing part may happen to be small along one direction; for a large network two take too long
    several = not reference.single and sum(q.numel() for q in parameters) <= MANY_PARAMETERS
    for _ in range(1 + several):
        moves = random_moves(parameters, generator)
        expected, size = _derivative(gradients, moves)
        penalty_at = along(moves, parameters, lambda: engine(reference.function, reference.x).products.square().sum())
        if reference.single:
            with torch.no_grad():
                truth = (penalty_at(SMALLEST_STEP) - penalty.detach()) / SMALLEST_STEP
            if not abs(expected - float(truth)) <= STRICT * max(abs(float(truth)), size, least):
                return findings.UNKNOWN
            continue
        with torch.no_grad():
            truth, uncertainty = derivative_along(penalty_at, reference.fine, reference.x.dtype, expected, steps)
        error = abs(expected - float(truth)) / max(abs(float(truth)), size, least)
        tolerance = max(tolerance_for(each, reference.fine) for each in (reference.uncertainty, uncertainty))
        if tolerance <= TOLERANCE:  # a gradient near a pole of the function is less exact than a product
            tolerance = max(TOLERANCE / 4, 3 * reference.uncertainty, 3 * uncertainty)
        if tolerance > 1:
            state = findings.UNKNOWN
        elif not error <= tolerance:
            constant = not _ordinary_gradient_is_right(exact, parameters, moves, reference) and _rows_are_right(
                reference
            )
            none = all(gradient is None for gradient in gradients)
            if constant and not none and name != "differences":
                return findings.TREATED_AS_CONSTANT
            certain = not constant and reference.fine and _steps_agree(penalty_at, float(truth), expected, steps)
            if none:
                return findings.without_parameters(name, certain=certain)
            return findings.wrong_gradient(name, error, certain=certain)
    return state if own is exact or name == "differences" else _rounding(name, own, function, gradients, state)


def _judge_gradient_of_zero(
    name: str, engine: EngineRun, exact: Products, reference: Reference, x: Tensor
) -> Verdict | None:
    """Return a verdict if the parameter gradient of products that are zero here differs from differences."""
    parameters = _trained(reference.function, exact.values, x)
    if not parameters:
        return None
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(exact.products.shape, generator=generator, device="cpu").to(exact.products)
    moves = random_moves(parameters, generator)
    expected, _ = _derivative(parameter_gradients((exact.products * weights).sum(), parameters), moves)
    if not reference.fine or abs(expected) <= _STILL * _scale(exact):
        return None
    sum_at = along(moves, parameters, lambda: (engine(reference.function, reference.x).products * weights).sum())
    with torch.no_grad():
        differences = [float(sum_at(h) - sum_at(-h)) / (2 * h) for h in (1e-5, 1e-3)]
    apart = min(abs(each - expected) for each in differences)
    return findings.wrong_gradient(name, apart / abs(expected), certain=True) if apart > abs(expected) / 3 else None


def _trained(function: Function, values: Tensor, x: Tensor) -> list[Tensor]:
    """Return the trained tensors: the parameters, and all other leaves of the graph of the values except x."""
    used = [*modules_of(function.module), *modules_of(function.readout)]
    registered = [p for module in used for p in module.parameters()] + tensors_of(function.module)
    leaves = graph_leaves(values, before=x)
    every = {id(each): each for each in (*registered, *leaves) if each.requires_grad and each.is_leaf and each is not x}
    return [each for each in every.values() if each.is_floating_point()]


def _rounding(name: str, own: Products, function: Function, exact: list[Tensor | None], right: Verdict) -> Verdict:
    """Return a verdict on how far the penalty's gradient in the module's own type is from that in float64."""
    if not isinstance(function.module, nn.Module):
        return right
    trained = [p for p in function.module.parameters() if p.requires_grad]
    if len(trained) > len(exact):
        return right
    pairs = [
        (mine.detach().double(), sharp.detach().double())
        for mine, sharp in zip(parameter_gradients(own.products.square().sum(), trained), exact, strict=False)
        if mine is not None and sharp is not None
    ]
    if not pairs:
        return right
    mine, sharp = (torch.cat([each.flatten() for each in several]) for several in zip(*pairs, strict=True))
    error = relative_difference(mine, sharp)
    if error <= 5 * TOLERANCE:
        return right
    return findings.rounded(f"The parameter gradient of a penalty by engine '{name}'", own.products.dtype, error)


def random_moves(parameters: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return a random direction for each parameter, of the magnitude of its values."""
    sizes = [q.detach().square().mean().sqrt() + 1e-3 for q in parameters]
    draws = [torch.randn(q.shape, generator=generator, device="cpu").to(q) for q in parameters]
    return [draw * size for draw, size in zip(draws, sizes, strict=True)]


def _derivative(gradients: list[Tensor | None], moves: list[Tensor]) -> tuple[float, float]:
    """Return the derivative along `moves`, and its size."""
    parts = [(g.detach().to(m) * m).flatten() for g, m in zip(gradients, moves, strict=True) if g is not None]
    products = torch.cat(parts) if parts else torch.zeros(1)
    return float(products.sum()), size_of_sum(products)


def along(moves: list[Tensor], parameters: list[Tensor], value: Callable[[], Value]) -> Callable[[float], Value]:
    """Return a value as a function of the step along a move of the parameters, which are restored each time."""

    def at(step: float) -> Value:
        saved = [q.detach().clone() for q in parameters]
        try:
            for q, before, move in zip(parameters, saved, moves, strict=True):
                q.data.copy_(before + step * move)  # `data`: graphs that hold the parameter remain valid
            return value()
        finally:
            for q, before in zip(parameters, saved, strict=True):
                q.data.copy_(before)

    return at


def _ordinary_gradient_is_right(
    exact: Products, parameters: list[Tensor], moves: list[Tensor], reference: Reference
) -> bool:
    """Return whether the parameter gradient of the values agrees with their finite differences."""
    loss = (exact.values * reference.rows[0]).sum()
    expected, size = _derivative(parameter_gradients(loss, parameters), moves)
    with torch.no_grad():
        seed_generators(SEED, reference.x.device)
        values_at = replayed_values(reference.function, reference.x)
        at = along(moves, parameters, lambda: (values_at(reference.x) * reference.rows[0]).sum())
        truth, uncertainty = derivative_along(at, reference.fine, reference.x.dtype)
    error = abs(expected - float(truth)) / max(abs(float(truth)), size)
    return error <= (max(1e-5, 3 * uncertainty) if reference.fine else tolerance_for(uncertainty, False))


def _rows_are_right(reference: Reference) -> bool:
    """Return whether vᵀJ is right. If not, a formula is wrong, and nothing is treated as constant on purpose."""
    try:
        with torch.enable_grad():
            x = reference.x.detach()
            rows = reverse_vjp(reference.function, x, reference.cotangents(x)).products
    except (UnsupportedError, RuntimeError):
        return False
    return reference.error(rows, of_rows=True) <= reference.tolerance


def _steps_agree(
    penalty_at: Callable[[float], Tensor], truth: float, expected: float, steps: tuple[float, ...]
) -> bool:
    """Return whether differences with very different steps agree that the derivative is not the expected one."""
    with torch.no_grad():
        differences = [float(penalty_at(h) - penalty_at(-h)) / (2 * h) for h in steps]
    return max(abs(each - truth) for each in differences) < abs(truth - expected) / 3


def _all_finite(gradients: list[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
