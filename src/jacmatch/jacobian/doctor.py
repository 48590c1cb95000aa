"""The doctor: one batch in, a diagnosis out.

It tells which engines are right for this module, and what is wrong with the others.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import UnsupportedError, unknown_name
from jacmatch.jacobian.buffers import preserved_buffers, preserved_state
from jacmatch.jacobian.callables import modules_of
from jacmatch.jacobian.diagnosis import Diagnosis, Finding
from jacmatch.jacobian.function import check_input, replayed
from jacmatch.jacobian.modes import call
from jacmatch.jacobian.modules import Module
from jacmatch.jacobian.references import couples, plain
from jacmatch.jacobian.verdicts import Verdict
from jacmatch.jacobian.verification import Comparison, comparison_of, set_aside

ENGINES = ("reverse", "forward", "differences")


def doctor(
    module: Module, x: Float[Tensor, "batch *input"], *, seed: int = 0, engines: tuple[str, ...] = ENGINES
) -> Diagnosis:
    """A diagnosis of the module at x, in the mode (training or evaluation) it is in; the module is left as it was.

    Values are looked at for the whole batch, derivatives on a few samples of it, by what decides in each product which
    engine may be used (`jacmatch.jacobian.verification`). A copy in float64 serves as the reference where the module
    can be copied and runs in float64; where not, the differences are taken in the module's own type, with a loose
    tolerance.

    Args:
        module: The network, or any function of one tensor.
        x: A batch of at least two samples, as in training.
        seed: Seeds the directions.
        engines: Those that are tried.

    Raises:
        InputError: x is not a tensor of samples of a floating-point type, the outputs are no real tensor, or an engine
            is unknown.

    Example:
        >>> diagnosis = doctor(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3))
        >>> diagnosis.engine, diagnosis.ok
        ('reverse', True)
    """
    check_input(x, "doctor")
    if not set(engines) <= set(ENGINES):
        raise unknown_name("An engine of `doctor`", next(each for each in engines if each not in ENGINES), ENGINES)
    x = x.detach()
    with set_aside(x), preserved_state(module), torch.enable_grad():
        findings = _values(module, x)
        if any(finding.code in ("not-finite", "non-deterministic") for finding in findings):
            return Diagnosis("none", tuple(findings), {})
        comparison = comparison_of(plain(module), x, seed=seed)
        reference = comparison.reference
        if not reference.moves:
            findings.append(_ZERO)
        elif reference.tolerance == math.inf:
            findings.append(_ROUGH)
        states = {}
        for name in engines:
            verdict = _both_products(comparison, x, name)
            states[name] = verdict.label
            cut_off = any(finding.code in ("detached", "partly-detached") for finding in findings)
            findings += [each for each in verdict.findings if not (cut_off and each.code in _FOLLOW_FROM_DETACHING)]
    engine = next((name for name, state in states.items() if state == "right"), "none")
    return Diagnosis(engine, tuple(dict.fromkeys(findings)), states)


def _both_products(comparison: Comparison, x: Tensor, name: str) -> Verdict:
    """What is to be said of an engine for all that it is used for: reverse mode gives vᵀJ and Jv."""
    product = "vjp" if name == "reverse" else name
    verdict = comparison.not_finite(product, x) or comparison.verdict(product, rounding=True)
    if name != "reverse" or not verdict.is_right or not comparison.reference.moves:
        return verdict
    other = comparison.verdict("reverse", rounding=True)
    if other.is_right:
        return verdict
    what = f"Jv by engine 'reverse' is not right: {other.label}. {' '.join(each.what for each in other.findings)}"
    note = Finding("reverse-wrong-for-jvp", "note", what, "Take Jv by another engine; engine='auto' does.")
    return Verdict(other.state, f"right for vjp; for jvp {other.label}", (*verdict.findings, note))


_FOLLOW_FROM_DETACHING = (
    "forward-zero",
    "forward-incomplete",
    "forward-unsupported",
    "wrong-gradient",
    "detached-parameters",
    "differences-inaccurate",
)
_ROUGH = Finding(
    "unchecked",
    "note",
    "The values are too rough or too curved here for a difference, so the derivatives could not be checked by one.",
    "Try the module in float64, or at another scale of the input.",
)
_ZERO = Finding(
    "zero-jacobian",
    "fault",
    "The outputs do not move when the input does: the Jacobian is zero here.",
    "Look for dead or saturated units, rounding or argmax in the module, and at the scale of the input.",
)


def _values(module: Module, x: Tensor) -> list[Finding]:
    """What can be seen from values alone: NaN, chance, writes to the input, samples that depend on each other."""
    with torch.no_grad():
        if not torch.isfinite(x).all():
            return [Finding("not-finite", "fault", "The input holds NaN or Inf.", "Clean the data.")]
        same = replayed(plain(module), x)
        y, again, given = same(x), same(x), x.clone()
        if not torch.isfinite(y).all():
            what = "The outputs hold NaN or Inf."
            return [Finding("not-finite", "fault", what, "Look for log, division or overflow; lower the scale.")]
        findings = []
        if not torch.equal(y, again) or _differs(module, x):
            if not torch.equal(y, again) or _differs_in_evaluation(module, x):
                what = (
                    "Two calls at the same input give different outputs: value and derivative belong to two functions."
                )
                return [Finding("non-deterministic", "fault", what, "Remove the random numbers or the state.")]
            what = "Random numbers are drawn in training mode (dropout); value and derivative share them."
            findings.append(Finding("dropout", "note", what, "Nothing to do; a teacher is always in evaluation mode."))
        with preserved_buffers(module):
            call(module, given)
        if not torch.equal(given, x):
            what = "The module overwrites its input."
            findings.append(
                Finding("in-place-input", "note", what, "The engines feed it a copy; in your own calls pass x.clone().")
            )
        return findings + _coupling(module, x, y, same)


def _differs(module: Module, x: Tensor) -> bool:
    """Whether two ordinary calls, one after the other, give different outputs."""
    with preserved_state(module):
        first, second = (plain(module)(x.clone())[0] for _ in range(2))
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-6)


def _differs_in_evaluation(module: Module, x: Tensor) -> bool:
    if not isinstance(module, nn.Module):
        return True
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        for layer, _ in modes:
            layer.training = False
        return _differs(module, x)
    finally:
        for layer, training in modes:
            layer.training = training


def _coupling(module: Module, x: Tensor, y: Tensor, values: Callable[[Tensor], Tensor]) -> list[Finding]:
    """Whether the first sample feels a move of the others, or they feel a move of the first."""
    try:
        if not couples(values, x, y, 1e-4):
            return []
    except UnsupportedError as unknown:
        return [Finding("unchecked", "note", str(unknown), "Try another batch.")]
    layers = [layer for network in modules_of(module) for layer in network.modules()]
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training for layer in layers):
        what = "BatchNorm in training mode couples the samples: a product belongs to the batch."
        return [Finding("batch-norm-couples", "note", what, "batch_norm='frozen' makes it per sample.")]
    what = "The output of one sample depends on the others: a product vᵀJ or Jv belongs to the batch."
    remedy = "For derivatives of each sample by itself take `jacobian`, or remove statistics over the batch."
    return [Finding("couples-samples", "note", what, remedy)]
