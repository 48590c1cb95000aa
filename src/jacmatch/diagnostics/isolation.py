"""Side-effect-free evaluation of an objective: any number of calls from one state, which is then restored."""

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import run
from jacmatch.jacobian.callables import preserved_buffers, seed_generators
from jacmatch.jacobian.engine_checks import along, is_small, random_moves
from jacmatch.jacobian.finite_differences import derivative_along, tolerance_for
from jacmatch.objectives.base import Objective, networks_of
from jacmatch.teachers import Answer, MemoizedTeacher, Question, Teacher

_CLOSE = 2e-3  # relative error up to which a gradient is right without further differences
_LOOSE = 0.3  # relative error above which a gradient is wrong where there is no copy in float64
_TENSORS = ("outputs", "values", "products", "cotangents")


@runtime_checkable
class Batch(Protocol):
    """The batch of a check: a dataclass of tensors with one entry for each sample."""

    @property
    def x(self) -> Tensor:
        """Inputs."""

    @property
    def y(self) -> Tensor:
        """Classes or targets."""

    @property
    def ids(self) -> Tensor:
        """Row numbers in the training split."""

    def keywords(self) -> dict[str, Any]:
        """Further arguments of the objective, by name."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class ReplayedTeacher:
    """A teacher that repeats its answers in each call of an objective, and lists what is wrong with them.

    Args:
        teacher: The teacher; a `MemoizedTeacher` is bypassed, so that nothing is added to its memory.
        dtype: The type of the inputs in training.

    Attributes:
        turn: Number of the next query of this call; set it to 0 before each call of the objective.
        faults: Codes of what is wrong.
    """

    def __init__(self, teacher: Teacher, dtype: torch.dtype) -> None:
        self.teacher = teacher.teacher if isinstance(teacher, MemoizedTeacher) else teacher
        self.dtype, self.turn = dtype, 0
        self.faults: list[str] = []
        self._answers: dict[Hashable, Answer] = {}

    @property
    def answers_vjp(self) -> bool:
        """As for the wrapped teacher."""
        return self.teacher.answers_vjp

    def answer(self, x: Tensor, question: Question) -> Answer:
        """Return the answer in the type of x."""
        # the first call of an objective may have one more query, as for the sizes of maps
        kind = (question.layers, question.cotangents is None, question.tangents is None)
        key, self.turn = (len(x), self.turn, kind), self.turn + 1
        if key not in self._answers:
            tangents = None if question.tangents is None else question.tangents.to(self.dtype)
            query = replace(question, tangents=tangents)
            answer = self.teacher.answer(x.to(self.dtype), query)
            if not self._answers:
                self._check(x.to(self.dtype), query, answer)
            changes = {name: getattr(answer, name) for name in _TENSORS}
            changes = {name: value.detach().to(x.dtype) for name, value in changes.items() if value is not None}
            features = {name: value.detach().to(x.dtype) for name, value in answer.features.items()}
            self._answers[key] = replace(answer, **changes, features=features)
        return self._answers[key]

    def _check(self, x: Tensor, question: Question, answer: Answer) -> None:
        if answer.outputs.requires_grad:
            self.faults.append("teacher-with-gradient")
        again = self.teacher.answer(x, question)
        if not torch.allclose(answer.outputs, again.outputs, rtol=1e-3, atol=1e-5):
            self.faults.append("teacher-changes")
            return
        try:  # a cached teacher knows the inputs of its data only
            alone = self.teacher.answer(x[:1].expand_as(x).clone(), Question()).outputs[:1].detach()
        except (InputError, UnsupportedError):
            return
        if not torch.allclose(answer.outputs[:1].detach(), alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
            self.faults.append("teacher-couples")


class First(NamedTuple):
    """The terms of a first call."""

    terms: dict[str, Tensor]  # before weighting, with their graph
    numbers: dict[str, float]  # the same as numbers
    weighted: dict[str, float]  # with their weights, as numbers


class IsolatedObjective:
    """An objective and a batch; each call starts from the state at construction.

    Attributes:
        objective: The objective, or its copy in float64.
        exact: Whether it is that copy.
        parameters: What is trained.
        draws: Whether a call drew random numbers of torch.
    """

    def __init__(self, objective: nn.Module, batch: Batch, progress: float, *, exact: bool) -> None:
        self.objective: Any = objective
        self.batch, self.progress, self.exact = batch, progress, exact
        self.parameters: list[Tensor] = [p for p in objective.parameters() if p.requires_grad]
        self.draws, self._weighted = False, dict[str, Tensor]()
        self._state = _extra_state(objective)

    @cached_property
    def first(self) -> First:
        """The terms of the first call."""
        with preserved_buffers(self.objective):
            terms = self.terms()
        return First(terms, _numbers(terms), _numbers(self._weighted))

    def terms(self, batch: Batch | None = None, *, calls: int | None = None) -> dict[str, Tensor]:
        """Return the terms before weighting, with their graph; `calls` replaces the number of calls before."""
        batch = batch or self.batch
        if self._state is not None:
            self.objective.set_extra_state(copy.deepcopy(self._state))
        if calls is not None:
            self.objective.calls = calls
        teacher = networks_of(self.objective)[1]
        if isinstance(teacher, ReplayedTeacher):
            teacher.turn = 0
        seed_generators(0, batch.x.device, of_torch=True)
        before = torch.get_rng_state()
        result = self.objective(batch.x, batch.y, **batch.keywords(), progress=self.progress)
        self.draws = self.draws or not torch.equal(before, torch.get_rng_state())
        self._weighted = result.values
        parts = {name: value for name, value in result.values.items() if name != "loss"}
        return result.unweighted or parts or {"loss": result.values["loss"]}

    def numbers(self, batch: Batch | None = None) -> dict[str, float]:
        """Return the terms as numbers."""
        with torch.no_grad(), preserved_buffers(self.objective):
            return _numbers(self.terms(batch))


def _numbers(terms: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in terms.items()}


def float64_copy(objective: nn.Module, batch: Batch, progress: float) -> IsolatedObjective | None:
    """Return a copy in float64 whose zero weights are moved off kinks; None if no copy is possible."""
    teacher = networks_of(objective)[1]
    compiled = objective.compiled if isinstance(objective, Objective) else None
    try:
        shared = {id(each): each for each in (teacher, compiled) if each is not None}
        copied: Any = copy.deepcopy(objective, shared).double()
        if compiled is not None:
            copied.compiled = None
        if teacher is not None:
            object.__setattr__(copied, "teacher", ReplayedTeacher(teacher, batch.x.dtype))
        exact = _changed(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        isolated = IsolatedObjective(copied, exact, progress, exact=True)
        _move_randomly(copied)
        return isolated if isolated.first.terms else None
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return None  # it cannot be copied, or contains float32, or is wrong: the objective itself will show that


@contextmanager
def isolated_in_place(objective: Any, batch: Batch, progress: float) -> Iterator[IsolatedObjective]:
    """Evaluate the objective itself within the context, and restore its state afterwards."""
    state, teacher, compiled = _extra_state(objective), networks_of(objective)[1], None
    if teacher is not None:
        object.__setattr__(objective, "teacher", ReplayedTeacher(teacher, batch.x.dtype))
    if isinstance(objective, Objective):
        compiled, objective.compiled = objective.compiled, None
    try:
        yield IsolatedObjective(objective, batch, progress, exact=False)
    finally:
        if state is not None:
            objective.set_extra_state(state)
        if teacher is not None:
            object.__setattr__(objective, "teacher", teacher)
        if isinstance(objective, Objective):
            objective.compiled = compiled


def keeps_results(student: nn.Module, x: Tensor) -> bool:
    """Return whether a network that was called before its parameters moved differs from one that was not."""
    try:
        fresh, called = copy.deepcopy(student), copy.deepcopy(student)
    except (RuntimeError, TypeError):
        return False
    with torch.no_grad():
        run(called, x)
        _move_randomly(fresh, called)
        seed_generators(0, x.device, of_torch=True)
        first = run(fresh, x)[0]
        seed_generators(0, x.device, of_torch=True)
        second = run(called, x)[0]
        if torch.allclose(first, second, 1e-3, 1e-6):
            return False
        seed_generators(0, x.device, of_torch=True)
        again = run(fresh, x)[0]
    return torch.allclose(first, again, 1e-3, 1e-6)  # what changes from call to call is another fault


def gradient_errors(
    isolated: IsolatedObjective, gradients: dict[str, list[Tensor | None]]
) -> dict[str, tuple[float | None, bool]]:
    """Return the largest relative error of the gradient of each term, and whether it is a fault.

    The error is None where no difference is exact enough.
    """
    generator = torch.Generator().manual_seed(1)
    lines = [_Line(isolated, generator) for _ in range(2 if is_small(isolated.objective) else 1)]
    result: dict[str, tuple[float | None, bool]] = {}
    for name, each in gradients.items():
        errors = [error for line in lines if (error := line.error(name, each)) is not None]
        result[name] = (max((e for e, _ in errors), default=None), any(wrong for _, wrong in errors))
    return result


class _Line:
    """The terms along a random direction of the parameters."""

    def __init__(self, isolated: IsolatedObjective, generator: torch.Generator) -> None:
        self.isolated = isolated
        self.moves = random_moves(isolated.parameters, generator)
        self.numbers_at = along(self.moves, isolated.parameters, isolated.numbers)
        self.known = {0.0: isolated.first.numbers}

    def error(self, name: str, gradients: list[Tensor | None]) -> tuple[float, bool] | None:
        """Return the relative error of the gradient of a term, and whether that is a fault; None if unknown."""

        def at(step: float) -> Tensor:
            if step not in self.known:
                self.known[step] = self.numbers_at(step)
            return torch.tensor(self.known[step][name], dtype=torch.float64)

        parts = [(g.detach() * m).double() for g, m in zip(gradients, self.moves, strict=True) if g is not None]
        gradient, exact = sum(float(part.sum()) for part in parts), self.isolated.exact
        dtype = self.isolated.batch.x.dtype
        difference, uncertainty = derivative_along(at, exact, dtype, gradient, here=at(0.0), close=_CLOSE)
        truth, here = float(difference), at(0.0)
        constant = truth == 0 and bool(at(1e-2) == here) and bool(at(-1e-2) == here)
        allowed = 0.0 if constant else tolerance_for(uncertainty, exact)
        if math.isinf(allowed):
            return None
        whole = max(abs(truth), abs(gradient), math.hypot(*(float(part.norm()) for part in parts)), 1e-30)
        error = abs(gradient - truth) / whole if whole > 1e-12 * abs(float(here)) + 1e-30 else 0.0
        if error <= (allowed if exact else max(allowed, _LOOSE)):
            return error, False
        if constant or not exact:
            return error, True
        return (error, True) if _steps_agree(at, gradient, max(allowed * whole, 0.2 * error * whole)) else None


def _steps_agree(at: Callable[[float], Tensor], gradient: float, least: float) -> bool:
    """Return whether differences by very different steps, on either side, agree on another gradient."""
    here = at(0.0)
    differences = [float((at(h) - here) / h) for step in (1e-11, 1e-10, 1e-9, 1e-8) for h in (step, -step)]
    distances = [difference - gradient for difference in differences]
    nearest, spread = min(map(abs, distances)), max(differences) - min(differences)
    return any(differences) and nearest > least and spread <= 0.5 * nearest


def rows_of(batch: AnyBatch, rows: Tensor) -> AnyBatch:
    """Return the batch of these rows."""
    return _changed(batch, lambda tensor: tensor[rows])


def _changed(batch: AnyBatch, change: Callable[[Tensor], Tensor]) -> AnyBatch:
    changes: Any = {name: change(each) for name, each in vars(batch).items() if isinstance(each, Tensor)}
    changed: AnyBatch = replace(batch, **changes)  # type: ignore[type-var]
    return changed


def _extra_state(objective: Any) -> Any:
    """Return what an objective counts and measures from step to step, None if it has no extra state."""
    try:
        return copy.deepcopy(objective.get_extra_state())
    except RuntimeError:  # torch's own method, which is there to be overridden
        return None


def _move_randomly(*networks: nn.Module) -> None:
    """Move the parameters of equal networks by the same twentieth of their size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for equal in zip(*(network.parameters() for network in networks), strict=True):
            (move,) = random_moves([equal[0]], generator)
            for p in equal:
                p.add_(move, alpha=0.05)
