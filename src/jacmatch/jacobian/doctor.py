"""The doctor: one batch in, a diagnosis out.

It tells which engines are right for this module, and what is wrong with the others.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.jacobian.diagnosis import Diagnosis, Finding
from jacmatch.jacobian.engines import Function, difference_push, forward_push, replayed, reverse_pull
from jacmatch.jacobian.modules import Module, preserved_buffers
from jacmatch.jacobian.readouts import Context, Logits
from jacmatch.jacobian.trials import Reference, Trial, judge


def doctor(module: Module, x: Float[Tensor, "batch *input"], *, seed: int = 0) -> Diagnosis:
    """A diagnosis of the module at x, in the mode (training or evaluation) it is in; the module is left as it was.

    A copy in float64 serves as the reference where the module can be copied and runs in float64; where not, the
    differences are taken in the module's own type and judged more mildly.

    Args:
        module: The network, or any function of one tensor.
        x: A batch of at least two samples, as in training.
        seed: Seeds the directions.

    Example:
        >>> diagnosis = doctor(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3))
        >>> diagnosis.engine, diagnosis.ok
        ('reverse', True)
    """
    x = x.detach()
    device = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(device), preserved_buffers(module), torch.enable_grad():
        findings = _values(module, x)
        if any(finding.code in ("not-finite", "non-deterministic") for finding in findings):
            return Diagnosis("none", tuple(findings), {})
        generator = torch.Generator().manual_seed(seed)
        reference = Reference.of(module, x, generator)
        if not reference.moves:
            findings.append(_ZERO)
        trials: dict[str, Trial] = {
            "reverse": lambda f, z: reverse_pull(f, z, reference.cotangents(z)),
            "forward": lambda f, z: forward_push(f, z, reference.tangents.to(z.dtype)),
            "differences": lambda f, z: difference_push(f, z, reference.tangents.to(z.dtype), None),
        }
        engines = {}
        for name, trial in trials.items():
            engines[name], finding = judge(name, trial, module, x, reference)
            if finding is not None:
                findings.append(finding)
    engine = next((name for name, state in engines.items() if state == "right"), "none")
    return Diagnosis(engine, tuple(findings), engines)


_ZERO = Finding(
    "zero-jacobian",
    "fault",
    "The outputs do not move when the input does: the Jacobian is zero here.",
    "Look for dead or saturated units, rounding or argmax in the module, and at the scale of the input.",
)


def _values(module: Module, x: Tensor) -> list[Finding]:
    """What can be seen from values alone: NaN, chance, writes to the input, samples that depend on each other."""
    function = Function(module, Logits(), Context(), (), "batch")
    findings = []
    with torch.no_grad():
        same = replayed(function, x)
        y, again, given = same(x), same(x), x.clone()
        torch.rand(1, device=x.device)  # moves the generator on, so that chance shows
        fresh = function(given)[0]
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return [Finding("not-finite", "fault", "Input or outputs hold NaN or Inf.", "Clean the data; lower the scale.")]
    drops = isinstance(module, nn.Module) and any(
        layer.training and ("dropout" in type(layer).__name__.lower() or getattr(layer, "dropout", 0))
        for layer in module.modules()
    )
    if not torch.equal(y, again) or (not drops and not torch.allclose(y, fresh, rtol=1e-3, atol=1e-6)):
        what = "Two calls at the same input give different outputs, so value and slope belong to different functions."
        findings.append(
            Finding("non-deterministic", "fault", what, "Remove the random numbers or state, or call eval().")
        )
    elif drops:
        what = "Dropout is on; value and derivative share one mask."
        findings.append(Finding("dropout", "note", what, "Nothing to do; a teacher is always in evaluation mode."))
    if not torch.equal(given, x):
        what = "The module overwrites its input."
        findings.append(
            Finding("in-place-input", "note", what, "The engines feed it a copy; in your own calls pass x.clone().")
        )
    if len(x) > 1:
        findings += _coupling(module, x, y, same)
    return findings


def _coupling(module: Module, x: Tensor, y: Tensor, values: Callable[[Tensor], Tensor]) -> list[Finding]:
    other = x.clone()
    other[1:] = x[1:].flip(0) * 1.1 + 0.1 * x[1:].std()
    with torch.no_grad():
        moved = (values(other)[0] - y[0]).abs().max() > 1e-4 * y.abs().max() + 1e-12
    if not moved:
        return []
    layers = module.modules() if isinstance(module, nn.Module) else []
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training for layer in layers):
        what = "BatchNorm in training mode couples the samples: a product belongs to the batch."
        return [Finding("batch-norm-couples", "note", what, "batch_norm='frozen' makes it per sample.")]
    what = "The output of one sample depends on the others, so there is no Jacobian per sample."
    return [Finding("couples-samples", "fault", what, "Remove statistics over the batch from the module.")]
