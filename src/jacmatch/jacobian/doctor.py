"""The doctor: one batch in, a diagnosis out.

It tells which engines are right for this module, and what is wrong with the others.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError, unknown_name
from jacmatch.jacobian.diagnosis import Diagnosis, Finding
from jacmatch.jacobian.engines import difference_push, forward_push, reverse_pull
from jacmatch.jacobian.function import replayed
from jacmatch.jacobian.modules import Module, preserved_buffers
from jacmatch.jacobian.references import Reference, Trial, plain
from jacmatch.jacobian.trials import judge, not_finite_at

ENGINES = ("reverse", "forward", "differences")


def doctor(
    module: Module, x: Float[Tensor, "batch *input"], *, seed: int = 0, engines: tuple[str, ...] = ENGINES
) -> Diagnosis:
    """A diagnosis of the module at x, in the mode (training or evaluation) it is in; the module is left as it was.

    A copy in float64 serves as the reference where the module can be copied and runs in float64; where not, the
    differences are taken in the module's own type and judged more mildly.

    Args:
        module: The network, or any function of one tensor.
        x: A batch of at least two samples, as in training.
        seed: Seeds the directions.
        engines: Those that are tried.

    Raises:
        InputError: x is not of a floating-point type, or an engine is unknown.

    Example:
        >>> diagnosis = doctor(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3))
        >>> diagnosis.engine, diagnosis.ok
        ('reverse', True)
    """
    if not x.is_floating_point():
        raise InputError(
            "`x` of `doctor` must be of a floating-point type.",
            got=str(x.dtype),
            do="Scale images to float; for text, give embeddings (`from_embeddings`).",
        )
    if not set(engines) <= set(ENGINES):
        raise unknown_name("An engine of `doctor`", next(each for each in engines if each not in ENGINES), ENGINES)
    x = x.detach()
    device = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(device), preserved_buffers(module), torch.enable_grad():
        findings = _values(module, x)
        if any(finding.code in ("not-finite", "non-deterministic") for finding in findings):
            return Diagnosis("none", tuple(findings), {})
        generator = torch.Generator().manual_seed(seed)
        # Equal pixels tie in max pooling and lie on kinks of ReLU, where no derivative exists: a step off them.
        size = x.square().mean().sqrt()
        beside = x + 1e-3 * size * torch.randn(x.shape, generator=generator).to(x)
        coupled = any(finding.code in ("couples-samples", "batch-norm-couples") for finding in findings)
        reference = Reference.of(module, beside, generator, coupled=coupled)
        if not reference.moves:
            findings.append(_ZERO)
        elif reference.tolerance == math.inf:
            findings.append(_ROUGH)
        trials: dict[str, Trial] = {
            "reverse": lambda f, z: reverse_pull(f, z, reference.cotangents(z)),
            "forward": lambda f, z: forward_push(f, z, reference.tangents.to(z.dtype)),
            "differences": lambda f, z: difference_push(f, z, reference.tangents.to(z.dtype), None),
        }
        states = {}
        for name in engines:
            trial = trials[name]
            states[name], seen = not_finite_at(name, trial, module, x) or judge(name, trial, module, beside, reference)
            cut_off = any(finding.code in ("detached", "partly-detached") for finding in findings)
            findings += [finding for finding in seen if not (cut_off and finding.code in _FOLLOW_FROM_DETACHING)]
    engine = next((name for name, state in states.items() if state == "right"), "none")
    return Diagnosis(engine, tuple(dict.fromkeys(findings)), states)


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
        same = replayed(plain(module), x)
        y, again, given = same(x), same(x), x.clone()
        if not torch.isfinite(x).all():
            return [Finding("not-finite", "fault", "The input holds NaN or Inf.", "Clean the data.")]
        if not torch.isfinite(y).all():
            what = "The outputs hold NaN or Inf."
            return [Finding("not-finite", "fault", what, "Look for log, division or overflow; lower the scale.")]
        findings = []
        if not torch.equal(y, again) or _differs(module, x):
            if not torch.equal(y, again) or _differs_in_evaluation(module, x):
                what = "Two calls at the same input give different outputs: value and slope are of different functions."
                return [Finding("non-deterministic", "fault", what, "Remove the random numbers or the state.")]
            what = "Random numbers are drawn in training mode (dropout); value and derivative share them."
            findings.append(Finding("dropout", "note", what, "Nothing to do; a teacher is always in evaluation mode."))
        with preserved_buffers(module):
            module(given)
        if not torch.equal(given, x):
            what = "The module overwrites its input."
            findings.append(
                Finding("in-place-input", "note", what, "The engines feed it a copy; in your own calls pass x.clone().")
            )
        return findings + _coupling(module, x, y, same)


def _differs(module: Module, x: Tensor) -> bool:
    """Whether two ordinary calls, one after the other, give different outputs."""
    with preserved_buffers(module):
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
    if len(x) < 2:
        return []
    moved = x.flip(0) * 1.1 + 0.1 * (float(x.std()) or 1.0)
    others, first = torch.cat([x[:1], moved[1:]]), torch.cat([moved[:1], x[1:]])
    felt = torch.cat([values(others)[:1], values(first)[1:]]) - y
    if not felt.abs().max() > 1e-4 * y.abs().max() + 1e-12:
        return []
    layers = module.modules() if isinstance(module, nn.Module) else []
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training for layer in layers):
        what = "BatchNorm in training mode couples the samples: a product belongs to the batch."
        return [Finding("batch-norm-couples", "note", what, "batch_norm='frozen' makes it per sample.")]
    what = "The output of one sample depends on the others, so there is no Jacobian per sample."
    return [Finding("couples-samples", "fault", what, "Remove statistics over the batch from the module.")]
