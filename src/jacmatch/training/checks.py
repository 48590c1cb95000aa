"""The checks of a run: the pre-flight check, processes and teacher compared later, and values that are not finite.

A term or gradient that is not finite is detected on the device and reported with the rows of metrics, so no step waits
for it. The batch of that step is a function of the step number. It is then computed again, and the data, the teacher's
answer, the terms and the gradient are checked sample by sample. This check runs in evaluation mode, with the current
weights if they are finite, and otherwise with those of the last checkpoint.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from jacmatch.diagnostics import report
from jacmatch.diagnostics.isolation import rows_of
from jacmatch.diagnostics.preflight import FILE, preflight_check, raise_for_faults, teacher_outputs
from jacmatch.errors import InputError, UnsupportedError, few
from jacmatch.jacobian.engines import parameter_gradients
from jacmatch.jacobian.findings import PREFLIGHT
from jacmatch.jacobian.modules import in_mode
from jacmatch.objectives import Distillation
from jacmatch.runs import CHECKPOINT, Run
from jacmatch.training import checkpoints
from jacmatch.training.data import Batch, Batches
from jacmatch.training.state import GRADIENT, SKIPPED, Bad, NotFinite, State

_LATER = 20
"""Step after which the teacher's outputs for the first samples are compared again."""


def check_before_training(state: State, batches: Batches, run: Run | None) -> None:
    """Run the pre-flight check if the settings request it; its report goes to `doctor.json` of the run."""
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
    """Compare weights and gradients between processes in the first step, and the teacher with itself later."""
    if not state.settings.doctor:
        return
    _check_teacher_again(state)
    if state.step or state.ranks.size == 1:
        return
    trained = [p for p in state.objective.parameters() if p.requires_grad]
    tensors = [each for p in trained for each in (p.detach(), p.grad) if each is not None]
    whole = [each for each in tensors if not hasattr(each, "full_tensor")]  # FSDP shards the others
    sums = torch.stack([part for each in whole for part in (each.double().sum(), each.double().square().sum())])
    rows = state.ranks.all_gather(sums.nan_to_num().cpu())
    lowest, highest = rows.amin(0), rows.amax(0)
    if not bool((highest - lowest <= 1e-5 * torch.maximum(highest.abs(), lowest.abs()) + 1e-12).all()):
        raise UnsupportedError(f"After the first backward: {PREFLIGHT['ranks-differ']}")


def _check_teacher_again(state: State) -> None:
    if state.teacher_outputs is None or state.step < _LATER:
        return
    (few, before), state.teacher_outputs = state.teacher_outputs, None
    now = teacher_outputs(state.objective, few)
    if now is not None and not torch.allclose(now[1], before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise UnsupportedError(f"After {state.step} steps: {PREFLIGHT['teacher-changes']}")


_TEACHER, _DATA = "the teacher's answer", "the data"
_REMEDIES = {
    _DATA: "Clean the data, or leave these samples out.",
    _TEACHER: "Look at the teacher there, or leave these samples out.",
}


Snapshot = dict[Tensor, Tensor]
"""A copy of each tensor that a step changes, made before the step."""


@torch.no_grad()
def before(state: State) -> Snapshot | None:
    """Copy the state that a step changes if steps that are not finite are skipped, else return None."""
    skips = state.settings.on_not_finite == "skip"
    return {tensor: tensor.clone() for tensor in _changed(state)} if skips else None


def monitored(state: State, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics of a step besides its terms; called between backward and the optimizer step.

    These are the gradient norm and, if steps may be skipped, whether this step is skipped. In fp16 a gradient may
    overflow because of the loss scale: the scaler skips that step and lowers the scale.
    """
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP
    scale = state.scale()
    if scale is not None:
        norm = torch.where(scale > 1, torch.zeros_like(norm), norm)
    samples = {GRADIENT: norm.detach()}
    if state.settings.on_not_finite == "skip":
        bad = ~(torch.stack([value.detach().float() for value in terms.values()]).isfinite().all() & norm.isfinite())
        bad = bad.float()
        if state.ranks.size > 1:
            distributed.all_reduce(bad, distributed.ReduceOp.MAX)
        samples[SKIPPED] = bad
    return samples


@torch.no_grad()
def undo(state: State, saved: Snapshot | None, terms: dict[str, Tensor]) -> None:
    """Restore the state before the step if the step was not finite; decided on the device, without synchronization."""
    if saved is None:
        return
    bad = terms[SKIPPED] > 0
    for tensor in _changed(state):  # the optimizer makes its state, which begins as zeros, in its first step
        value = saved.get(tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
        tensor.copy_(torch.where(bad.to(tensor.device), value, tensor))


def _changed(state: State) -> list[Tensor]:
    optimizer = state.optimizer.state.values()
    inner = [value for values in optimizer for value in values.values() if isinstance(value, Tensor)]
    average = [] if state.average is None else [*state.average.parameters(), *state.average.buffers()]
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    return [*trained, *state.objective.buffers(), *average, *inner]


@contextmanager
def reported(state: State, batches: Batches, run: Run | None) -> Iterator[None]:
    """Add the responsible samples to an error about a value that is not finite."""
    try:
        yield
        account(state, batches, run)
    except NotFinite as error:
        message = blame(state, batches, run, error.bad)
        raise InputError(error.rule, got=error.got, do=f"{message} {error.do}") from None


def account(state: State, batches: Batches, run: Run | None) -> None:
    """Warn of the steps skipped since the last call, with the cause."""
    skipped, most = state.metrics.skipped, state.settings.skip_at_most
    while skipped:
        bad = skipped.pop(0)
        state.skipped += 1
        if state.skipped > most:
            do = f"More than `skip_at_most` = {most} steps were skipped."
            raise NotFinite(
                bad, f"{do} {'' if state.saved_step is None else f'The checkpoint of step {state.saved_step} is kept.'}"
            )
        message = blame(state, batches, run, bad)
        warnings.warn(f"Step {bad.step} is skipped: {bad.what} is {bad.value}. {message}", stacklevel=2)


def blame(state: State, batches: Batches, run: Run | None, bad: Bad) -> str:
    """Describe which samples of the step are not finite and where; append it to `not_finite.json` of the run."""
    try:
        samples, weights = _samples_of(state, batches, run, bad.step - 1)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # the first error is what counts
        return f"Its samples could not be checked again: {str(error).strip().splitlines()[0][:200]}."
    if run is not None:
        row = {"step": bad.step, "what": bad.what, "value": str(bad.value), "samples": samples, "weights": weights}
        state.bad.append(row)
        run.write_json("not_finite.json", state.bad)
    parts = []
    for what, ids in samples.items():
        samples_of = f"sample{'s' * (len(ids) > 1)} {few(ids, 10)}"
        parts.append(f"Not finite: {what} of {samples_of}. {_REMEDIES.get(what, '')}".strip())
    if weights is None and not parts:
        return "There are no finite weights with which its samples could be checked."
    return " ".join(parts) or f"With {weights} each of its samples is finite by itself."


def _samples_of(state: State, batches: Batches, run: Run | None, step: int) -> tuple[dict[str, list[int]], str | None]:
    """Return sample ids by their first quantity that is not finite, and which weights were used."""
    count, objective = state.settings.accumulate, state.objective
    weights = _sound_weights(state, run)
    samples: dict[str, list[int]] = {}
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices), in_mode(objective, training=False):
        for number in range(step * count, (step + 1) * count):
            batch = batches.whole(number)
            for row, sample in enumerate(batch.ids.tolist()):
                one = rows_of(batch, torch.tensor([row]))
                what = _wrong(state, one, step / state.settings.steps, weights is not None)
                if what is not None:
                    samples.setdefault(what, []).append(sample)
    return samples, weights


def _sound_weights(state: State, run: Run | None) -> str | None:
    """Give the objective finite weights if there are any; return which."""
    if _finite(*state.objective.state_dict().values()):
        return "the current weights"
    if run is None or state.saved_step is None:
        return None
    saved = checkpoints.load(run.path / CHECKPOINT)
    state.objective.load_state_dict(saved["objective"])
    return f"the weights of step {saved['step']}"


def _wrong(state: State, batch: Batch, progress: float, weighted: bool) -> str | None:
    """Return the first quantity of a sample that is not finite; the student runs only if its weights are finite."""
    objective: Any = state.objective
    if not _finite(batch.x, batch.y, batch.partners, batch.partner_labels):
        return _DATA
    with state.fabric.autocast():
        if isinstance(objective, Distillation) and objective.teacher is not None:
            answer = objective.teacher.answer(*objective.question(batch.x, batch.y, **batch.keywords()))
            if not _finite(answer.outputs, answer.products):
                return _TEACHER
        if not weighted:
            return None
        with torch.enable_grad():
            terms = objective(batch.x, batch.y, **batch.keywords(), progress=progress)
    if not _finite(terms.teacher_outputs):
        return _TEACHER
    # The loss last: it is not finite if another term is not.
    for name in sorted(terms.values, key=lambda name: name == "loss"):
        if not _finite(terms.values[name]):
            return f"the term `{name}`"
    trained = [p for p in objective.parameters() if p.requires_grad]
    return None if _finite(*parameter_gradients(terms.values["loss"], trained)) else "the gradient"


def _finite(*values: object) -> bool:
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, Tensor))
