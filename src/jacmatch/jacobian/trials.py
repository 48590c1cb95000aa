"""One engine tried: its product, and the gradient of a penalty on that product.

The second is what training uses, and where derivatives can be silently wrong while the first is right: a penalty on
slopes jumps where a ReLU switches, so its differences need the small steps of a reference in float64.
"""

import torch
from torch import Tensor, nn

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import verdicts
from jacmatch.jacobian.engines import parameter_gradients
from jacmatch.jacobian.function import Function, Products
from jacmatch.jacobian.modules import Module, preserved_buffers
from jacmatch.jacobian.references import (
    SEED,
    TOLERANCE,
    Reference,
    Trial,
    along,
    plain,
    relative_difference,
    size_of_sum,
    tolerance_for,
)
from jacmatch.jacobian.verdicts import Verdict


def not_finite_at(name: str, trial: Trial, module: Module, x: Tensor) -> Verdict | None:
    """NaN or infinity in what an engine makes of finite values, if there is any: at zeros, mostly."""
    try:
        with preserved_buffers(module):
            products = _reseeded(trial)(plain(module), x).products
            if not torch.isfinite(products).all():
                return verdicts.not_finite(f"Engine '{name}' returns NaN or Inf although the outputs are finite.")
            parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            gradients = parameter_gradients(products.square().sum(), trained) if trained else []
    except (RuntimeError, UnsupportedError):
        return None  # `judge` says what that is
    if all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None):
        return None
    return verdicts.not_finite(f"The parameter gradient of a penalty by engine '{name}' is NaN or Inf.")


def judge(name: str, trial: Trial, module: Module, x: Tensor, reference: Reference) -> Verdict:
    """`right`, or what is wrong with one engine: first its product, then the gradient of a penalty on it."""
    seeded = _reseeded(trial)
    try:
        with preserved_buffers(module):
            own = seeded(plain(module), x)
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
        torch.manual_seed(SEED)
        return trial(function, x)

    return seeded


def _judge_product(name: str, own: Products, exact: Products, reference: Reference) -> Verdict:
    # Dropout may have drawn another mask in the other type.
    comparable = torch.allclose(own.values.double(), exact.values.double(), rtol=1e-2, atol=1e-4)
    judged = own if name == "differences" and comparable else exact
    error = reference.error(name, judged.products)
    if reference.moves and (not error <= reference.tolerance or not judged.products.any()):
        return verdicts.wrong(name, judged.products, error)
    error = relative_difference(own.products.detach().double(), exact.products.detach().double())
    if judged is own or not reference.moves or not comparable or error <= reference.tolerance:
        return verdicts.RIGHT
    return verdicts.rounded(f"Engine '{name}'", own.products.dtype, error)


def _judge_gradient(
    name: str, trial: Trial, own: Products, exact: Products, module: Module, reference: Reference
) -> Verdict:
    """Compares ∂/∂θ ‖product‖² in random directions of θ with differences of ‖product‖² itself."""
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
    generator, rounding = torch.Generator().manual_seed(1), 0.0
    for _ in range(2):  # a part that is missing may happen to be small in one direction
        moves = [torch.randn(q.shape, generator=generator).to(q) * _step(q) for _, q in pairs]
        slope, size = _slope(sharp, moves)
        truth, uncertainty = _penalty_slope(trial, [q for _, q in pairs], moves, reference, slope)
        error = abs(slope - truth) / max(abs(truth), size)
        if not error <= max(reference.tolerance, tolerance_for(uncertainty, reference.fine)):
            return verdicts.wrong_gradient(name, error)
        rounding = max(rounding, abs(_slope(mine, moves)[0] - slope) / size)
    if own is exact or name == "differences" or rounding <= 5 * TOLERANCE:
        return verdicts.RIGHT
    return verdicts.rounded(f"The parameter gradient of a penalty by engine '{name}'", own.products.dtype, rounding)


def _step(parameter: Tensor) -> Tensor:
    return parameter.detach().square().mean().sqrt() + 1e-3


def _slope(gradients: list[Tensor | None], moves: list[Tensor]) -> tuple[float, float]:
    """The derivative along the move, and its size."""
    pairs = [(g.detach().to(m), m) for g, m in zip(gradients, moves, strict=True) if g is not None]
    parts = torch.cat([(g * m).flatten() for g, m in pairs])
    return float(parts.sum()), size_of_sum(parts)


def _penalty_slope(
    trial: Trial, parameters: list[nn.Parameter], moves: list[Tensor], reference: Reference, expected: float
) -> tuple[float, float]:
    saved = [q.detach().clone() for q in parameters]

    def at(step: float) -> Tensor:
        for q, before, move in zip(parameters, saved, moves, strict=True):
            q.copy_(before + step * move)
        return trial(plain(reference.module), reference.x).products.square().sum()

    with torch.no_grad():
        try:
            slope, uncertainty = along(at, reference.fine, reference.x.dtype, expected)
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
