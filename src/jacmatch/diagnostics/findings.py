"""All codes of findings, and the texts of those that the doctor and the pre-flight check make themselves.

The texts on a single engine stand where it is checked, in `jacmatch.jacobian.findings`.
"""

from typing import Final

from jacmatch.jacobian.findings import Finding


def fault(code: str, what: str, remedy: str) -> Finding:
    """Return a finding that stops a training."""
    return Finding(code, "fault", what, remedy)


def note(code: str, what: str, remedy: str) -> Finding:
    """Return a finding that the library handles by itself."""
    return Finding(code, "note", what, remedy)


def _by_code(*findings: Finding) -> dict[str, Finding]:
    return {each.code: each for each in findings}


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
        "Return in `values` the loss and the weighted terms that it is the sum of; everything else in `unweighted`.",
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
        "Put it in evaluation mode; a network passed directly, or as ModuleTeacher, is.",
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
        "The values are too rough or too curved here for a difference, so the derivatives could not be checked by one.",
        "Try the module in float64, or at another scale of the input.",
    ),
    fault(
        "zero-jacobian",
        "The outputs do not change when the input does: the Jacobian is zero here.",
        "Look for dead or saturated units, rounding or argmax in the module, and at the scale of the input.",
    ),
    fault(
        "non-deterministic",
        "Two calls at the same input give different outputs: value and derivative belong to two functions.",
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
        "For derivatives of each sample by itself use `jacobian`, or remove statistics over the batch.",
    ),
)
"""Findings on a network as a whole."""

FINDINGS: Final = {**DOCTOR, **PREFLIGHT}
"""The findings with fixed texts, by their codes."""

CODES: Final[dict[str, str]] = {
    **{code: each.what for code, each in FINDINGS.items()},
    "not-finite": "The input or the outputs hold NaN or Inf.",
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
    "differences-inaccurate": "Differences are inaccurate: the module is too curved or too noisy.",
    "reverse-wrong-for-jvp": "Reverse mode is right for vᵀJ and wrong for Jv.",
    "reverse-unsupported": "Reverse mode cannot differentiate the module.",
    "forward-unsupported": "Forward mode cannot differentiate the module.",
    "differences-unsupported": "Differences cannot be taken of the module.",
    "untrainable": "The network cannot be trained, with or without derivatives.",
    "engine-fails": "An engine fails when its products are differentiated.",
    "not-zero": "An engine returns a derivative although the outputs do not change.",
    "wrong-gradient": "The parameter gradient of a term or of a penalty differs from its differences.",
    "held-constant": "The module treats something as constant in its ordinary parameter gradient.",
}
"""Every code that a finding can have, with its meaning."""
