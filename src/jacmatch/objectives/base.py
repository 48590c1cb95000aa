"""What all objectives share: terms, weights that are given as shares of the gradient, and the state of calls.

The terms of a loss have different scales, and these change while a network learns. A weight given as a share says what
the term is meant to contribute: the share of the norm of the parameter gradient. It is measured from time to time and
the factor in front of the term follows.
"""

import math
import warnings
from collections.abc import Callable, ItemsView, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import gradient_norms
from jacmatch.jacobian.features import Select, selecting
from jacmatch.jacobian.graph import meets_once_differentiable
from jacmatch.jacobian.modules import set_mode
from jacmatch.jacobian.wrappers import check_wrapping
from jacmatch.losses import JacobianLoss
from jacmatch.objectives import rules
from jacmatch.objectives.parts import Part
from jacmatch.objectives.schedules import WeightSchedule
from jacmatch.teachers import Teacher, as_teacher

Output = Select | tuple[Select | None, Select | None] | None
"""What selects the outputs of student and teacher, or a pair of such."""
_FLAT = 1e-6  # what a relative term is divided by where the teacher is flat, in the unit of its squared products
Same = TypeVar("Same", bound="Objective")
Whole = Callable[[str, list[Tensor | None]], list[Tensor | None]]


class Share(float):
    """A weight as share of the gradient norm: 0 ≤ share < 1, share of term j = wⱼ‖∂ℓⱼ/∂θ‖ ÷ Σᵢ wᵢ‖∂ℓᵢ/∂θ‖.

    It is the share in each call that has the term: with `every=4` three of four calls have none of it. A term whose
    share has not been measured yet is not part of the loss.

    Example:
        >>> Share(0.3)
        Share(0.3)
    """

    def __new__(cls, share: float | int) -> "Share":
        """Checks the range."""
        if not 0 <= share < 1:
            raise InputError("A `Share` must be at least 0 and below 1.", got=share)
        return super().__new__(cls, share)

    def __repr__(self) -> str:
        return f"Share({float(self)})"


@dataclass(repr=False)
class Terms:
    """What an objective returns for a batch.

    Attributes:
        values: `loss`, and the weighted terms that add up to it. Means over the batch.
        student_outputs: (B, K), with graph.
        teacher_outputs: (B, K), None where the teacher was not asked.
        unweighted: The terms before weighting.
        shares: Share of each term in the gradient norm when it was last measured; empty before.
        firsts: Over how many samples, the first ones of the whole batch, a term is the mean, where not over all.
    """

    values: dict[str, Tensor]
    student_outputs: Tensor
    teacher_outputs: Tensor | None = None
    unweighted: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The term of this name; zero-weighted terms are not there."""
        if name not in self.values:
            message = f"no term {name!r} in this call, which has {', '.join(self.values)}"
            raise KeyError(f"{message}; its share is not measured yet" if name in self.unweighted else message)
        return self.values[name]

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in self.values.items())
        return f"Terms({numbers})"

    @property
    def loss(self) -> Tensor:
        """The sum of the weighted terms, to call `backward()` on."""
        return self.values["loss"]

    def items(self) -> ItemsView[str, Tensor]:
        """The names with the weighted terms, `loss` first."""
        return self.values.items()

    def keys(self) -> list[str]:
        """The names, `loss` first."""
        return list(self.values)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


class Balance:
    """Turns weights, some of them shares, into factors, and remembers the measured shares.

    Args:
        weights: Weight of each term: a number ≥ 0, or a `Share`.

    Attributes:
        factors: Factor of each term, `every` and schedules left out; a `Share` is not in it before it was measured.
        shares: Share of each term in the gradient norm when it was last measured.
        part: Which part of each batch this process has, where several processes train together.

    Raises:
        InputError: a weight is negative or not finite, or the shares add up to 1 or more.
    """

    def __init__(self, weights: dict[str, float | int]) -> None:
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"The weight of `{name}` must be at least 0 and finite.", got=weight)
        if sum(weight for weight in weights.values() if isinstance(weight, Share)) >= 1:
            raise InputError("The shares of all terms must add up to less than 1.", got=weights)
        self.weights = weights
        self.factors = {name: weight for name, weight in weights.items() if not isinstance(weight, Share)}
        self.shares: dict[str, float] = {}
        self.part: Part | None = None

    @property
    def unmeasured(self) -> set[str]:
        """Terms whose share is still to be measured."""
        return {name for name, weight in self.weights.items() if weight and name not in self.factors}

    def weigh(self, unweighted: Mapping[str, Tensor], times: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Return the weighted terms; one whose share was never measured is left out.

        Args:
            unweighted: The terms.
            times: Further factors, of schedules and of `every`; 1 where nothing is given.
        """
        times = times or {}
        return {
            name: self.factors[name] * times.get(name, 1) * term
            for name, term in unweighted.items()
            if name in self.factors
        }

    def measure(
        self,
        unweighted: dict[str, Tensor],
        parameters: list[nn.Parameter],
        times: Mapping[str, float | int] | None = None,
        firsts: Mapping[str, int] | None = None,
    ) -> bool:
        """Measure the gradient norm of each term, set the factors of those given as shares, and say whether it could.

        With N the total of all weighted norms, the factor of a term with share s and norm n is s N / n. A schedule
        lessens a weight after that; the measured shares have it in them. Norms that are not finite change nothing, and
        a share without a norm stays as it was.

        Args:
            unweighted: The terms.
            parameters: θ.
            times: Further factors of the terms, as of `weigh`.
            firsts: See `Terms`.

        Raises:
            UnsupportedError: a derivative is cut off: a term has no gradient, or not all of it, while its value is
                large enough for one.
        """
        if self.part is not None and not self.part.measured:
            return True
        measured = _norms(unweighted, parameters, self._whole(parameters, firsts or {}))
        norms = {name: float(measured.get(name, 0.0)) for name in unweighted}
        for name in unweighted:  # a gradient that is there and 0 is true: of units that are off for the whole batch
            if name not in measured and _counts(unweighted[name]) and self.weights[name] > 0:
                raise UnsupportedError(
                    f"The term `{name}` has no gradient with respect to the student: something cuts it off (detach, "
                    "no_grad). Ask jacmatch.doctor(student, x)."
                )
        if not all(map(math.isfinite, norms.values())):  # of a bad batch: what was measured before stays
            return False
        times = times or {}
        fixed = sum(
            self.factors[name] * times.get(name, 1) * norm for name, norm in norms.items() if not self._shared(name)
        )
        given = sum(self.weights[name] for name, norm in norms.items() if self._shared(name) and norm > 0)
        total = fixed / (1 - given) if fixed > 0 else 1.0
        for name, norm in norms.items():
            if self._shared(name) and norm > 0:
                self.factors[name] = self.weights[name] * total / norm
        weighted = {name: self.factors.get(name, 0.0) * times.get(name, 1) * norm for name, norm in norms.items()}
        whole = sum(weighted.values())
        self.shares = {name: value / whole if whole > 0 else 0.0 for name, value in weighted.items()}
        return True

    def whole(self, here: int) -> int:
        """Samples of the whole batch, of which so many are here."""
        return here if self.part is None else self.part.samples

    def own(self, first: int) -> int:
        """How many of the first so many samples of the whole batch are here."""
        return first if self.part is None else self.part.own(first)

    def _whole(self, parameters: list[nn.Parameter], firsts: Mapping[str, int]) -> Whole | None:
        """What makes gradients over the whole batch from those over the samples that are here."""
        if (part := self.part) is None:
            return None
        return lambda name, gradients: part.whole(gradients, parameters, firsts.get(name, part.samples))

    def _shared(self, name: str) -> bool:
        return isinstance(self.weights[name], Share)


def _counts(term: Tensor) -> bool:
    """Whether a value is so large that a gradient of 0 is no underflow: the type holds it with digits to spare."""
    numbers = torch.finfo(term.dtype)
    return float(term.detach()) > numbers.tiny / numbers.eps


def _norms(terms: dict[str, Tensor], parameters: list[nn.Parameter], whole: Whole | None) -> dict[str, Tensor]:
    """Gradient norms of terms whose derivatives can all be taken."""
    for name, term in terms.items():
        if meets_once_differentiable(term):
            raise _cut_off(name, "a backward in it is marked once_differentiable")
    try:
        return gradient_norms(terms, parameters, whole)
    except RuntimeError as error:
        if "once_differentiable" not in str(error) and "not implemented" not in str(error):
            raise
        raise _cut_off(", ".join(terms), str(error).strip().splitlines()[0]) from error


def _cut_off(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"The gradient of the term `{name}` cannot be taken: {reason}. Write that backward in torch operations; "
        "jacmatch.doctor(student, x) tells more."
    )


@dataclass
class TeacherNorm:
    """The mean squared norm of the teacher's products, by which a `relative` Jacobian term is divided.

    The ratio of two squared products of one random direction has a heavy tail: where the teacher's product happens to
    be small, it is large without bound, and its mean is not the relative error. The mean squared norm does not depend
    on the directions of a sample, so that the mean over directions is exactly E‖J_S − J_T‖² ÷ E‖J_T‖².

    Attributes:
        mean: Over the samples of all calls that measured it; None before the first.
        calls: How many calls that were.
    """

    mean: float | None = None
    calls: int = 0

    def measured(self, products: Tensor | None, like: Tensor, part: Part | None, *, counts: bool) -> "TeacherNorm":
        """Return it with the products of one more call in it; of all processes where the call counts.

        Args:
            products: (P, B, …) of the teacher; None where none of their samples is here.
            like: A tensor on the device of the batch.
            part: Which part of the batch this is.
            counts: Whether the call measures; otherwise only what is not known yet is taken from it.
        """
        if not counts and self.mean is not None:
            return self
        table = torch.zeros(2, dtype=torch.float64, device=like.device)
        if products is not None:
            norm = products.detach().double().square().sum()
            table = torch.stack([norm, norm.new_tensor(products.shape[1])])
        if counts and part is not None and part.ranks > 1:
            torch.distributed.all_reduce(table)
        here = float(table[0] / table[1].clamp_min(1))
        calls = self.calls + 1
        return TeacherNorm(here if self.mean is None else self.mean + (here - self.mean) / calls, calls)


@dataclass(frozen=True)
class Call:
    """What one call of an objective computes.

    Attributes:
        number: How many calls came before.
        factor: What schedule and `every` leave of the derivative term; 0 where it is not computed.
        measured: Whether the shares are measured.
    """

    number: int
    factor: float
    measured: bool


_NOT_COMPILED = (
    "An objective runs uncompiled: torch.compile cannot follow a derivative of a derivative. To compile whole steps, "
    "use fit(..., Training(compile=True)), or --compile on the command line."
)


class Objective(nn.Module):
    """What all objectives share: a student, a frozen teacher, weights, and the state of calls.

    The state (`calls`, factors, shares) changes only at the end of a call that succeeded with gradients: one that fails
    or runs under `torch.no_grad()` uses up neither a draw nor a measurement of shares. `state_dict` and `parameters`
    are those of the student, and this state; the teacher is not part of the module.

    Args:
        student: The network to train.
        teacher: A teacher or an nn.Module; None where there is none.
        weights: Weight of each term.
        output: Selects the outputs where a network returns more than one tensor; a pair (student's, teacher's).
        every: The derivative term is computed on each n-th call in training, with n times its weight; a
            `Share` is that of such a call.
        schedule: Factor of its weight by data size and progress.
        measure_every: Calls between two measurements of the shares, rounded up to a call that has the term.
    """

    teacher: Teacher | None
    derivative_term: ClassVar[str] = "jacobians"
    jacobian_loss: JacobianLoss = "squared"

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        weights: dict[str, float | int],
        *,
        every: int,
        schedule: WeightSchedule | None,
        measure_every: int,
        output: Output = None,
    ) -> None:
        super().__init__()
        rules.separate(student, teacher)
        self.student = student
        self.output, of_teacher = rules.selections(output, teacher, type(self).__name__)
        # Not a submodule, even where somebody's teacher is an nn.Module.
        object.__setattr__(self, "teacher", None if teacher is None else as_teacher(teacher, of_teacher))
        self.balance = Balance(weights)
        self.every, self.measure_every = every, measure_every
        self.schedule = WeightSchedule() if schedule is None else schedule
        self.calls = 0
        self._wrapping_checked = False
        self.measured_at: int | None = None
        self.teacher_norm = TeacherNorm()

    def __call__(self, *args: Any, **kwargs: Any) -> Terms:
        """The terms for a batch, see `forward`; within `torch.compile` they are computed as without it."""
        if torch.compiler.is_compiling():
            uncompiled: Callable[..., Terms] = torch.compiler.disable(self._terms_of_call)  # type: ignore[no-untyped-call]
            return uncompiled(*args, **kwargs)
        return self._terms_of_call(*args, **kwargs)

    def compile(self, *_: Any, **__: Any) -> None:
        """Warn that the objective stays as it is: `torch.compile` cannot follow a derivative of a derivative.

        What is compiled is a whole step, by the training loop: `fit(..., Training(compile=True))`.
        """
        warnings.warn(_NOT_COMPILED, stacklevel=2)

    def _terms_of_call(self, *args: Any, **kwargs: Any) -> Terms:
        if not self._wrapping_checked:
            check_wrapping(self, self.student)
            self._wrapping_checked = True
        x, y = (args[n] if len(args) > n else kwargs.get(name) for n, name in enumerate("xy"))
        caller = type(self).__name__
        x = rules.batch_of_tensors(caller, x, y, floating=self._differentiable)
        with self.selected_outputs(), rules.explained(caller, x, y, self.student):
            terms: Terms = super().__call__(*args, **kwargs)
            return terms

    @property
    def _differentiable(self) -> bool:
        """Whether the inputs must be of a floating-point type."""
        return bool(self.balance.weights[self.derivative_term])

    def train(self: Same, mode: bool = True) -> Same:
        """Put objective and student into training or evaluation mode; an exported student stays in its own."""
        self.training = mode
        for child in self.children():
            set_mode(child, training=mode)
        return self

    def selected_outputs(self) -> AbstractContextManager[None]:
        """Within the context the student returns what `output` selects."""
        return selecting(self.student, self.output)

    def _call(self, progress: float | int) -> Call:
        """What is due in this call; nothing is counted yet."""
        name, weights = self.derivative_term, self.balance.weights
        if weights[name] and isinstance(self.student, nn.parallel.DistributedDataParallel):
            raise UnsupportedError(
                f"`student` of `{type(self).__name__}` must not be wrapped in DistributedDataParallel: a derivative of "
                "its derivatives is not reduced over the processes. Wrap the objective: "
                "DistributedDataParallel(objective)."
            )
        due = bool(weights[name]) and not (self.training and self.calls % self.every)
        factor = self.schedule(progress) if due else 0.0
        measured = False
        if torch.is_grad_enabled():
            last = self.measured_at
            again = self.training and (last is None or self.calls - last >= self.measure_every)
            measured = again and (due or not weights[name])
            measured = measured or bool(self.balance.unmeasured - ({name} if factor == 0 else set()))
        if self.training and not isinstance(weights[name], Share):
            factor *= self.every
        return Call(self.calls, factor, measured)

    @contextmanager
    def unmeasured_calls(self) -> Iterator[None]:
        """Calls in the block measure no shares, and one that was never measured counts as a weight of 1.

        For comparisons of steps; afterwards the state is as before.
        """
        state, measure_every = self.get_extra_state(), self.measure_every
        missing = self.balance.unmeasured
        self.balance.factors |= dict.fromkeys(missing, 1.0)
        self.balance.shares |= dict.fromkeys(missing, 0.0)  # or a state that is set in the block drops the factor
        self.measured_at, self.measure_every = self.calls, 10**9
        try:
            yield
        finally:
            self.measure_every = measure_every
            self.set_extra_state(state)

    def _result(
        self,
        call: Call,
        unweighted: dict[str, Tensor],
        outputs: Tensor,
        teacher_outputs: Tensor | None,
        products: Tensor | None = None,
        firsts: dict[str, int] | None = None,
    ) -> Terms:
        """The terms with their weights; from here on the call counts.

        Args:
            call: What was due.
            unweighted: The terms.
            outputs: The student's.
            teacher_outputs: The teacher's.
            products: The teacher's, which a `relative` term is compared with.
            firsts: See `Terms`.
        """
        times, firsts, finite = {self.derivative_term: call.factor}, firsts or {}, True
        norm, name = self.teacher_norm, self.derivative_term
        if self.jacobian_loss == "relative" and name in unweighted:
            norm = norm.measured(products, outputs, self.balance.part, counts=call.measured)
            assert norm.mean is not None
            unweighted = {**unweighted, name: unweighted[name] / (norm.mean + _FLAT)}
        if call.measured:
            trained = [p for p in self.student.parameters() if p.requires_grad]
            finite = self.balance.measure(unweighted, trained, times, firsts)
        values = self.balance.weigh(unweighted, times)
        if not finite:  # what is not finite must show in the loss, whatever its weight would be
            values = {**unweighted, **values}
        # Where no term is due, the loss can still be differentiated: by 0.
        total = torch.stack(list(values.values())).sum() if values else (outputs * 0).sum()
        if call.measured and finite:
            self.teacher_norm = norm
        if self.training and torch.is_grad_enabled() and finite:
            self.measured_at = self.calls if call.measured else self.measured_at
            self.calls += 1
        return Terms({"loss": total, **values}, outputs, teacher_outputs, unweighted, dict(self.balance.shares), firsts)

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the student: calls, factors and shares."""
        norm = [self.teacher_norm.mean, self.teacher_norm.calls]
        state = {"calls": self.calls, "measured_at": self.measured_at, "teacher_norm": norm}
        return {**state, "factors": dict(self.balance.factors), "shares": dict(self.balance.shares)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up where `get_extra_state` left off; states of earlier versions say less and can be loaded."""
        self.calls = state["calls"]
        before = 0 if state["calls"] and state["shares"] else None  # version 0.1 measured in its first call
        self.measured_at = state.get("measured_at", before)
        self.teacher_norm = TeacherNorm(*state.get("teacher_norm", ()))
        self.balance.shares = dict(state["shares"])
        shared = {name for name, weight in self.balance.weights.items() if isinstance(weight, Share)}
        kept = shared & set(self.balance.shares) | set(self.balance.weights) - shared
        self.balance.factors = {name: factor for name, factor in state["factors"].items() if name in kept}
