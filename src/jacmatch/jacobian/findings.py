"""All findings (a code, a description and a remedy), and the verdict on one engine (its state and findings)."""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from jacmatch.errors import UnsupportedError
from jacmatch.former_names import former


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        code: A short name, stable across versions.
        severity: `fault` if results would be wrong or cannot be computed; `note` if the library handles it.
        what: Description.
        remedy: What to do.
    """

    code: str
    severity: Literal["fault", "note"]
    what: str
    remedy: str

    way_out = former("Finding", "way_out", "remedy")

    def __str__(self) -> str:
        return f"[{self.code}] {self.what} Remedy: {self.remedy}"


def fault(code: str, what: str, remedy: str) -> Finding:
    """Return a finding that stops a training."""
    return Finding(code, "fault", what, remedy)


def note(code: str, what: str, remedy: str) -> Finding:
    """Return a finding that the library handles by itself."""
    return Finding(code, "note", what, remedy)


def _by_code(*findings: Finding) -> dict[str, Finding]:
    return {each.code: each for each in findings}


State = Literal["right", "wrong", "refused", "not finite", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """The result of comparing one engine with finite differences.

    It is `wrong` for a product or its gradient; `refused` if it raises an error, now or in the backward pass of a
    penalty; and `unknown` if the differences are too inaccurate.
    """

    state: State
    label: str  # the state in a word or two
    findings: tuple[Finding, ...] = ()
    certain: bool = False  # whether the error exceeds the uncertainty of the reference: the engine must not be used

    @property
    def is_right(self) -> bool:
        """Whether the engine has no fault."""
        return self.state in ("right", "unknown")


RIGHT = Verdict("right", "right")
UNKNOWN = Verdict("unknown", "right")
"""No fault is known, but nothing could be compared."""

_CONSTANT = Finding(
    "held-constant",
    "note",
    "The ordinary parameter gradient treats something as constant (detach, no_grad, spectral norm).",
    "If this is intended, do nothing: gradients of derivatives treat it as a constant too.",
)
TREATED_AS_CONSTANT = Verdict("unknown", "right", (_CONSTANT,))
"""Parameter gradients of values, not only of a penalty, differ from finite differences."""


def once(reason: str) -> Verdict:
    """Return the verdict on a derivative that cannot be differentiated."""
    what = f"A derivative in the module can be taken only once: {reason}."
    remedy = "Write its backward in torch operations, without once_differentiable; or engine='differences'."
    return Verdict("refused", "once only", (Finding("once-differentiable", "fault", what, remedy),), certain=True)


def not_finite(what: str) -> Verdict:
    """Return the verdict on NaN or infinity in products of finite values."""
    remedy = "Look for sqrt, powers, norm or division at zero."
    return Verdict("not finite", "NaN", (Finding("nan-derivative", "fault", what, remedy),))


def rounded(what: str, dtype: torch.dtype, error: float) -> Verdict:
    """Return the verdict on an engine that is right in float64, and off by `error` in the module's own type."""
    small = error <= 0.5
    label = "right" if small else f"off by {error:.0%} in {dtype}"
    what = f"{what} in {dtype} differs from float64 by {error:.0%}."
    remedy = "Use float64, or a larger batch if it divides by statistics of few values."
    finding = Finding("rounding", "note" if small else "fault", what, remedy)
    return Verdict("right" if small else "wrong", label, (finding,))


def other_outputs(error: float) -> Verdict:
    """Return the verdict on outputs that change because derivatives are computed."""
    what = f"The outputs of a pass with derivatives differ by {error:.0%} from those of an ordinary call."
    remedy = "Do not differentiate the module, and report the layer: its replacement by jacmatch is wrong."
    return Verdict("wrong", "other outputs", (Finding("other-outputs", "fault", what, remedy),), certain=True)


def without_parameters(name: str, *, certain: bool) -> Verdict:
    """Return the verdict on products without a gradient with respect to any parameter."""
    what = f"A penalty on the products of engine '{name}' has no gradient with respect to any parameter."
    remedy = "Remove what detaches the parameters or their results."
    return Verdict("wrong", "no gradient", (Finding("detached-parameters", "fault", what, remedy),), certain)


def wrong(name: str, products: Tensor, error: float, *, certain: bool) -> Verdict:
    """Return the verdict on products that differ from the reference."""
    if not products.any():
        what = f"Engine '{name}' returns zero although the outputs change: an operation has no {name}-mode rule."
        remedy = "Use an engine that is correct for this network, or write the operation in torch operations."
        return Verdict("wrong", "silently zero", (Finding(f"{name}-zero", "fault", what, remedy),), certain)
    if name == "differences":
        return wrong_differences(f"Differences in {products.dtype} are off by {error:.0%}", error)
    cause = "detach, .data, numpy, no_grad" + (", or an operation without forward mode" if name == "forward" else "")
    what = f"Engine '{name}' is off by {error:.0%}: a part of the derivative is missing ({cause})."
    code = "partly-detached" if name == "reverse" else "forward-incomplete"
    remedy = "Remove what cuts the graph, or use an engine that is correct."
    return Verdict("wrong", f"off by {error:.0%}", (Finding(code, "fault", what, remedy),), certain)


def not_zero(name: str) -> Verdict:
    """Return the verdict on nonzero products of a function whose values do not change with its input."""
    what = f"Engine '{name}' returns a derivative although the outputs do not change when the input does."
    remedy = "Write the operation in torch operations; a straight-through estimator needs jacmatch.unverified()."
    return Verdict("wrong", "not zero", (Finding("not-zero", "fault", what, remedy),), certain=True)


def wrong_differences(what: str, error: float) -> Verdict:
    """Return the verdict on differences that are inaccurate because of the module, not because of an error in it."""
    what = f"{what}: the module is too nonlinear or too noisy for their step, or rounds its values."
    finding = Finding("differences-inaccurate", "note", what, "Use an engine that is correct for this network.")
    return Verdict("wrong", f"off by {error:.0%}", (finding,))


def wrong_gradient(name: str, error: float, *, certain: bool) -> Verdict:
    """Return the verdict on a parameter gradient that differs from the reference."""
    if name == "differences" and error <= 0.5 and not certain:
        return wrong_differences(f"The parameter gradient of a penalty on differences is off by {error:.0%}", error)
    what = f"The parameter gradient of a penalty by engine '{name}' is off by {error:.0%}."
    remedy = "Look for a derivative that is cut off inside a custom backward; use an engine that is correct."
    finding = Finding("wrong-gradient", "fault", what, remedy)
    return Verdict("wrong", f"gradient off by {error:.0%}", (finding,), certain)


def refused(name: str, failure: UnsupportedError, *, moves: bool) -> Verdict:
    """Return the verdict for an error of the engine; `moves`: whether the outputs depend on the input."""
    reason = str(failure).partition(" Use engine=")[0]
    if "detaches" in reason:
        if not moves:
            return Verdict("refused", "no derivative")
        what = "The outputs change with the input, but something detaches them from it."
        remedy = "Remove .detach(), .data, numpy or no_grad from the module, or engine='differences'."
        return Verdict("refused", "detached", (Finding("detached", "fault", what, remedy),))
    remedy = "Use an engine that is correct for this network, or write the operation in torch operations."
    severity: Literal["fault", "note"] = "fault" if name == "reverse" else "note"
    return Verdict("refused", "cannot", (Finding(f"{name}-unsupported", severity, reason[:300], remedy),))


def first_line(failure: Exception) -> str:
    """The first line of an error of torch, without its hints."""
    line = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    return line.partition("; expected version")[0].partition(" Hint: ")[0][:300]


def untrainable(reason: str) -> Verdict:
    """Return the verdict on a network with correct products that cannot be trained, even without derivatives."""
    what = f"The parameter gradient of the network's own outputs fails: {reason}."
    remedy = "Do not change in place a tensor that the backward pass needs."
    return Verdict("unknown", "right", (Finding("untrainable", "fault", what, remedy),))


def fails(name: str, reason: str) -> Verdict:
    """Return the verdict on an error that is raised when the products are differentiated."""
    remedy = "Write the operation in torch operations, or register its backward."
    what = f"Engine '{name}' fails: {reason}"
    return Verdict("refused", "fails", (Finding("engine-fails", "fault", what, remedy),), certain=True)


PREFLIGHT: Final = _by_code(
    fault(
        "compiled-student",
        "The student was compiled by itself, which forbids its second derivative or drops it.",
        "Pass the student uncompiled and set compile=True (--compile): the objective and its derivatives are then "
        "compiled as one graph.",
    ),
    fault(
        "not-compiled",
        "Compilation of the steps was requested, but no graph was compiled.",
        "Leave compile out, or see CompiledSteps.report() of the objective for the reason.",
    ),
    fault(
        "non-deterministic",
        "The same batch gives different terms in a second call: the student or the objective keeps a state, or draws "
        "random numbers that torch's seed does not determine.",
        "Remove the state, or draw with torch.",
    ),
    fault(
        "random-in-evaluation",
        "The student draws random numbers in evaluation mode too.",
        "Use nn.Dropout, or functional.dropout(..., training=self.training).",
    ),
    fault(
        "writes-in-evaluation",
        "The student writes its buffers in evaluation mode too, so a validation changes the result.",
        "Write them only where self.training is set.",
    ),
    fault(
        "keeps-results",
        "The student reuses what it computed in an earlier call, so its outputs do not follow its parameters.",
        "Compute weights and features anew in each call.",
    ),
    fault(
        "unregistered",
        "The loss depends on parameters that are not registered with the objective; no optimizer updates them.",
        "Store modules in nn.ModuleList or nn.ModuleDict, and tensors in nn.Parameter.",
    ),
    fault(
        "not-a-sum",
        "The terms do not add up to the loss.",
        "Return the loss and its weighted terms in `values`, and all else in `unweighted`.",
    ),
    fault(
        "not-a-mean",
        "A term changes when each sample is repeated: it is not a mean over the batch, so its weight depends on the "
        "size of the batch and of the parts it is split into.",
        "Sum over everything but the samples, then take the mean.",
    ),
    fault(
        "teacher-changes",
        "The teacher returns different outputs for the same inputs in a second call.",
        "Put it in evaluation mode, or pass the network directly or as ModuleTeacher.",
    ),
    fault(
        "teacher-couples",
        "The teacher's output for one sample depends on the other samples in the batch.",
        "Put it in evaluation mode, where BatchNorm uses its running statistics.",
    ),
    fault(
        "teacher-with-gradient",
        "The teacher's outputs carry a graph, so a step would train the teacher, or compute gradients for nothing.",
        "Detach its outputs, or pass the network as ModuleTeacher.",
    ),
    fault(
        "ranks-differ",
        "The processes do not have the same weights and gradients after the first backward pass.",
        "Wrap the objective, not the student, in DistributedDataParallel, and without static_graph.",
    ),
)
"""Faults of an objective, its student and its teacher."""

DOCTOR: Final = _by_code(
    note(
        "unchecked",
        "The values are too rough or too curved here for finite differences, so the derivatives were not checked.",
        "Try the module in float64, or at another scale of the input.",
    ),
    fault(
        "zero-jacobian",
        "The outputs do not change when the input does: the Jacobian is zero here.",
        "Look for dead or saturated units, rounding or argmax in the module, and at the scale of the input.",
    ),
    fault(
        "non-deterministic",
        "Two calls at the same input give different outputs: value and derivative belong to different functions.",
        "Remove the random numbers or the state.",
    ),
    note(
        "dropout",
        "Random numbers are drawn in training mode (dropout); value and derivative share them.",
        "Nothing to do; a teacher is always in evaluation mode.",
    ),
    note(
        "in-place-input",
        "The module overwrites its input.",
        "The engines pass it a copy; in your own calls pass x.clone().",
    ),
    note(
        "batch-norm-couples",
        "BatchNorm in training mode couples the samples: a product belongs to the batch.",
        "batch_norm='frozen' makes it per sample.",
    ),
    note(
        "couples-samples",
        "The output of one sample depends on the others: a product vᵀJ or Jv belongs to the batch.",
        "For per-sample derivatives use `jacobian`, or remove statistics over the batch.",
    ),
)
"""Findings on a network as a whole."""

FINDINGS: Final = {**DOCTOR, **PREFLIGHT}
"""The findings with fixed texts, by their codes."""

CODES: Final[dict[str, str]] = {
    **{code: each.what for code, each in FINDINGS.items()},
    "not-finite": "The input or the outputs contain NaN or Inf.",
    "teacher-derivatives": "The teacher's products differ from differences of its own outputs.",
    "once-differentiable": "A derivative in the module can be taken only once.",
    "nan-derivative": "A derivative is NaN or Inf although the outputs are finite.",
    "rounding": "A derivative in the module's own type differs from that in float64.",
    "other-outputs": "The outputs of a pass with derivatives differ from those of an ordinary call.",
    "detached": "The outputs change with the input but are detached from it.",
    "partly-detached": "A part of vᵀJ, or of Jv in reverse mode, is missing.",
    "detached-parameters": "A penalty on derivatives has no gradient with respect to any parameter.",
    "reverse-zero": "Reverse mode returns zero although the outputs change.",
    "forward-zero": "Forward mode returns zero although the outputs change.",
    "forward-incomplete": "A part of Jv in forward mode is missing.",
    "differences-zero": "Differences return zero although the outputs change.",
    "differences-inaccurate": "Differences are inaccurate: the module is too nonlinear or too noisy for their step.",
    "reverse-wrong-for-jvp": "Reverse mode is right for vᵀJ and wrong for Jv.",
    "reverse-unsupported": "Reverse mode cannot differentiate the module.",
    "forward-unsupported": "Forward mode cannot differentiate the module.",
    "differences-unsupported": "Finite differences of the module fail.",
    "untrainable": "The network cannot be trained, with or without derivatives.",
    "engine-fails": "An engine fails when its products are differentiated.",
    "not-zero": "An engine returns a derivative although the outputs do not change.",
    "wrong-gradient": "The parameter gradient of a term or of a penalty differs from its differences.",
    "held-constant": "The module treats something as constant in its ordinary parameter gradient.",
}
"""Every code that a finding can have, with its meaning."""
