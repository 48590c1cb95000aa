"""The base class of the objectives: weights of the terms, derivatives, teacher, and the state between calls."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jacmatch.errors import ClassDimensionError, InputError, UnsupportedError
from jacmatch.former_names import former
from jacmatch.jacobian import Arguments, Engine, Inputs, Nodes, Readout, TokenSubstitutions, run
from jacmatch.jacobian.callables import buffers_in_training, copies_of, replaced_buffers, write_buffers
from jacmatch.jacobian.engines import connected
from jacmatch.jacobian.features import Select, class_dimension, output_tensor, selecting
from jacmatch.jacobian.modules import check_wrapping, in_several_processes, row_numbers, set_mode
from jacmatch.losses import IGNORED, JacobianLoss
from jacmatch.models import FirstOutputs
from jacmatch.objectives import validation
from jacmatch.objectives.compiled import Compared, Comparison, CompiledSteps, Kinds, Step
from jacmatch.objectives.differentiation import Differentiation
from jacmatch.objectives.terms import AtData, Batch, TeacherNorm, Terms
from jacmatch.objectives.weights import GradientShare, LossWeights, WeightSchedule
from jacmatch.teachers import Answer, Teacher, as_teacher

Output = Select | tuple[Select | None, Select | None] | None
"""Selects the outputs of both networks; or a pair (student's, teacher's)."""
CallContext = Mapping[str, Any] | Arguments | None
"""Other arguments of both networks."""
Computed = tuple[Tensor, Tensor | None, dict[str, Tensor], Tensor | None]
"""Outputs of student and teacher, the terms before weighting, and the teacher's products."""
_FLAT = 1e-6  # divisor of a relative term if the teacher's products are 0, in the unit of their squares
_NONE = -1.0  # encodes None in the state, whose other numbers are all at least 0
_STATE_VERSION = 2.0
Same = TypeVar("Same", bound="Objective")


@dataclass(frozen=True)
class Call:
    """The quantities that one call of an objective computes."""

    number: int  # number of earlier calls
    factor: float  # factor of the derivative term, from the schedule and `every`; 0 where the term is not computed
    measured: bool  # whether this call measures the shares of the gradient norm


_NOT_COMPILED = (
    "An objective runs uncompiled: torch.compile cannot follow a derivative of a derivative. To compile whole steps, "
    "use fit(..., Training(compile=True)), or --compile on the command line."
)


def networks_of(objective: nn.Module) -> tuple[Any, Any]:
    """Return student and teacher of an objective, or of any module with attributes of these names; None otherwise."""
    if isinstance(objective, Objective):
        return objective.student, objective.teacher
    named = {**vars(objective), **dict(objective.named_children())}
    return named.get("student"), named.get("teacher")


@runtime_checkable
class _WithPartners(Protocol):
    """An objective with the attribute `needs_partners`."""

    needs_partners: bool


def needs_partners(objective: nn.Module) -> bool:
    """Return whether batches need partners from the data: `needs_partners` of the objective, False without it."""
    return isinstance(objective, _WithPartners) and bool(objective.needs_partners)


@dataclass(frozen=True)
class _Column:
    """Return selected outputs of shape (B,) as a column (B, 1)."""

    select: Select | None

    def __call__(self, returned: Any) -> Tensor:
        outputs = output_tensor(returned) if self.select is None else self.select(returned)
        return outputs[:, None] if outputs.dim() == 1 else outputs


class Objective(nn.Module):
    """Base class of all objectives: student, frozen teacher, weights, derivatives, and the state between calls.

    The state (`calls`, factors, shares) changes only at the end of a successful call with gradients enabled: a failed
    call, or one under `torch.no_grad()`, counts neither as a draw nor as a measurement of shares. `parameters` are
    those of the student, and `state_dict` adds this state to the student's; the teacher is not part of the module.

    Args:
        student: The network to train.
        teacher: A teacher or an nn.Module; None to train without one.
        weights: Weight of each term.
        differentiation: Which derivatives are taken, and how.
        output: Selects the outputs where a network returns more than one tensor; a pair (student's, teacher's).
        class_dim: The dimension of the classes of dense outputs; None infers it from the student's last layer.
        every: The derivative term is computed on each n-th call in training, with n times its weight; a
            `GradientShare` is that of such a call.
        schedule: Factor of that weight, as a function of data size and progress.
        measure_every: Calls between two measurements of the shares, rounded up to the next call that computes the term.

    Attributes:
        loss_weights: The weights, and the factors computed from the measured shares.
        differentiation: As given.
        teacher: The frozen teacher.
        calls: Number of successful calls in training.
        compiled: Compiles the steps if it is not None; see `CompiledSteps`.

    Raises:
        InputError: a setting is invalid, or two settings are incompatible.
    """

    teacher: Teacher | None
    derivative_term: ClassVar[str] = "jacobians"
    labels_by_name: ClassVar[bool] = False
    jacobian_loss: JacobianLoss = "squared"
    ignore_index: int = IGNORED
    _called = False
    _terms: Callable[..., Computed]
    """`_terms(batch, count, measured=, **given)` of a subclass, with derivatives of the first `count` samples."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        weights: dict[str, float | int],
        differentiation: Differentiation,
        *,
        every: int,
        measure_every: int,
        schedule: WeightSchedule | None = None,
        output: Output = None,
        class_dim: int | None = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        validation.separate(student, teacher)
        self.student = student
        self.output, of_teacher = validation.selections(output, teacher, caller)
        # Not registered as a submodule, even if the user's teacher is an nn.Module.
        object.__setattr__(self, "teacher", None if teacher is None else as_teacher(teacher, of_teacher))
        self.loss_weights = LossWeights(weights)
        validation.positive_settings(caller, every=every, measure_every=measure_every)
        if not any(weights.values()):
            raise InputError(f"`{caller}` must have at least one term with a weight other than 0.", got=weights)
        self.every, self.measure_every = every, measure_every
        self.schedule = WeightSchedule() if schedule is None else schedule
        self.differentiation = differentiation
        differentiation.check()
        self.class_dim = class_dim
        if class_dim is not None:
            differentiation.set_class_dim(class_dim)
        self.compiled: CompiledSteps | None = None
        self.calls = 0
        self._wrapping_checked = False
        self._shared_rows: dict[str, int] = {}
        self.measured_at: int | None = None
        self.teacher_norm = TeacherNorm()

    @property
    def needs_partners(self) -> bool:
        """Whether a batch needs partners from the data: for mixed pairs, and for directions between data points."""
        return self.differentiation.needs_partners

    @property
    def network(self) -> Any:
        """The network that is run: the student; with both heads if the student is its first head (`FirstOutputs`)."""
        return self.student.network if isinstance(self.student, FirstOutputs) else self.student

    balance = former("objective", "balance", "loss_weights")

    @property
    def derivative_terms(self) -> tuple[str, ...]:
        """The terms with derivatives with respect to the input."""
        return (self.derivative_term,)

    @property
    def takes_derivatives(self) -> bool:
        """Whether the loss has a term with derivatives with respect to the input."""
        return any(self.loss_weights.weights[name] for name in self.derivative_terms)

    def resolved_engine(self) -> Engine | None:
        """Return the engine of the student's derivatives; None where none are taken.

        It is `auto` until the first call, in which `jacmatch.jvp` chooses the engine.

        Example:
            >>> from jacmatch.objectives import Robustness
            >>> Robustness(nn.Linear(3, 2)).resolved_engine(), Robustness(nn.Linear(3, 2), penalty=0).resolved_engine()
            ('reverse', None)
        """
        return self.differentiation.resolved_engine() if self.takes_derivatives else None

    def check_sharded(self) -> None:
        """Refuse what FSDP2 cannot do, and choose forward mode: engines are not verified on sharded weights."""
        engine, rule = self.resolved_engine(), "FSDP2 (`shard` of `Training`) cannot be combined with"
        if engine == "reverse":
            raise UnsupportedError(
                f"{rule} derivatives by the reverse engine: FSDP2 frees the weights of a layer after its backward pass,"
                " and the second derivative needs them again. Use --probe random-inputs, or --engine differences."
            )
        if any(isinstance(weight, GradientShare) and weight for weight in self.loss_weights.weights.values()):
            reason = "to measure a share, the unsharded gradient of each term is needed. Use a fixed weight"
            raise UnsupportedError(f"{rule} a weight that is a `GradientShare`: {reason} (--jacobian-weight).")
        if engine == "auto":
            self.differentiation.engine = "forward"

    def not_compiled(self) -> str | None:
        """Return why the steps of this objective are not compiled; None where they are."""
        return self.differentiation.not_compiled() if self.takes_derivatives else None

    def _compiled_step(
        self,
        step: Step,
        comparison: Comparison,
        readout: Readout,
        eager: Callable[[], Compared],
        derived: bool,
        measured: bool,
    ) -> Compared:
        """Return outputs and terms of a step, compiled if possible; a step that measures shares runs eagerly."""
        if self.compiled is None or measured or not (self.training and torch.is_grad_enabled()):
            return eager()
        if derived and (reason := self.not_compiled()) is not None:
            self.compiled.give_up(reason)
            return eager()
        step.scale = self.differentiation.scale
        kinds = Kinds(comparison, readout, self.differentiation.batch_norm)
        compared = self.compiled(self.network, kinds, step, eager)
        return eager() if compared is None else compared

    def scale_derivatives(self, scale: Tensor | None) -> None:
        """Scale the backward pass of the student's products, as fp16 needs it; see `jacobian.products.vjp_products`."""
        self.differentiation.scale = scale

    def __call__(self, *args: Any, **kwargs: Any) -> Terms:
        """Return the terms for a batch, see `forward`; `torch.compile` does not trace the call."""
        if torch.compiler.is_compiling():
            uncompiled: Callable[..., Terms] = torch.compiler.disable(self._terms_of_call)  # type: ignore[no-untyped-call]
            return uncompiled(*args, **kwargs)
        return self._terms_of_call(*args, **kwargs)

    def compile(self, *_: Any, **__: Any) -> None:
        """Warn that the objective is not compiled; `fit(..., Training(compile=True))` compiles whole steps."""
        warnings.warn(_NOT_COMPILED, stacklevel=2)

    def _terms_of_call(self, *args: Any, **kwargs: Any) -> Terms:
        if not self._wrapping_checked:
            check_wrapping(self, self.student, derived=self.takes_derivatives)
            if any(hasattr(each, "full_tensor") for each in self.student.parameters()):
                self.check_sharded()
            self._wrapping_checked = True
        given: dict[str, Any] = {**dict(zip("xy", args, strict=False)), **kwargs}
        x, y = given.get("x"), given.get("y")
        caller = type(self).__name__
        tokens = isinstance(self.differentiation.probe, TokenSubstitutions) and self.takes_derivatives
        if tokens or isinstance(x, Inputs | Nodes | Mapping) or given.get("context"):
            given = self._with_arguments(caller, given)
            x = given["x"]
        labels = None if self.labels_by_name else y
        given["x"] = x = validation.batch_of_tensors(caller, x, labels, floating=self._differentiable)
        before = copies_of(buffers_in_training(self.student)) if not self._called else {}
        try:
            return self._selected_terms(*args[2:], **given)
        except validation.SingleOutput:  # outputs of shape (B,), which only the first pass reveals
            write_buffers(self.student, before)
            self.output = _Column(self.output)
            return self._selected_terms(*args[2:], **given)

    def _selected_terms(self, *args: Any, **given: Any) -> Terms:
        caller, y = type(self).__name__, given.get("y")
        if self.labels_by_name:
            y = None
        elif isinstance(self.output, _Column) and isinstance(y, Tensor) and y.is_floating_point() and y.dim() == 1:
            given["y"] = y[:, None]
        for name in () if self.labels_by_name else ("y", "partner_labels"):
            if isinstance(given.get(name), Tensor):
                given[name] = validation.without_ignored(given[name], self.ignore_index)
        with self.selected_outputs(), validation.explained(caller, given["x"], y, self.student):
            terms: Terms = super().__call__(*args, **given)
            self._called = True
            return terms

    def _with_arguments(self, caller: str, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with `x` as the one tensor to differentiate, and `context` matched to its batch."""
        partners, x, context = given.get("partners"), given["x"], given.get("context")
        x, arguments = Arguments.of(caller, x, context)
        probe = self.differentiation.probe
        if isinstance(probe, TokenSubstitutions) and self.takes_derivatives:
            validation.tokens(caller, x, self.differentiation.point)
            ids, draw, networks = given.get("ids"), given.get("draw"), [self.network, self.teacher]
            layout = probe.drawn(
                x,
                ids=row_numbers(x) if ids is None else ids,
                seed=self.differentiation.seed,
                draw=self.calls if draw is None else draw,
                context=context or {},
                vocabulary=validation.vocabulary(caller, networks),
            )
            arguments = Arguments({} if arguments is None else arguments.values, layout)
            like = next(p for p in self.network.parameters() if p.is_floating_point())
            x = torch.zeros(layout.new.shape, dtype=like.dtype, device=x.device)
        if isinstance(partners, Inputs | Mapping):
            partners, _ = Arguments.of(caller, partners, None)
        if arguments is not None:
            validation.unambiguous(caller, arguments, x, self._shared_rows)
        return {**given, "x": x, "context": arguments, **({} if partners is None else {"partners": partners})}

    @property
    def _differentiable(self) -> bool:
        """Whether the inputs must have a floating-point type: for derivatives, for mixing and for added noise."""
        return self.takes_derivatives or not isinstance(self.differentiation.point, AtData)

    def train(self: Same, mode: bool = True) -> Same:
        """Put objective and student into training or evaluation mode; an exported student keeps its mode."""
        self.training = mode
        for child in self.children():
            set_mode(child, training=mode)
        return self

    def selected_outputs(self, student: Any = None) -> AbstractContextManager[None]:
        """Context in which the student, or a copy of it, returns the outputs that `output` selects."""
        chosen = self.student if student is None else student
        return selecting(chosen.network if isinstance(chosen, FirstOutputs) else chosen, self.output)

    def forward(
        self,
        x: Float[Tensor, "batch *input"],
        y: Shaped[Tensor, "batch *out"] | None = None,
        *,
        ids: Int[Tensor, "batch"] | None = None,
        draw: int | None = None,
        partners: Float[Tensor, "batch *input"] | None = None,
        partner_labels: Shaped[Tensor, "batch *out"] | None = None,
        progress: float | int = 0.0,
        context: CallContext = None,
        **given: Any,
    ) -> Terms:
        """Compute the terms for a batch.

        Args:
            x: Raw inputs, the same for student and teacher.
            y: Labels: classes, probabilities, or numbers in regression. None where the label term has no weight.
            ids: A number for each sample, the same in each epoch; seeds its directions, noise and mixtures, and
                identifies it for a teacher that stores its answers. If None, row i of process r of n has r + n i.
            draw: Index of the independent draw of a sample's point and directions; None uses the number of calls.
            partners: Another data point for each sample, where `needs_partners`; the next in the batch if None.
            partner_labels: The labels of the partners.
            progress: Fraction of the training that is done, for the schedule.
            context: Other arguments of both networks, by name, passed unchanged: attention masks, token types, atom
                types, parameters. See `jacmatch.jacobian.arguments`.
            **given: Arguments that only this objective has.

        Raises:
            InputError: labels are missing, a shape is wrong, or student and teacher are incompatible.
            UnsupportedError: the student does not support the derivatives that are compared.
        """
        call = self._call(progress)
        draw = call.number if draw is None else draw
        others: dict[str, Any] = {
            "ids": ids,
            "partners": partners,
            "partner_labels": partner_labels,
            "context": context,
        }
        batch = self._moved(x, y, draw=draw, **others)
        count, firsts = self._first(call, len(batch.x))
        outputs, targets, terms, products = self._terms(batch, count, measured=call.measured, **given)
        for name in self.derivative_terms if call.factor > 0 else ():  # other processes have all of the first samples
            terms.setdefault(name, (outputs * 0).sum())
        unweighted = {name: terms[name] for name in self.loss_weights.weights if name in terms}
        return self._result(call, unweighted, outputs, targets, products, firsts)

    def _call(self, progress: float | int) -> Call:
        """Return what this call has to compute; the state does not change yet."""
        derived = self.takes_derivatives
        due = derived and not (self.training and self.calls % self.every)
        factor = self.schedule(progress) if due else 0.0
        measured = False
        if torch.is_grad_enabled():
            again = self.measured_at is None or self.calls - self.measured_at >= self.measure_every
            again &= self.training and not torch._C._are_functorch_transforms_active()
            missing = self.loss_weights.unmeasured.difference(() if factor else self.derivative_terms)
            measured = bool(missing) or (again and (due or not derived))
        return Call(self.calls, factor, measured)

    @contextmanager
    def unmeasured_calls(self) -> Iterator[None]:
        """Context in which calls measure no shares, and a share that was never measured counts as a weight of 1.

        Used to compare steps; the state is restored on exit.
        """
        state, measure_every = self.get_extra_state(), self.measure_every
        missing = self.loss_weights.unmeasured
        self.loss_weights.factors |= dict.fromkeys(missing, 1.0)
        self.loss_weights.shares |= dict.fromkeys(missing, 0.0)  # else a state set in the block drops the factor
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
        """Return the weighted terms, and update the state: the call has succeeded."""
        firsts, finite, weights = firsts or {}, True, self.loss_weights.weights
        repeated = self.every if self.training else 1  # a share is that of a call with derivatives
        times = {
            name: call.factor * (1 if isinstance(weights[name], GradientShare) else repeated)
            for name in self.derivative_terms
        }
        norm, name = self.teacher_norm, self.derivative_term
        if self.jacobian_loss == "relative" and name in unweighted:
            norm = norm.measured(products, outputs, self.loss_weights.part, counts=call.measured)
            assert norm.mean is not None
            unweighted = {**unweighted, name: unweighted[name] / (norm.mean + _FLAT)}
        trained = [p for p in self.student.parameters() if p.requires_grad]
        ahead = not trained and any(each.requires_grad for each in unweighted.values())  # only what is in front learns
        if call.measured and (not ahead or self.loss_weights.unmeasured):
            finite = self.loss_weights.measure(unweighted, trained, times, firsts)
        values = self.loss_weights.weigh(unweighted, times)
        if not finite:  # a term that is not finite must show in the loss, whatever its weight
            values = {**unweighted, **values}
        # Without any term, the loss can still be differentiated, with gradient 0.
        total = torch.stack(list(values.values())).sum() if values else (outputs * 0).sum()
        if torch.is_grad_enabled() and self.loss_weights.part is None and in_several_processes():
            # A Jacobian term gives a bias no gradient; connected, it does not keep DistributedDataParallel waiting.
            total = connected(total, trained)
        if call.measured and finite:
            self.teacher_norm = norm
        if self.training and torch.is_grad_enabled() and finite:
            self.measured_at = self.calls if call.measured else self.measured_at
            self.calls += 1
        return Terms(
            {"loss": total, **values}, outputs, teacher_outputs, unweighted, dict(self.loss_weights.shares), firsts
        )

    def _moved(
        self,
        x: Tensor,
        y: Tensor | None,
        *,
        draw: int,
        ids: Tensor | None = None,
        partners: Tensor | None = None,
        partner_labels: Tensor | None = None,
        context: CallContext = None,
    ) -> Batch:
        """Return the batch, moved to the points at which student and teacher are compared."""
        if self.loss_weights.weights.get("labels") and y is None:
            rule = "`y` must be given if the weight `labels` is not 0."
            raise InputError(rule, do="Set labels=0 to train without labels.")
        given = {"y": y, "ids": ids, "partners": partners, "partner_labels": partner_labels}
        validation.one_for_each(type(self).__name__, x, **given)
        ids = row_numbers(x) if ids is None else ids
        if partners is None:
            partners, partner_labels = x.roll(1, 0), None if y is None else y.roll(1, 0)
        moved, share = self.differentiation.point.move(x, partners, ids=ids, seed=self.differentiation.seed, draw=draw)
        arguments = Arguments.of(type(self).__name__, x, context)[1]
        if self.needs_partners and arguments is not None:
            validation.arguments_of_pairs(type(self).__name__, arguments, self.differentiation.point)
        return Batch(moved, y, partners, partner_labels, share, ids, draw, arguments)

    def _first(self, call: Call, samples: int) -> tuple[int, dict[str, int]]:
        """Return how many samples of this process have derivatives, and how many of the whole batch a term averages."""
        if not call.factor > 0:
            return 0, {}
        fraction = self.differentiation.fraction
        first = math.ceil(fraction * self.loss_weights.whole(samples))
        return self.loss_weights.own(first), dict.fromkeys(self.derivative_terms, first) if fraction < 1 else {}

    @staticmethod
    def _answers(batch: Batch, count: int, ask: Callable[..., Answer | None]) -> tuple[Answer | None, Answer | None]:
        """Return the teacher's answer with products about the first `count` samples, and its answer about all."""
        first = ask(batch.part(slice(count)), products=True) if count else None
        if count == len(batch.x):
            return first, first
        rest = ask(batch.part(slice(count, None)), products=False)
        if first is None or rest is None:
            return first, rest if not count else None
        return first, Answer(torch.cat([first.outputs, rest.outputs]), torch.cat([first.values, rest.values]))

    @staticmethod
    def _in_parts(
        network: nn.Module,
        batch: Batch,
        count: int,
        derive: Callable[[], tuple[Any, Any]],
        plain: Callable[[Batch], Any] | None = None,
    ) -> tuple[Any, Any]:
        """Return the outputs of all samples, and what `derive` returns besides the outputs of the first `count`.

        `plain` computes the outputs without derivatives, of which some may be None; None runs the network.
        If samples depend on each other (BatchNorm), the outputs come from a pass with the whole batch. The pass for the
        derivatives then uses copies of the buffers, so that running statistics are updated once.
        """
        if count == len(batch.x):
            return derive()
        plain = plain or (lambda part: run(network, part.x, arguments=part.arguments)[0])
        if validation.couples(network):
            outputs = plain(batch)
            with replaced_buffers(network, copies_of(buffers_in_training(network))):
                return outputs, derive()[1]
        head, derived = derive()
        rest = plain(batch.part(slice(count, None)))
        return tree_map(lambda one, other: None if other is None else torch.cat([one, other]), head, rest), derived

    def _read_class_dim(self, batch: Batch) -> None:
        """Infer the dimension of the classes from the student's last layer."""
        self.class_dim = class_dimension(self.network, batch.x, batch.arguments)
        if self.class_dim is None:
            raise ClassDimensionError(
                f"`class_dim` of `{type(self).__name__}` must be given for outputs of more than two dimensions whose "
                "last layer is neither a linear layer nor a convolution.",
                do="Pass class_dim=1 for images (B, K, H, W), class_dim=-1 for tokens (B, T, K).",
            )
        self.differentiation.set_class_dim(self.class_dim)

    def get_extra_state(self) -> Tensor:
        """Return what a resumed run needs besides the student, as one tensor of float64 that any format can store.

        It holds a version, `calls`, `measured_at`, mean and number of calls of the teacher's norm, and the factor and
        share of each term; −1 encodes None.
        """
        weights, norm = self.loss_weights, self.teacher_norm
        numbers: list[float | None] = [_STATE_VERSION, self.calls, self.measured_at, norm.mean, norm.calls]
        for name in weights.weights:
            numbers += [weights.factors.get(name), weights.shares.get(name)]
        return torch.tensor([_NONE if number is None else number for number in numbers], dtype=torch.float64)

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned; states of earlier versions, which are dictionaries, load as well.

        Raises:
            InputError: the state is that of an objective with other terms.
        """
        given = self._decoded(state) if isinstance(state, Tensor) else state
        self.calls = given["calls"]
        before = 0 if given["calls"] and given["shares"] else None  # version 0.1 measured the shares in its first call
        self.measured_at = given.get("measured_at", before)
        self.teacher_norm = TeacherNorm(*given.get("teacher_norm", ()))
        weights = self.loss_weights
        weights.shares = dict(given["shares"])
        shared = {name for name, weight in weights.weights.items() if isinstance(weight, GradientShare)}
        known = shared & set(weights.shares) | set(weights.weights) - shared
        weights.factors = {name: factor for name, factor in given["factors"].items() if name in known}

    def _decoded(self, state: Tensor) -> dict[str, Any]:
        names = list(self.loss_weights.weights)
        count = 5 + 2 * len(names)
        if tuple(state.shape) != (count,):
            rule = f"The state of `{type(self).__name__}` must have {count} numbers, for {len(names)} terms."
            do = "Load a checkpoint of an objective with the same terms."
            raise InputError(rule, got=f"shape {tuple(state.shape)}", do=do)
        numbers = [None if number == _NONE else number for number in state.tolist()]
        _, calls, measured_at, mean, norm_calls = numbers[:5]
        return {
            "calls": int(calls or 0),
            "measured_at": None if measured_at is None else int(measured_at),
            "teacher_norm": (mean, int(norm_calls or 0)),
            "factors": {name: factor for name, factor in zip(names, numbers[5::2], strict=True) if factor is not None},
            "shares": {name: share for name, share in zip(names, numbers[6::2], strict=True) if share is not None},
        }
