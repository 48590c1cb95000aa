"""Regression of values and derivatives: targets, and Jacobians that are given or that a teacher computes.

In units s of the inputs and t of the outputs, with η = y/t and ξ = x/s, the derivatives are
∂η/∂ξ = diag(1/t) J diag(s). The readout divides the outputs by t; a probe on the input side gives s v instead of v, and
products on the output side are multiplied by s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import BatchNormPolicy, Context, Cost, Engine, Estimator, EveryRow, SampledRows
from jacmatch.losses import JacobianLoss
from jacmatch.objectives import validation
from jacmatch.objectives.base import Computed, Objective, Output
from jacmatch.objectives.compiled import Compared, Step
from jacmatch.objectives.differentiation import Differentiation
from jacmatch.objectives.terms import Batch, Terms, jacobian_term, output_term
from jacmatch.objectives.weights import GradientShare, WeightSchedule
from jacmatch.teachers import AnalyticTeacher, Answer, Teacher
from jacmatch.teachers.base import query


@dataclass(frozen=True)
class _Comparison:
    """The losses of `Regression`."""

    jacobian_loss: JacobianLoss

    def __call__(self, outputs: Tensor, values: Tensor, rows: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Return the terms whose tensors the step contains; `values` are the outputs in units."""
        terms = {}
        if step.targets is not None:
            terms["values"] = output_term("squared", values, step.targets, 1.0)
        if rows is not None and step.rows is not None:
            rows = rows if step.unit is None else rows * step.unit
            if step.unknown is not None:
                rows = rows.masked_fill(step.unknown, 0.0)
            terms["jacobians"] = jacobian_term(self.jacobian_loss, rows, step.rows)
        return terms


class Regression(Objective):
    """Values and derivatives of a function as one loss, in their units: ℓ = w ℓ_values + w′ ℓ_jacobians.

    With units s of the inputs and t of the outputs, ℓ_values is the mean over the batch of Σₖ ((ŷₖ − yₖ)/tₖ)², and the
    derivatives are compared as Σₖᵢ ((Ĵₖᵢ − Jₖᵢ) sᵢ/tₖ)², or by as many products as the probe takes. Meters and radians
    then have equal weight, and converting an input to millimeters changes nothing. NaN entries of given Jacobians are
    unknown: they, and products with one, are left out of the sum. There is no `class_dim`: outputs are numbers, not
    classes.

    Args:
        student: The network to train: raw inputs (B, *input) in, raw outputs (B, K) out.
        teacher: Computes the values or Jacobians that a call does not give; None if all are given.
        values: Weight of the values.
        jacobians: Weight of the derivatives: a number, or a `GradientShare` of the gradient norm; 0 for values alone.
        inputs: The units s, a number for each input element or one for all; 1 if None.
        outputs: The units t, a number for each output or one for all; 1 if None.
        table: Known Jacobians (N, K, *input) of all samples, indexed by the `ids` of a batch.
        probe: Which products of the Jacobian are compared; None takes all rows.
        jacobian_loss: `squared`, `relative` or `normalized`.
        every, fraction, schedule, measure_every, engine, chunk_size, batch_norm, seed, output: As in `Distillation`,
            for the derivatives.

    Raises:
        InputError: a setting is invalid, or two settings are incompatible.
        UnsupportedError: the teacher cannot compute the products that the probe needs.

    References:
        Czarnecki et al. 2017, arXiv:1706.04859 (Sobolev training); Huge & Savine 2020, arXiv:2005.02347 (derivatives as
        labels, in units of the data).

    Example:
        >>> x = torch.linspace(0, 3, 8)[:, None]
        >>> objective = Regression(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))
        >>> objective(x, x.sin(), j=x.cos()[:, :, None]).keys()
        ['loss', 'values', 'jacobians']
    """

    table: Tensor | None
    input_scale: Tensor
    output_scale: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        *,
        values: float | int = 1.0,
        jacobians: float | int = GradientShare(0.5),
        inputs: Float[Tensor, "*input"] | float | int | None = None,
        outputs: Float[Tensor, "*out"] | float | int | None = None,
        table: Float[Tensor, "sample out *input"] | None = None,
        probe: Estimator | None = None,
        jacobian_loss: JacobianLoss = "squared",
        engine: Engine = "auto",
        chunk_size: int | None = None,
        fraction: float | int = 1.0,
        batch_norm: BatchNormPolicy = "frozen",
        every: int = 1,
        schedule: WeightSchedule | None = None,
        seed: int = 0,
        measure_every: int = 100,
        output: Output = None,
    ) -> None:
        weights = {"values": values, "jacobians": jacobians}
        probe = EveryRow() if probe is None else probe
        settings: dict[str, Any] = {"batch_norm": batch_norm, "engine": engine, "seed": seed, "fraction": fraction}
        how = Differentiation(probe, chunk_size=chunk_size, caller="Regression", **settings)
        calls: dict[str, Any] = {"every": every, "schedule": schedule, "measure_every": measure_every}
        super().__init__(student, teacher, weights, how, output=output, **calls)
        validation.known_names("Regression", jacobian_loss=jacobian_loss)
        validation.numeric("Regression", probe, (), "squared")
        if self.teacher is not None and table is None and jacobians:
            validation.answerable("Regression", probe, self.teacher)
        self.register_buffer("input_scale", _as_scale("inputs", inputs), persistent=False)
        self.register_buffer("output_scale", _as_scale("outputs", outputs), persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.jacobian_loss = jacobian_loss

    def forward(
        self,
        x: Float[Tensor, "batch *input"],
        y: Float[Tensor, "batch *out"] | None = None,
        *,
        j: Float[Tensor, "batch row *entry"] | None = None,
        **others: Any,
    ) -> Terms:
        """Compute the terms for a batch; see `Objective.forward`.

        Args:
            x: Raw inputs.
            y: Target values; None queries the teacher.
            j: Jacobians ∂yₖ/∂xᵢ, NaN where an entry is unknown; None takes those of the `table`, or the teacher's.
            **others: Other arguments of `Objective.forward`.

        Raises:
            InputError: there is neither a target nor a teacher, a shape is wrong, or none of the products
                that the probe needs is known.
        """
        validation.one_for_each("Regression", x, j=j)
        return super().forward(x, y, j=j, **others)

    def _terms(self, batch: Batch, count: int, *, measured: bool, j: Tensor | None = None) -> Computed:
        how, first = self._in_units(), batch.part(slice(count)) if count else batch
        answer = self._query(how, first, None if j is None else j[: len(first.x)], products=count > 0)
        target = batch.labels
        if target is None and answer is not None:
            rest = batch.part(slice(len(first.x), None))
            others = self._query(how, rest, None, products=False) if len(rest.x) else None
            target = answer.outputs if others is None else torch.cat([answer.outputs, others.outputs])
        assert target is not None
        step = self._step(batch, answer, target, given=j is not None or self.table is not None)
        comparison = _Comparison(self.jacobian_loss)

        def eager() -> Compared:
            outputs, rows = self._in_parts(
                self.student, batch, len(first.x), lambda: how.of_student(self.student, first, answer, traced=measured)
            )
            validation.one_output_for_each("Regression", outputs, batch.x)
            validation.same_outputs(outputs, target)
            return outputs, comparison(outputs, how.readout(outputs, {}, Context()), rows, step)

        outputs, terms = self._compiled_step(step, comparison, how.readout, eager, count > 0, measured)
        return outputs, target, terms, step.rows

    def _in_units(self) -> Differentiation:
        """The settings with the probe in units of the inputs and the readout in units of the outputs."""
        readout = _ScaledOutputs(self.output_scale)
        probe: Any = self.differentiation.probe
        probe = _InUnits(probe, self.input_scale) if self.differentiation.side == "input" else probe
        return replace(self.differentiation, probe=probe, readout=readout, teacher_readout=readout)

    def _step(self, batch: Batch, answer: Answer | None, target: Tensor, *, given: bool) -> Step:
        """Return the tensors needed by the terms that have a weight."""
        step = Step(batch.x, arguments=batch.arguments)
        if self.loss_weights.weights["values"]:
            step.targets = target / self.output_scale.to(target)
        if answer is not None and answer.products is not None:
            step.v, step.rows = answer.cotangents, answer.products
            if given:
                step.rows, step.unknown = self._known(answer.products)
            if self.differentiation.side == "output":
                step.unit = self.input_scale.to(step.rows)
                step.rows = step.rows * step.unit
        return step

    def _known(self, given: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the products (P, B, …), 0 where unknown, and the mask of the unknown ones; None if all are known."""
        unknown = given.isnan()
        if not bool(unknown.any()):
            return given, None
        if self.jacobian_loss == "normalized":
            rule = "`jacobian_loss` of `Regression` must be 'squared' or 'relative' if Jacobians have NaN."
            raise InputError(rule, got="'normalized'", do="The direction of a row with unknown entries is unknown.")
        if bool(unknown.all()) and not isinstance(self.differentiation.probe, EveryRow | SampledRows):
            rule = "`probe` of `Regression` must compare only known entries if Jacobians have NaN."
            got = f"{type(self.differentiation.probe).__name__}(): all its products have unknown entries"
            raise InputError(rule, got=got, do="Use EveryRow(), the default.")
        return given.masked_fill(unknown, 0.0), unknown

    def _query(self, how: Differentiation, batch: Batch, j: Tensor | None, *, products: bool) -> Answer | None:
        """Return the known products of the batch, or the teacher's answer; None if the given targets suffice."""
        if j is None and self.table is not None:
            j = self.table[batch.ids.to(self.table.device)]
        if j is not None and products:
            if how.step is not None:
                name = type(self.differentiation.probe).__name__
                raise InputError(
                    f"`probe` of `Regression` must not be {name}() if Jacobians are given: it compares values at "
                    "pairs of points.",
                    do="Use RandomInputs(k) or EveryRow().",
                )
            values, matrix = batch.labels, j
            if values is None:
                values = query(self._teacher("y"), batch.x, how.question(batch, products=False)).outputs
            known = AnalyticTeacher(lambda *_, **__: values, lambda *_, **__: matrix)
            return query(known, batch.x, how.question(batch, products=True))
        if not products and batch.labels is not None:
            return None
        return query(self._teacher("j" if products else "y"), batch.x, how.question(batch, products=products))

    def _teacher(self, missing: str) -> Teacher:
        if self.teacher is None:
            do = "Give both y and j, a table of Jacobians, or a teacher; jacobians=0 needs no Jacobian."
            raise InputError(f"`{missing}` of `Regression` must be given without a teacher.", do=do)
        return self.teacher


def _as_scale(name: str, given: Tensor | float | int | None) -> Tensor:
    """Return the scale as a detached tensor; 1 if None."""
    scale = torch.as_tensor(1.0 if given is None else given).detach().clone()
    scale = scale if scale.is_floating_point() else scale.float()
    if not bool(((scale > 0) & scale.isfinite()).all()):
        rule = f"`{name}` of `Regression` must be positive and finite."
        raise InputError(rule, got=scale.tolist(), do="Give 1 for an entry that never varies.")
    return scale


@dataclass(frozen=True, eq=False)
class _ScaledOutputs:
    """Readout of the outputs in their units: yₖ/tₖ."""

    scale: Tensor
    layers: tuple[str, ...] = ()

    def __call__(
        self, outputs: Float[Tensor, "batch *out"], features: Mapping[str, Tensor], context: Context
    ) -> Float[Tensor, "batch *out"]:
        """Return the outputs divided by t."""
        return outputs / self.scale.to(outputs)


@dataclass(frozen=True, eq=False)
class _InUnits:
    """A probe on the input side whose directions are in units of the inputs: s v."""

    probe: Estimator
    scale: Tensor
    side = "input"

    @property
    def step(self) -> float | None:
        """The step size of the probe, in units as well; None if it sets none."""
        return getattr(self.probe, "step", None)

    def directions(self, **about: Any) -> Tensor:
        """Return the directions of the probe in units of the inputs, converted to directions of x."""
        v = self.probe.directions(**about)
        return v * self.scale.to(v)

    def variance(self, matrix: Tensor, **more: Any) -> float:
        """Return the variance of the probe for a matrix in units."""
        return self.probe.variance(matrix, **more)

    def passes(self, outputs: int) -> Cost:
        """Return the passes of the probe."""
        return self.probe.passes(outputs)
