"""The checks of a run: the pre-flight check before the first step, processes and teacher compared after it."""

import torch
from torch import distributed

from jacmatch.diagnostics import report
from jacmatch.diagnostics.preflight import FILE, preflight_check, raise_for_faults, teacher_outputs
from jacmatch.errors import UnsupportedError
from jacmatch.jacobian.findings import PREFLIGHT
from jacmatch.runs import Run
from jacmatch.training.data import Batches
from jacmatch.training.metrics import Bad, NotFinite
from jacmatch.training.state import State

_LATER = 20
"""Step after which the teacher's outputs for the first samples are compared again."""


def check_before_training(state: State, batches: Batches, run: Run | None) -> None:
    """Run the pre-flight check if the settings ask for it; its report goes to `doctor.json` of the run."""
    if not state.settings.doctor or state.step:
        return
    batch = batches(0)
    result = preflight_check(state.objective, batch)
    state.aside += result.seconds
    if result.not_finite is not None:
        if state.settings.on_not_finite != "stop":
            return  # such steps are left out, so there is nothing to compare in this one
        name, value = result.not_finite
        raise NotFinite(Bad(1, f"the term `{name}`", value), "Look at the network's outputs for these samples.")
    if run is not None:
        run.write_json(FILE, report(result))
    raise_for_faults(result, state.objective, batch)
    state.teacher_outputs = teacher_outputs(state.objective, batch)


def check_after_backward(state: State) -> None:
    """Compare weights and gradients of all processes in the first step, and the teacher with itself once later."""
    if not state.settings.doctor:
        return
    _check_teacher_again(state)
    if state.step:
        return
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    trained = [p for p in state.objective.parameters() if p.requires_grad]
    tensors = [each for p in trained for each in (p.detach(), p.grad) if each is not None]
    whole = [each for each in tensors if not hasattr(each, "full_tensor")]  # FSDP shards the others
    sums = torch.stack([part for each in whole for part in (each.double().sum(), each.double().square().sum())])
    sums = sums.nan_to_num()
    lowest, highest = sums.clone(), sums.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    if not bool((highest - lowest <= 1e-5 * torch.maximum(highest.abs(), lowest.abs()) + 1e-12).all()):
        raise UnsupportedError(f"After the first backward: {PREFLIGHT['ranks-differ']}")


def _check_teacher_again(state: State) -> None:
    if state.teacher_outputs is None or state.step < _LATER:
        return
    (few, before), state.teacher_outputs = state.teacher_outputs, None
    now = teacher_outputs(state.objective, few)
    if now is not None and not torch.allclose(now[1], before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise UnsupportedError(f"After {state.step} steps: {PREFLIGHT['teacher-changes']}")
