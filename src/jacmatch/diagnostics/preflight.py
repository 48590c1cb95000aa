"""The pre-flight check: before its first step, an objective is compared with its own definition.

The gradient that the optimizer will get is compared, term by term, with central differences of the objective in random
directions of the parameters, on a few samples and in float64 where a copy can be made. It also checks that the same
batch gives the same terms twice, that the terms are means over the batch and add up to the loss, that the teacher is
constant and its derivatives are right, and that all trained tensors are registered parameters. The check does not
change the training: its results are the same bit for bit.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.diagnostics import isolation
from jacmatch.diagnostics.doctor import Diagnosis, doctor
from jacmatch.diagnostics.isolation import AnyBatch, Batch, IsolatedObjective, ReplayedTeacher, rows_of
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import run
from jacmatch.jacobian.callables import preserved_buffers, preserved_generators, seed_generators
from jacmatch.jacobian.engine_checks import is_small
from jacmatch.jacobian.engines import JVP_ENGINES, graph_leaves, parameter_gradients
from jacmatch.jacobian.findings import PREFLIGHT, Finding, fault
from jacmatch.jacobian.finite_differences import derivative_along, plain, relative_difference
from jacmatch.jacobian.function import Function
from jacmatch.jacobian.modules import in_mode
from jacmatch.jacobian.verification import comparison_of, isolated, unverified
from jacmatch.objectives.base import Objective, networks_of
from jacmatch.teachers import EnsembleTeacher, MemoizedTeacher, ModuleTeacher, Question, Teacher

FILE = "doctor.json"
"""The file of a run folder with the report."""

SAMPLES, _SAMPLES_OF_LARGE = 8, 2
"""Samples that are used, and those for a large network."""

_OF_DERIVATIVES = (
    *("detached", "partly-detached", "once-differentiable", "wrong-gradient", "detached-parameters", "engine-fails"),
    *("untrainable", "reverse-zero", "forward-zero", "forward-incomplete", "nan-derivative", "other-outputs"),
)
_LOOSE, _SURE = 0.3, 0.05
"""Error above which a teacher's own products are wrong, and error of differences up to which these are used."""


@dataclass(frozen=True)
class PreflightReport:
    """The result of `preflight_check`.

    Attributes:
        findings: Faults; empty if there is none.
        errors: Relative error of the gradient of each term; None where no difference is exact enough.
        exact: Whether gradients were compared in float64.
        seconds: Duration.
        not_finite: Name and value of a term that is NaN or infinite; nothing else is checked then.
    """

    findings: tuple[Finding, ...]
    errors: dict[str, float | None]
    exact: bool
    seconds: float
    not_finite: tuple[str, float] | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.findings

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or "no fault found"


def preflight_check(objective: nn.Module, batch: Batch, *, progress: float = 0.0) -> PreflightReport:
    """Check an objective in its first step on this batch; the objective is left unchanged.

    Args:
        objective: As for `jacmatch.training.fit`.
        batch: Its first samples are used.
        progress: Fraction of the training that is done, from 0 to 1.

    Raises:
        UnsupportedError: The objective itself raises it.

    Example:
        >>> from jacmatch.objectives import Distillation
        >>> from jacmatch.training.data import Batch
        >>> batch = Batch(torch.rand(8, 3), torch.arange(8) % 2, torch.arange(8), 0)
        >>> preflight_check(Distillation(nn.Linear(3, 2)), batch).findings
        ()
    """
    start = time.perf_counter()

    def elapsed() -> float:
        return time.perf_counter() - start

    if any(type(module).__name__ == "OptimizedModule" for module in objective.modules()):
        return PreflightReport((PREFLIGHT["compiled-student"],), {}, False, elapsed())
    device = batch.x.device
    samples = SAMPLES if is_small(objective) else _SAMPLES_OF_LARGE
    few = rows_of(batch, torch.arange(min(samples, len(batch.x)), device=device))
    with (
        preserved_generators(device),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        unverified(),  # faults are reported here, by name
    ):
        codes = _of_student(objective, few)
        # the shares of a large network take as long to measure as the gradients that are compared
        large = objective if isinstance(objective, Objective) and not is_small(objective) else None
        with in_mode(objective, training=True), nullcontext() if large is None else large.unmeasured_calls():
            derivatives = _of_derivatives(objective, few)
            copied = isolation.float64_copy(objective, few, progress)
            exact = copied is not None
            context = isolation.isolated_in_place(objective, few, progress) if copied is None else nullcontext(copied)
            with context as isolated:
                for name, value in isolated.first.numbers.items():
                    if not math.isfinite(value):  # NaN differs from itself, also without random numbers
                        return PreflightReport((), {}, exact, elapsed(), (name, value))
                findings, errors = _of_terms(isolated)
            codes += _of_compilation(objective, batch, progress)
    every = tuple(dict.fromkeys((*(PREFLIGHT[code] for code in codes), *findings, *derivatives)))
    return PreflightReport(every, errors, exact, elapsed())


def raise_for_faults(report: PreflightReport, objective: nn.Module, batch: Batch) -> None:
    """Raise an error with the faults; if a gradient is wrong, also with the faults that `doctor` finds in the student.

    Raises:
        UnsupportedError: There is a fault.
    """
    if report.ok:
        return
    findings = list(report.findings)
    student, _ = networks_of(objective)
    if isinstance(student, nn.Module) and any(each.code == "wrong-gradient" for each in findings):
        findings += [each for each in doctor(student, batch.x[:SAMPLES]).findings if each.severity == "fault"]
    lines = " ".join(map(str, dict.fromkeys(findings)))
    raise UnsupportedError(f"Before the first step: {lines} To train anyway: doctor=False, or --no-doctor.")


def report(result: Diagnosis | PreflightReport) -> dict[str, Any]:
    """Return the document of a result, ready for JSON.

    The fields `ok`, `findings` and `says` are always present. A `Diagnosis` adds `engine` and `engines`, a
    `PreflightReport` adds `errors` and `exact`.

    Example:
        >>> report(Diagnosis("reverse", (), {"reverse": "right"}))["ok"]
        True
    """
    findings = [{**vars(each), "way_out": each.remedy} for each in result.findings]  # the former name of `remedy`
    document = {"ok": result.ok, "findings": findings, "says": str(result)}
    if isinstance(result, Diagnosis):
        return {**document, "engine": result.engine, "engines": result.engines}
    return {**document, "errors": result.errors, "exact": result.exact}


def teacher_outputs(objective: nn.Module, batch: AnyBatch) -> tuple[AnyBatch, Tensor] | None:
    """Return a few samples and the teacher's outputs for them, to be compared later; None where there are none."""
    _, teacher = networks_of(objective)
    teacher = teacher.teacher if isinstance(teacher, MemoizedTeacher) else teacher
    few = rows_of(batch, torch.arange(min(SAMPLES, len(batch.x)), device=batch.x.device))
    if teacher is None:
        return None
    try:
        with torch.no_grad(), preserved_generators(few.x.device):
            return few, teacher.answer(few.x, Question(ids=few.ids)).outputs
    except (InputError, UnsupportedError):
        return None


def _of_student(objective: nn.Module, batch: Batch) -> list[str]:
    """Return codes of the student's changes from call to call, and of what it must not do in evaluation mode."""
    student, _ = networks_of(objective)
    if not isinstance(student, nn.Module):
        return []
    selected = objective.selected_outputs() if isinstance(objective, Objective) else nullcontext()
    with selected, in_mode(student, training=False), torch.no_grad():
        stale = isolation.keeps_results(student, batch.x)
        before = {name: buffer.clone() for name, buffer in student.named_buffers()}
        with preserved_buffers(student):
            outputs = []
            for seed in range(2):
                seed_generators(seed, batch.x.device, of_torch=True)
                state = torch.get_rng_state()
                outputs.append(run(student, batch.x)[0])
                if torch.equal(state, torch.get_rng_state()):
                    break
            written = any(not torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())
        drawn = len(outputs) == 2 and not torch.allclose(outputs[0], outputs[1], 1e-3, 1e-6)
    return ["keeps-results"] * stale + ["writes-in-evaluation"] * written + ["random-in-evaluation"] * drawn


def _of_derivatives(objective: Any, batch: Batch) -> list[Finding]:
    """Return what is wrong with the products that the terms use: the student's and the teacher's."""
    if not isinstance(objective, Objective) or (engine := objective.resolved_engine()) is None:
        return []
    how = objective.differentiation
    if how.step is not None:
        return []  # values alone
    by_output = how.side == "output"
    function = replace(plain(objective.student), batch_norm=how.batch_norm)
    # the parameter gradient is that of the term, which is compared with differences below
    with objective.selected_outputs(), torch.set_grad_enabled(is_small(objective.student)):
        findings = _of_function(function, batch.x, "vjp" if by_output else engine)
    teacher, weights = objective.teacher, objective.loss_weights.weights
    if teacher is not None and weights.get("jacobians"):
        with torch.no_grad():
            of_teacher = _of_teacher(teacher, batch, by_output=by_output)
        findings += [
            fault("teacher-derivatives", f"The teacher's derivatives: {each.what}", each.remedy) for each in of_teacher
        ]
    return findings


def _of_function(function: Function, x: Tensor, product: str) -> list[Finding]:
    """Return the faults of vᵀJ, or of Jv by an engine; of `auto` where no engine is right."""
    with isolated(x):
        try:
            comparison = comparison_of(function, x)
            verdicts = [comparison.verdict(name) for name in (JVP_ENGINES if product == "auto" else (product,))]
        except Exception:  # what cannot be compared raises its own error in the first step
            return []
    if any(each.is_right for each in verdicts):
        return []
    return [each for each in verdicts[0].findings if each.severity == "fault" and each.code in _OF_DERIVATIVES]


def _of_teacher(teacher: Any, batch: Batch, *, by_output: bool) -> list[Finding]:
    if isinstance(teacher, MemoizedTeacher):
        return _of_teacher(teacher.teacher, batch, by_output=by_output)
    if isinstance(teacher, EnsembleTeacher):
        return [each for one in teacher.teachers for each in _of_teacher(one, batch, by_output=by_output)]
    if isinstance(teacher, ModuleTeacher):
        like = next((p for p in teacher.module.parameters() if p.is_floating_point()), batch.x)
        x = batch.x.to(like.dtype)
        return _of_function(plain(teacher.module), x, "vjp" if by_output else "auto")
    try:
        error = _error_of_products(teacher, batch.x, by_output=by_output)
    except (InputError, UnsupportedError):
        return []  # a cached teacher, which knows the inputs of its data only
    if error is None or error <= _LOOSE:
        return []
    what = f"its products differ by {error:.0%} from differences of its outputs."
    return [
        fault("teacher-derivatives", what, "Compare its Jacobian with differences at a few points, and correct it.")
    ]


def _error_of_products(teacher: Teacher, x: Tensor, *, by_output: bool) -> float | None:
    """Return the relative error of a teacher's own products; None where differences of its outputs are too rough."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, device="cpu").to(x)
    jv, error = derivative_along(lambda t: teacher.answer(x + t * v, Question()).outputs, False, x.dtype)
    if error > _SURE:
        return None
    if not by_output:
        products = teacher.answer(x, Question(tangents=v[None])).products
        return None if products is None else relative_difference(products[0], jv)
    u = torch.randn(jv.shape, generator=generator, device="cpu").to(jv)
    products = teacher.answer(x, Question(cotangents=u[None])).products
    if products is None:
        return None
    parts = (jv * u).flatten(1).sum(1)
    return relative_difference((products[0] * v).flatten(1).sum(1), parts) if parts.any() else None


def _of_compilation(objective: nn.Module, batch: Batch, progress: float) -> list[str]:
    """Compile the first graph where steps are to be compiled, and return a code if there is none."""
    if not isinstance(objective, Objective):
        return []
    compiled, every = objective.compiled, objective.every
    if compiled is None or compiled.fallback is not None:
        return []
    if objective.measure_every <= every:  # no step is compiled: each one that has all terms measures
        return []
    with objective.unmeasured_calls(), preserved_buffers(objective):
        IsolatedObjective(objective, batch, progress, exact=False).terms(calls=every)
    return [] if compiled.graph.graphs or compiled.fallback is not None else ["not-compiled"]


def _of_terms(isolated: IsolatedObjective) -> tuple[list[Finding], dict[str, float | None]]:
    """Return the faults, and the error of the gradient of each term."""
    terms, weighted = isolated.first.terms, dict(isolated.first.weighted)
    teacher = networks_of(isolated.objective)[1]
    codes = list(teacher.faults) if isinstance(teacher, ReplayedTeacher) else []
    changes = _change_when_repeated(isolated)
    if changes == "non-deterministic":
        return [PREFLIGHT[code] for code in (*codes, changes)], {}
    codes += ["unregistered"] * _has_unregistered(isolated.objective, list(terms.values()))
    loss = weighted.pop("loss")
    codes += ["not-a-sum"] * bool(weighted and not _same({"loss": loss}, {"loss": sum(weighted.values())}, exact=False))
    codes += [changes] * bool(changes)
    gradients = {name: parameter_gradients(value, isolated.parameters) for name, value in terms.items()}
    findings = [PREFLIGHT[code] for code in codes]
    errors: dict[str, float | None] = {}
    for name, (error, wrong) in isolation.gradient_errors(isolated, gradients).items():
        errors[name] = error
        if wrong:
            missing = "has no gradient" if all(g is None for g in gradients[name]) else f"is off by {error:.0%}"
            what = f"The gradient of the term `{name}` {missing} from differences of the term itself."
            remedy = (
                "Look for detached results, results of an earlier call, and operations without a second derivative."
            )
            findings.append(fault("wrong-gradient", what, remedy))
    return findings, errors


def _change_when_repeated(isolated: IsolatedObjective) -> str:
    """Return the code of terms that differ in a second call with each sample twice; "" if none does."""
    first = isolated.first.numbers
    objective = isolated.objective
    parts = isinstance(objective, Objective) and objective.differentiation.fraction < 1
    if not isolated.draws and not parts:
        rows = torch.arange(len(isolated.batch.x), device=isolated.batch.x.device)
        twice = isolated.numbers(rows_of(isolated.batch, torch.cat([rows, rows])))
        if _same(first, twice, isolated.exact):
            return ""
    else:
        twice = first
    if not _same(first, isolated.numbers(), isolated.exact):
        return "non-deterministic"
    return "" if _same(first, twice, exact=False) else "not-a-mean"


def _same(first: dict[str, float], second: dict[str, float], exact: bool) -> bool:
    most = 1e-6 if exact else 2e-3
    if first.keys() != second.keys():
        return False
    return all(math.isclose(value, second[name], rel_tol=most, abs_tol=1e-6 * most) for name, value in first.items())


def _has_unregistered(objective: nn.Module, terms: list[Tensor]) -> bool:
    """Return whether the graph ends in parameters that are not registered with the objective."""
    known = {id(p) for p in objective.parameters()}
    if any(isinstance(leaf, nn.Parameter) and id(leaf) not in known for leaf in graph_leaves(*terms)):
        return True
    loose = (each for module in objective.modules() for each in vars(module).values())
    return any(isinstance(each, Tensor) and each.is_leaf and each.requires_grad for each in loose)
