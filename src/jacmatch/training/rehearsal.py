"""An objective that is tried before the training: again and again from one state, and left as it was."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import run as outputs_of
from jacmatch.jacobian.modules import preserved_buffers
from jacmatch.jacobian.references import along, size_of_sum, tolerance_for
from jacmatch.teachers import Answer, Question, RememberedTeacher, Teacher
from jacmatch.training.data import Batch

_MILD = 0.3  # relative error from which a gradient is wrong where float64 cannot be had
_DIRECTIONS = 2
_TENSORS = ("outputs", "values", "products", "cotangents")


class AskedOnce:
    """A teacher that gives the same answers again in each trial, and notes what is wrong with them.

    Args:
        teacher: Who is asked, in the type that training asks in; nothing of it is remembered there.
        dtype: That type.
    """

    def __init__(self, teacher: Teacher, dtype: torch.dtype) -> None:
        self.teacher = teacher.teacher if isinstance(teacher, RememberedTeacher) else teacher
        self.dtype, self.turn = dtype, 0
        self.kept: dict[tuple[int, int], Answer] = {}
        self.faults: list[str] = []

    @property
    def answers_vjp(self) -> bool:
        """As of the teacher."""
        return self.teacher.answers_vjp

    def answer(self, x: Tensor, question: Question) -> Answer:
        """The answer in the type of x."""
        key, self.turn = (len(x), self.turn), self.turn + 1
        if key not in self.kept:
            asked = (
                question if question.tangents is None else replace(question, tangents=question.tangents.to(self.dtype))
            )
            found = self.teacher.answer(x.to(self.dtype), asked)
            if not self.kept:
                self._judge(x.to(self.dtype), asked, found)
            changes = {name: getattr(found, name) for name in _TENSORS}
            changes = {name: value.detach().to(x.dtype) for name, value in changes.items() if value is not None}
            features = {name: value.detach().to(x.dtype) for name, value in found.features.items()}
            self.kept[key] = replace(found, **changes, features=features)
        return self.kept[key]

    def _judge(self, x: Tensor, question: Question, found: Answer) -> None:
        if found.outputs.requires_grad:
            self.faults.append("teacher-with-gradient")
        again = self.teacher.answer(x, question)
        if not torch.allclose(found.outputs, again.outputs, rtol=1e-3, atol=1e-5):
            self.faults.append("teacher-changes")
            return
        try:  # a teacher that has only been asked about the data beforehand knows no other
            alone = self.teacher.answer(x[:1].expand_as(x).clone(), Question()).outputs[:1]
        except (InputError, UnsupportedError):
            return
        if not torch.allclose(found.outputs[:1], alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
            self.faults.append("teacher-couples")


class Rehearsal:
    """An objective and a batch for it.

    Attributes:
        objective: The objective, or its copy in float64.
        exact: Whether it is that copy.
        parameters: What is trained.
        draws: Whether it drew random numbers of torch.
        weighted: The terms of the last trial, with their weights.
    """

    def __init__(self, objective: nn.Module, batch: Batch, progress: float, *, exact: bool) -> None:
        self.objective: Any = objective
        self.batch, self.progress, self.exact = batch, progress, exact
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.draws, self.weighted = False, dict[str, Tensor]()
        self._state, self._first = state_of(objective), dict[str, float]()

    @property
    def first(self) -> dict[str, float]:
        """The terms of the first trial as numbers."""
        if not self._first:
            self._first = self.numbers()
        return self._first

    def terms(self, batch: Batch | None = None, **changes: Any) -> dict[str, Tensor]:
        """The terms before weighting, with their graph; `changes` are of what the objective counts."""
        batch = batch or self.batch
        if self._state is not None:
            self.objective.set_extra_state(copy.deepcopy(self._state) | changes)
        if isinstance(getattr(self.objective, "teacher", None), AskedOnce):
            self.objective.teacher.turn = 0
        torch.manual_seed(0)
        before = torch.get_rng_state()
        found = self.objective(batch.x, batch.y, **batch.keywords(), progress=self.progress)
        self.draws = self.draws or not torch.equal(before, torch.get_rng_state())
        self.weighted = found.values
        parts = {name: value for name, value in found.values.items() if name != "loss"}
        return found.unweighted or parts or {"loss": found.values["loss"]}

    def numbers(self, batch: Batch | None = None) -> dict[str, float]:
        """The terms as numbers."""
        with torch.no_grad(), preserved_buffers(self.objective):
            return {name: float(value) for name, value in self.terms(batch).items()}

    def moved(self, moves: list[Tensor], step: float) -> dict[str, float]:
        """The terms at θ + step · moves."""
        saved = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            try:
                for p, value, move in zip(self.parameters, saved, moves, strict=True):
                    p.copy_(value + step * move)
                return self.numbers()
            finally:
                for p, value in zip(self.parameters, saved, strict=True):
                    p.copy_(value)


def state_of(objective: Any) -> Any:
    """What an objective counts and measures from step to step, None if it says nothing of that."""
    try:
        return copy.deepcopy(objective.get_extra_state())
    except RuntimeError:  # torch's own, which is for others to replace
        return None


def exact(objective: nn.Module, batch: Batch, progress: float) -> Rehearsal | None:
    """A copy in float64, with weights moved off the kinks that zeros lie on; None where there can be none."""
    teacher, compiled = getattr(objective, "teacher", None), getattr(objective, "compiled", None)
    try:
        kept = {id(each): each for each in (teacher, compiled) if each is not None}
        copied: Any = copy.deepcopy(objective, kept).double()
        if compiled is not None:
            copied.compiled = None
        if teacher is not None:
            object.__setattr__(copied, "teacher", AskedOnce(teacher, batch.x.dtype))
        sharp = _each(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        trial, generator = Rehearsal(copied, sharp, progress, exact=True), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in trial.parameters:
                p.add_(0.05 * size(p) * torch.randn(p.shape, generator=generator).to(p))
        return trial if trial.first else None
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return None  # it cannot be copied, or has float32 built in, or is wrong: the objective itself will say


@contextmanager
def borrowed(objective: Any, batch: Batch, progress: float) -> Iterator[Rehearsal]:
    """The objective itself, to be tried in the block; afterwards all is as before."""
    state, teacher, compiled = state_of(objective), getattr(objective, "teacher", None), None
    if teacher is not None:
        object.__setattr__(objective, "teacher", AskedOnce(teacher, batch.x.dtype))
    if hasattr(objective, "compiled"):
        compiled, objective.compiled = objective.compiled, None
    try:
        yield Rehearsal(objective, batch, progress, exact=False)
    finally:
        if state is not None:
            objective.set_extra_state(state)
        if teacher is not None:
            object.__setattr__(objective, "teacher", teacher)
        if hasattr(objective, "compiled"):
            objective.compiled = compiled


def is_stale(student: nn.Module, x: Tensor) -> bool:
    """Whether a network that was called before its parameters moved differs from one that was not."""
    try:
        fresh, called = copy.deepcopy(student), copy.deepcopy(student)
    except (RuntimeError, TypeError):
        return False
    with torch.no_grad():
        outputs_of(called, x)
        for network in (fresh, called):
            generator = torch.Generator().manual_seed(0)
            for p in network.parameters():
                p.add_(0.05 * size(p) * torch.randn(p.shape, generator=generator).to(p))
        found = []
        for network in (fresh, called):
            torch.manual_seed(0)
            found.append(outputs_of(network, x)[0])
        torch.manual_seed(0)
        again = outputs_of(fresh, x)[0]
    # what changes by itself from call to call is another fault
    return torch.allclose(found[0], again, 1e-3, 1e-6) and not torch.allclose(found[0], found[1], 1e-3, 1e-6)


def size(parameter: Tensor) -> Tensor:
    """Root mean square of a parameter, and a little for those that are zero."""
    return parameter.detach().square().mean().sqrt() + 1e-3


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """The batch of these rows."""
    return _each(batch, lambda tensor: tensor[rows])


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    changed: dict[str, Any] = {name: change(each) for name, each in vars(batch).items() if isinstance(each, Tensor)}
    return replace(batch, **changed)


class _Line:
    """The terms along a random direction of the parameters."""

    def __init__(self, trial: Rehearsal, generator: torch.Generator) -> None:
        self.trial = trial
        self.moves = [torch.randn(p.shape, generator=generator).to(p) * size(p) for p in trial.parameters]
        self.known = {0.0: trial.first}

    def error(self, name: str, gradients: list[Tensor | None]) -> tuple[float, bool] | None:
        """Relative error of the gradient of a term, and whether that is a fault; None if nothing can be told."""

        def at(step: float) -> Tensor:
            if step not in self.known:
                self.known[step] = self.trial.moved(self.moves, step)
            return torch.tensor(self.known[step][name], dtype=torch.float64)

        parts = [(g.detach() * m).flatten() for g, m in zip(gradients, self.moves, strict=True) if g is not None]
        products = torch.cat(parts).double() if parts else torch.zeros(1, dtype=torch.float64)
        slope, sharp = float(products.sum()), self.trial.exact
        found, uncertainty = along(at, sharp, self.trial.batch.x.dtype, slope)
        truth, here = float(found), at(0.0)
        still = truth == 0 and bool(at(1e-2) == here) and bool(at(-1e-2) == here)
        allowed = 0.0 if still else tolerance_for(uncertainty, sharp)
        if math.isinf(allowed):
            return None
        whole = max(abs(truth), size_of_sum(products))
        error = abs(slope - truth) / whole if whole > 1e-12 * abs(float(here)) + 1e-30 else 0.0
        if error <= (allowed if sharp else max(allowed, _MILD)):
            return error, False
        if still or not sharp:
            return error, True
        return (error, True) if _settled(at, slope, max(allowed * whole, 0.2 * error * whole)) else None


def _settled(at: Callable[[float], Tensor], slope: float, least: float) -> bool:
    """Whether differences by steps of very different sizes, to either side, agree that the slope is another one.

    They do not where float32 inside loses small moves, at a kink, and where a network is so steep that each step is too
    long: BatchNorm over four equal values multiplies by 300.
    """
    here = at(0.0)
    found = [float((at(h) - here) / h) for step in (1e-11, 1e-10, 1e-9, 1e-8) for h in (step, -step)]
    away = [difference - slope for difference in found]
    spread = max(found) - min(found)
    return any(found) and min(map(abs, away)) > least and spread <= 0.5 * min(map(abs, away))


def errors_of(trial: Rehearsal, gradients: dict[str, list[Tensor | None]]) -> dict[str, tuple[float | None, bool]]:
    """Of each term the largest relative error of its gradient, and whether that is a fault."""
    generator = torch.Generator().manual_seed(1)
    lines = [_Line(trial, generator) for _ in range(_DIRECTIONS)]
    found: dict[str, tuple[float | None, bool]] = {}
    for name, each in gradients.items():
        told = [error for line in lines if (error := line.error(name, each)) is not None]
        found[name] = (max((e for e, _ in told), default=None), any(wrong for _, wrong in told))
    return found
