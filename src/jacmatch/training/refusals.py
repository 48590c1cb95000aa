"""What the doctor at the gate can have against a training, each with its way out."""

from jacmatch.jacobian.diagnosis import Finding


def fault(code: str, what: str, way_out: str) -> Finding:
    """A finding that stops a training."""
    return Finding(code, "fault", what, way_out)


FAULTS = {
    each.code: each
    for each in (
        fault(
            "compiled-student",
            "The student was compiled by itself, which forbids its second derivative or drops it.",
            "Give the student as it is, and set compile=True (--compile): then objective and slopes are one graph.",
        ),
        fault(
            "not-compiled",
            "The steps were to be compiled, but no graph came of it.",
            "Leave compile out, or ask CompiledSteps.report() of the objective.",
        ),
        fault(
            "non-deterministic",
            "The same batch gives other terms the second time: student or objective keep a state or draw numbers that "
            "torch's seed does not decide.",
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
            "The student keeps what it computed in an earlier call, so its outputs do not follow its parameters.",
            "Compute weights and features anew in each call.",
        ),
        fault(
            "unregistered",
            "The loss depends on parameters of which the objective does not know; no optimizer moves them.",
            "Keep modules in nn.ModuleList or nn.ModuleDict, and tensors in nn.Parameter.",
        ),
        fault(
            "not-a-sum",
            "The terms do not add up to the loss.",
            "Return in `values` the loss, and the weighted terms that it is the sum of; all else in `unweighted`.",
        ),
        fault(
            "not-a-mean",
            "A term changes when each sample comes twice: it is no mean over the batch, so its weight depends on the "
            "size of the batch and of the parts it is dealt in.",
            "Sum over all but the samples, then take the mean.",
        ),
        fault(
            "teacher-changes",
            "The teacher answers the same question differently the second time.",
            "Put it in evaluation mode; a network is given as it is, or as ModuleTeacher, which does so.",
        ),
        fault(
            "teacher-couples",
            "What the teacher says of a sample depends on the others in the batch.",
            "Put it in evaluation mode, where BatchNorm has its running statistics.",
        ),
        fault(
            "teacher-with-gradient",
            "The teacher's answers carry a graph, so a step would train the teacher, or pay for it.",
            "Detach what it answers, or give the network as ModuleTeacher.",
        ),
        fault(
            "ranks-differ",
            "The processes do not have the same weights and gradients after the first backward.",
            "Wrap the objective, not the student, in DistributedDataParallel, and without static_graph.",
        ),
    )
}
