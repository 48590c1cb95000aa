"""Regression by values and slopes: targets, and Jacobians that are given or that a teacher answers."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacmatch.errors import InputError
from jacmatch.jacobian import BatchNormPolicy, DataPairs, Engine, Estimator, EveryRow, SampledRows
from jacmatch.losses import JacobianLoss
from jacmatch.objectives import rules
from jacmatch.objectives.base import Objective, Output, Share, Terms
from jacmatch.objectives.points import AtData, Batch
from jacmatch.objectives.schedules import WeightSchedule
from jacmatch.objectives.slopes import Slopes
from jacmatch.objectives.terms import jacobian_term, output_term
from jacmatch.objectives.units import InUnits, ScaledOutputs, as_scale
from jacmatch.teachers import AnalyticTeacher, Answer, Teacher


class Regression(Objective):
    """Values and slopes of a function as one loss, in units of inputs and outputs: ℓ = w ℓ_values + w′ ℓ_jacobians.

    With units s of the inputs and t of the outputs, ℓ_values is the mean over the batch of Σₖ ((ŷₖ − yₖ)/tₖ)², and the
    slopes are compared as Σₖᵢ ((Ĵₖᵢ − Jₖᵢ) sᵢ/tₖ)², or by as many products as the probe takes. Metres and radians then
    weigh alike, and nothing changes when one is given in millimetres. Entries of given Jacobians that are NaN are not
    known: they are left out of the sum.

    Args:
        student: The network to train: raw inputs (B, *input) in, raw outputs (B, K) out.
        teacher: Answers what is not given in a call; None where both values and slopes are.
        values: Weight of the values.
        jacobians: Weight of the slopes: a number, or a `Share` of the gradient norm; 0 for values alone.
        inputs: s, a number for each input element or one for all; 1 if None.
        outputs: t, a number for each output or one for all; 1 if None.
        table: Known Jacobians (N, K, *input) of all samples; the `ids` of a batch say which.
        probe: Which products of the slopes are compared; None takes all rows.
        jacobian_loss: `squared`, `relative` or `normalized`.
        engine: How Jv is taken for directions on the input side; see `jacmatch.jvp`.
        chunk_size: Rows whose graphs are kept at once; None keeps all.
        batch_norm: Policy for BatchNorm of the student in training mode.
        every: The slopes are compared on each n-th call in training, with n times their weight; a
            `Share` is that of such a call.
        schedule: Factor of the weight of the slopes by progress.
        seed: Seeds the directions.
        measure_every: Calls between two measurements of the shares.
        output: Selects the outputs where a network returns more than one tensor; a pair (student's, teacher's).

    Raises:
        InputError: a setting is wrong, or settings do not go together.
        UnsupportedError: the teacher cannot answer what the probe asks.

    References:
        Czarnecki et al. 2017, arXiv:1706.04859 (Sobolev training); Huge & Savine 2020, arXiv:2005.02347 (slopes as
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
        jacobians: float | int = Share(0.5),
        inputs: Float[Tensor, "*input"] | float | int | None = None,
        outputs: Float[Tensor, "*out"] | float | int | None = None,
        table: Float[Tensor, "sample out *input"] | None = None,
        probe: Estimator | None = None,
        jacobian_loss: JacobianLoss = "squared",
        engine: Engine = "auto",
        chunk_size: int | None = None,
        batch_norm: BatchNormPolicy = "frozen",
        every: int = 1,
        schedule: WeightSchedule | None = None,
        seed: int = 0,
        measure_every: int = 100,
        output: Output = None,
    ) -> None:
        weights = {"values": values, "jacobians": jacobians}
        calls: dict[str, Any] = {"every": every, "schedule": schedule, "measure_every": measure_every}
        super().__init__(student, teacher, weights, output=output, **calls)
        probe = EveryRow() if probe is None else probe
        rules.known_names("Regression", jacobian_loss=jacobian_loss, batch_norm=batch_norm)
        rules.positive_settings(every=every, measure_every=measure_every, temperature=1, caller="Regression")
        rules.has_a_term(self.balance.weights, "Regression")
        rules.are_objects(probe, (), AtData())
        rules.fitting_engine(probe, engine, chunk_size)
        rules.numeric(probe, (), "squared")
        if self.teacher is not None and table is None and jacobians:
            rules.answerable(probe, self.teacher)
        self.register_buffer("input_scale", as_scale("inputs", inputs), persistent=False)
        self.register_buffer("output_scale", as_scale("outputs", outputs), persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.probe, self.jacobian_loss = probe, jacobian_loss
        self.engine, self.chunk_size, self.batch_norm = engine, chunk_size, batch_norm
        self.seed = seed

    @property
    def needs_partners(self) -> bool:
        """Whether a batch should come with partners from the data: for directions between data."""
        return isinstance(self.probe, DataPairs)

    def forward(
        self,
        x: Float[Tensor, "batch *input"],
        y: Float[Tensor, "batch out"] | None = None,
        *,
        j: Float[Tensor, "batch row *entry"] | None = None,
        ids: Int[Tensor, "batch"] | None = None,
        draw: int | None = None,
        partners: Float[Tensor, "batch *input"] | None = None,
        partner_labels: Float[Tensor, "batch out"] | None = None,
        progress: float | int = 0.0,
    ) -> Terms:
        """The terms for a batch.

        Args:
            x: Raw inputs.
            y: Values; the teacher's if None.
            j: Slopes ∂yₖ/∂xᵢ, NaN where one is not known; those of the `table`, or the teacher's, if None.
            ids: A number for each sample, the same in each epoch; row numbers if None.
            draw: Which of the independent draws of directions; None counts the calls.
            partners: Another data point for each sample, where `needs_partners`; the next in the batch if None.
            partner_labels: Not used.
            progress: Share of the training that is done, for the schedule.

        Raises:
            InputError: there is neither a target nor a teacher, a shape is wrong, or no product that the probe asks
                for is known.
            UnsupportedError: the student cannot be differentiated as the probe needs.
        """
        call = self._call(progress)
        rules.one_for_each(x, y=y, j=j, ids=ids, partners=partners)
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        partners = x.roll(1, 0) if partners is None else partners
        batch = Batch(x, y, partners, None, None, ids, call.number if draw is None else draw)
        outputs, targets, unweighted, products = self._compared(
            batch, j, slopes=call.factor > 0, measured=call.measured
        )
        return self._result(call, unweighted, outputs, targets, products)

    def _compared(
        self, batch: Batch, j: Tensor | None, *, slopes: bool, measured: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """The student's outputs, the values they are compared with, the terms, and the products compared with."""
        readout = ScaledOutputs(self.output_scale)
        input_side = self.probe.side == "input"
        probe: Any = InUnits(self.probe, self.input_scale) if input_side else self.probe
        how = Slopes(
            probe, readout, readout, AtData(), self.batch_norm, self.engine, self.seed, chunk_size=self.chunk_size
        )
        answer = self._ask(how, batch, j, slopes=slopes)
        told = batch.labels if answer is None else answer.outputs
        assert told is not None
        outputs, products = how.of_student(self.student, batch, answer, traced=measured)
        target = told if batch.labels is None else batch.labels
        rules.one_output_for_each("Regression", outputs, batch.x)
        rules.same_outputs(outputs, target)
        terms = {}
        if self.balance.weights["values"]:
            t = self.output_scale.to(outputs)
            terms["values"] = output_term("squared", outputs / t, target / t, 1.0)
        if products is not None and answer is not None and answer.products is not None:
            s = 1.0 if input_side else self.input_scale.to(outputs)
            given = self.table is not None if j is None else True
            mine, theirs = self._where_known(products, answer.products) if given else (products, answer.products)
            terms["jacobians"] = jacobian_term(self.jacobian_loss, mine * s, theirs * s)
            return outputs, target, terms, theirs * s
        return outputs, target, terms, None

    def _where_known(self, student: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Both products (P, B, …), 0 in both where that of the given Jacobians is unknown."""
        unknown = given.isnan()
        if bool(unknown.any()):
            if self.jacobian_loss == "normalized":
                rule = "`jacobian_loss` of `Regression` must be 'squared' or 'relative' where Jacobians have NaN."
                raise InputError(rule, got="'normalized'", do="No direction is known of a row that is known in part.")
            if bool(unknown.all()) and not isinstance(self.probe, EveryRow | SampledRows):
                rule = "`probe` of `Regression` must compare entries that are known where Jacobians have NaN."
                got = f"{type(self.probe).__name__}(), all products of which have unknown entries"
                raise InputError(rule, got=got, do="Use EveryRow(), the default.")
        return student.masked_fill(unknown, 0.0), given.masked_fill(unknown, 0.0)

    def _ask(self, how: Slopes, batch: Batch, j: Tensor | None, *, slopes: bool) -> Answer | None:
        """What is known about the batch; None where its targets are all that is needed."""
        if j is None and self.table is not None:
            j = self.table[batch.ids.to(self.table.device)]
        if j is not None and slopes:
            if hasattr(self.probe, "step"):
                raise InputError(
                    f"`probe` of `Regression` must not be {type(self.probe).__name__}() where slopes are given: it "
                    "compares values at pairs of points.",
                    do="Use RandomInputs(k) or EveryRow().",
                )
            known, slope = batch.labels, j
            if known is None:
                known = self._teacher("y").answer(batch.x, how.question(batch, asked=False)).outputs
            given = AnalyticTeacher(lambda _: known, lambda _: slope)
            return given.answer(batch.x, how.question(batch, asked=True))
        if not slopes and batch.labels is not None:
            return None
        return self._teacher("j" if slopes else "y").answer(batch.x, how.question(batch, asked=slopes))

    def _teacher(self, missing: str) -> Teacher:
        if self.teacher is None:
            raise InputError(
                f"`{missing}` of `Regression` must be given where there is no teacher.",
                do="Give both y and j, a table of Jacobians, or a teacher; jacobians=0 needs no slopes.",
            )
        return self.teacher
