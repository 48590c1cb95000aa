"""The doctor at the gate: before its first step, a training is held against its own definition.

The gradient that the optimizer will get is compared, term by term, with central differences of the objective in random
directions of the parameters, on a few samples and in float64 where a copy can be had. Besides: whether the same batch
gives the same terms twice, whether they are means over the batch that add up, whether the teacher stands still, and
whether all that is trained is registered. Nothing of the training is changed by it, bit for bit.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import doctor
from jacmatch.jacobian import run as outputs_of
from jacmatch.jacobian.diagnosis import Finding
from jacmatch.jacobian.engines import parameter_gradients
from jacmatch.jacobian.function import Function
from jacmatch.jacobian.modes import set_mode
from jacmatch.jacobian.modules import preserved_buffers
from jacmatch.jacobian.references import along, plain, relative_difference
from jacmatch.jacobian.verification import PUSHES, comparison_of, set_aside, unverified
from jacmatch.objectives.base import Objective
from jacmatch.runs import Run
from jacmatch.teachers import EnsembleTeacher, ModuleTeacher, Question, RememberedTeacher, Teacher
from jacmatch.training.data import Batch, Batches
from jacmatch.training.metrics import Bad, NotFinite
from jacmatch.training.refusals import FAULTS, fault
from jacmatch.training.rehearsal import Rehearsal, borrowed, errors_of, exact, is_stale, rows_of
from jacmatch.training.state import State

SAMPLES = 8
_OF_DERIVATIVES = (
    *("detached", "partly-detached", "once-differentiable", "wrong-gradient", "detached-parameters", "engine-fails"),
    *("reverse-zero", "forward-zero", "forward-incomplete", "nan-derivative", "other-outputs"),
)
_LOOSE, _SURE = 0.3, 0.05
"""Error from which a teacher's own products are wrong, and error of differences up to which these can tell."""

_LATER = 20
"""Step after which the teacher is queried again about the first batch."""


@dataclass(frozen=True)
class Examined:
    """What was seen at the gate.

    Attributes:
        findings: Faults; there is none if all is well.
        errors: Relative error of the gradient of each term; None where no difference was exact enough to tell.
        exact: Whether it was compared in float64.
        seconds: How long it took.
    """

    findings: tuple[Finding, ...]
    errors: dict[str, float | None]
    exact: bool
    seconds: float


def examine(objective: nn.Module, batch: Batch, *, progress: float = 0.0) -> Examined:
    """What is wrong with an objective in its first step on this batch; it is left as it was.

    Args:
        objective: As for `fit`.
        batch: Of which the first samples are looked at.
        progress: Share of the training that is done.

    Raises:
        UnsupportedError: The objective itself says what is wrong.

    Example:
        >>> from jacmatch.objectives import Distillation
        >>> batch = Batch(torch.rand(8, 3), torch.arange(8) % 2, torch.arange(8), 0)
        >>> examine(Distillation(nn.Linear(3, 2)), batch).findings
        ()
    """
    start = time.perf_counter()
    if any(type(module).__name__ == "OptimizedModule" for module in objective.modules()):
        return Examined((FAULTS["compiled-student"],), {}, False, time.perf_counter() - start)
    place = batch.x.device
    few = rows_of(batch, torch.arange(min(SAMPLES, len(batch.x)), device=place))
    modes = [(module, module.training) for module in objective.modules()]
    with (
        torch.random.fork_rng([place] if place.type == "cuda" else []),
        torch.enable_grad(),
        torch.autocast(place.type, enabled=False),
        unverified(),  # what is wrong is found here, by name
    ):
        try:
            codes = _of_student(objective, few)
            objective.train()
            wrong = _of_derivatives(objective, few)
            trial = exact(objective, few, progress)
            if trial is None:
                with borrowed(objective, few, progress) as own:
                    findings, errors = _seen(own)
            else:
                findings, errors = _seen(trial)
            codes += _not_compiled(objective, batch, progress)
        finally:
            for module, mode in modes:
                module.training = mode
    found = tuple(dict.fromkeys((*(FAULTS[code] for code in codes), *findings, *wrong)))
    return Examined(found, errors, trial is not None, time.perf_counter() - start)


def refuse(examined: Examined, objective: nn.Module, batch: Batch) -> None:
    """Stops a training with a fault; where a gradient is wrong, what `jacmatch.doctor` says of the student comes too.

    Raises:
        UnsupportedError: There is a fault.
    """
    if not examined.findings:
        return
    said = list(examined.findings)
    student = getattr(objective, "student", None)
    if isinstance(student, nn.Module) and any(each.code == "wrong-gradient" for each in said):
        said += [each for each in doctor(student, batch.x[:SAMPLES]).findings if each.severity == "fault"]
    lines = " ".join(f"[{each.code}] {each.what} Way out: {each.way_out}" for each in dict.fromkeys(said))
    raise UnsupportedError(f"Before the first step: {lines} To train all the same: doctor=False, or --no-doctor.")


def guard(state: State, batches: Batches, run: Run | None) -> None:
    """Examines the objective before the first step, if asked to; what was seen goes to `doctor.json` of the run.

    Raises:
        UnsupportedError: There is a fault.
        NotFinite: A term is NaN or infinite.
    """
    if not state.settings.doctor or state.step:
        return
    batch = batches(0)
    try:
        examined = examine(state.objective, batch)
    except NotFinite:
        if state.settings.on_not_finite == "stop":
            raise
        return  # such steps are left out, so there is nothing to compare in this one
    state.aside += examined.seconds
    if run is not None:
        found = {"ok": not examined.findings, "errors": examined.errors, "exact": examined.exact}
        run.write_json("doctor.json", {**found, "findings": [vars(each) for each in examined.findings]})
    refuse(examined, state.objective, batch)
    state.teacher_outputs = _teacher_outputs(state.objective, batch)


def _teacher_outputs(objective: nn.Module, batch: Batch) -> tuple[Batch, Tensor] | None:
    """What the teacher says of a few samples, to be compared with what it says later; None where it cannot be asked."""
    teacher = getattr(objective, "teacher", None)
    teacher = teacher.teacher if isinstance(teacher, RememberedTeacher) else teacher
    few = rows_of(batch, torch.arange(min(SAMPLES, len(batch.x)), device=batch.x.device))
    if teacher is None:
        return None
    try:
        with torch.no_grad(), torch.random.fork_rng([few.x.device] if few.x.is_cuda else []):
            return few, teacher.answer(few.x, Question(ids=few.ids)).outputs
    except (InputError, UnsupportedError):
        return None


def check_teacher_again(state: State) -> None:
    """Compares what the teacher says of the first samples with what it said before the first step, once.

    Raises:
        UnsupportedError: It says something else.
    """
    if state.teacher_outputs is None or state.step < _LATER:
        return
    (few, before), state.teacher_outputs = state.teacher_outputs, None
    now = _teacher_outputs(state.objective, few)
    if now is not None and not torch.allclose(now[1], before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        it = FAULTS["teacher-changes"]
        raise UnsupportedError(f"After {state.step} steps: [{it.code}] {it.what} Remedy: {it.way_out}")


def agree(state: State) -> None:
    """Compares weights and gradients of all processes in the first step, and the teacher with itself once later.

    Raises:
        UnsupportedError: They differ.
    """
    if not state.settings.doctor:
        return
    check_teacher_again(state)
    if state.step:
        return
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    trained = [p for p in state.objective.parameters() if p.requires_grad]
    tensors = [each for p in trained for each in (p.detach(), p.grad) if each is not None]
    whole = [each for each in tensors if not hasattr(each, "full_tensor")]  # FSDP deals them out
    sums = torch.stack([part for each in whole for part in (each.double().sum(), each.double().square().sum())])
    sums = sums.nan_to_num()
    lowest, highest = sums.clone(), sums.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    if not bool((highest - lowest <= 1e-5 * torch.maximum(highest.abs(), lowest.abs()) + 1e-12).all()):
        it = FAULTS["ranks-differ"]
        raise UnsupportedError(f"After the first backward: [{it.code}] {it.what} Way out: {it.way_out}")


def _of_derivatives(objective: Any, batch: Batch) -> list[Finding]:
    """What is wrong with the products that the terms are made of: the student's and the teacher's, as they are used."""
    weights = getattr(getattr(objective, "balance", None), "weights", {})
    student = getattr(objective, "student", None)
    slopes = getattr(objective, "slopes", objective)
    probe = getattr(slopes, "probe", None)
    if not any(weights.get(name) for name in ("jacobians", "penalty")) or not isinstance(student, nn.Module):
        return []
    if getattr(probe, "step", None) is not None:
        return []  # values alone
    by_output = getattr(probe, "side", "output") == "output"
    function = replace(plain(student), batch_norm=getattr(slopes, "batch_norm", "batch"))
    findings = _of_function(function, batch.x, "vjp" if by_output else getattr(slopes, "engine", "auto"))
    teacher = getattr(objective, "teacher", None)
    if teacher is not None and weights.get("jacobians"):
        with torch.no_grad():
            seen = _of_teacher(teacher, batch, by_output=by_output)
        findings += [
            fault("teacher-derivatives", f"The teacher's derivatives: {each.what}", each.way_out) for each in seen
        ]
    return findings


def _of_function(function: Function, x: Tensor, product: str) -> list[Finding]:
    """Faults of vᵀJ, or of Jv by an engine; of `auto` where it has none that is right."""
    with set_aside(x):
        try:
            comparison = comparison_of(function, x)
            verdicts = [comparison.verdict(name) for name in (PUSHES if product == "auto" else (product,))]
        except Exception:  # what cannot be compared raises its own error in the first step
            return []
    if any(each.is_right for each in verdicts):
        return []
    return [each for each in verdicts[0].findings if each.severity == "fault" and each.code in _OF_DERIVATIVES]


def _of_teacher(teacher: Any, batch: Batch, *, by_output: bool) -> list[Finding]:
    if isinstance(teacher, RememberedTeacher):
        return _of_teacher(teacher.teacher, batch, by_output=by_output)
    if isinstance(teacher, EnsembleTeacher):
        return [each for one in teacher.teachers for each in _of_teacher(one, batch, by_output=by_output)]
    if isinstance(teacher, ModuleTeacher):
        like = next((p for p in teacher.module.parameters() if p.is_floating_point()), batch.x)
        x = batch.x.to(like.dtype)
        return _of_function(plain(teacher.module), x, "vjp" if by_output else "auto")
    try:
        error = _error_of_answers(teacher, batch.x, by_output=by_output)
    except (InputError, UnsupportedError):
        return []  # one that knows the data only
    if error is None or error <= _LOOSE:
        return []
    what = f"the products that it gives are {error:.0%} away from differences of its own outputs."
    return [fault("teacher-derivatives", what, "Compare its Jacobian with differences at a few points, and mend it.")]


def _error_of_answers(teacher: Teacher, x: Tensor, *, by_output: bool) -> float | None:
    """How far a teacher's own products are from differences of its outputs; None where these are too rough."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator).to(x)
    jv, error = along(lambda t: teacher.answer(x + t * v, Question()).outputs, False, x.dtype)
    if error > _SURE:
        return None
    if not by_output:
        products = teacher.answer(x, Question(tangents=v[None])).products
        return None if products is None else relative_difference(products[0], jv)
    u = torch.randn(jv.shape, generator=generator).to(jv)
    products = teacher.answer(x, Question(cotangents=u[None])).products
    if products is None:
        return None
    parts = (jv * u).flatten(1).sum(1)
    return relative_difference((products[0] * v).flatten(1).sum(1), parts) if parts.any() else None


def _of_student(objective: nn.Module, batch: Batch) -> list[str]:
    """What the student keeps from call to call, and what it does in evaluation mode that it must not do."""
    student = getattr(objective, "student", None)
    if not isinstance(student, nn.Module):
        return []
    set_mode(student, training=False)
    stale = ["keeps-results"] * is_stale(student, batch.x)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    try:
        with torch.no_grad():
            outputs = []
            for seed in range(2):
                torch.manual_seed(seed)
                state = torch.get_rng_state()
                outputs.append(outputs_of(student, batch.x)[0])
        written = any(not torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())
        drawn = not torch.equal(state, torch.get_rng_state()) and not torch.allclose(outputs[0], outputs[1], 1e-3, 1e-6)
    finally:
        with torch.no_grad():
            for name, buffer in student.named_buffers():
                buffer.copy_(before[name])
    return stale + ["writes-in-evaluation"] * written + ["random-in-evaluation"] * drawn


def _not_compiled(objective: nn.Module, batch: Batch, progress: float) -> list[str]:
    """Compiles the first graph where steps are to be compiled, and counts it."""
    compiled, every = getattr(objective, "compiled", None), getattr(objective, "every", 1)
    if compiled is None or compiled.fallback is not None or not isinstance(objective, Objective):
        return []
    if objective.measure_every <= every:  # no step is compiled: each one that has all terms measures
        return []
    with objective.unmeasured_calls(), preserved_buffers(objective):
        Rehearsal(objective, batch, progress, exact=False).terms(calls=every)
    return [] if compiled.graph.graphs or compiled.fallback is not None else ["not-compiled"]


def _seen(trial: Rehearsal) -> tuple[list[Finding], dict[str, float | None]]:
    """The faults, and the error of the gradient of each term."""
    first = trial.first
    for name, value in first.items():
        if not math.isfinite(value):  # NaN differs from itself: what draws numbers is not the question
            raise NotFinite(Bad(1, f"the term `{name}`", value), "Look at the network's outputs for these samples.")
    codes = list(getattr(getattr(trial.objective, "teacher", None), "faults", ()))
    if not _same(first, trial.numbers(), trial.exact):
        return [FAULTS[code] for code in (*codes, "non-deterministic")], {}
    with preserved_buffers(trial.objective):
        terms = trial.terms()
        whole = {name: float(value.detach()) for name, value in trial.weighted.items()}
        codes += ["unregistered"] * _strangers(trial, list(terms.values()))
        gradients = {name: parameter_gradients(value, trial.parameters) for name, value in terms.items()}
    loss = whole.pop("loss")
    codes += ["not-a-sum"] * bool(whole and not _same({"loss": loss}, {"loss": sum(whole.values())}, exact=False))
    if not trial.draws and getattr(trial.objective, "fraction", 1) == 1:
        rows = torch.arange(len(trial.batch.x), device=trial.batch.x.device)
        twice = trial.numbers(rows_of(trial.batch, torch.cat([rows, rows])))
        codes += ["not-a-mean"] * (not _same(first, twice, exact=False))
    found = [FAULTS[code] for code in codes]
    errors: dict[str, float | None] = {}
    for name, (error, wrong) in errors_of(trial, gradients).items():
        errors[name] = error
        if wrong:
            missing = "has no gradient" if all(g is None for g in gradients[name]) else f"is off by {error:.0%}"
            what = f"The gradient of the term `{name}` {missing} from differences of the term itself."
            way_out = "Look for what is detached, kept from an earlier call, or taken twice where once is allowed."
            found.append(fault("wrong-gradient", what, way_out))
    return found, errors


def _same(first: dict[str, float], second: dict[str, float], exact: bool) -> bool:
    most = 1e-6 if exact else 2e-3
    if first.keys() != second.keys():
        return False
    return all(math.isclose(value, second[name], rel_tol=most, abs_tol=1e-6 * most) for name, value in first.items())


def _strangers(trial: Rehearsal, terms: list[Tensor]) -> bool:
    """Whether the graph ends in parameters of which the objective does not know."""
    known = {id(p) for p in trial.objective.parameters()}
    nodes, seen = [term.grad_fn for term in terms], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            return True
        nodes += [following for following, _ in node.next_functions]
    loose = (each for module in trial.objective.modules() for each in vars(module).values())
    return any(isinstance(each, Tensor) and each.is_leaf and each.requires_grad for each in loose)
