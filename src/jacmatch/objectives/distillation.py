"""Distillation by values and slopes: labels + outputs + Jacobians."""

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import (
    AttentionPixel,
    BatchNormPolicy,
    Context,
    DataPairs,
    Estimator,
    Logits,
    Products,
    RandomOutputs,
    Readout,
    pull,
    push,
    run,
)
from jacmatch.objectives import rules
from jacmatch.objectives.base import Balance, Share, Terms
from jacmatch.objectives.points import AtData, AtMixedPairs, Batch, Point
from jacmatch.objectives.schedules import WeightSchedule
from jacmatch.objectives.terms import exact_values, jacobian_term, label_term, output_term
from jacmatch.teachers import Answer, Question, Teacher, as_teacher


class Distillation(nn.Module):
    """Labels, the teacher's outputs and the teacher's Jacobian, as one loss: ℓ = Σⱼ wⱼ ℓⱼ.

    Each term is a sum over outputs, rows and input elements and a mean over the batch. The teacher is asked once and
    the student run once for each batch. `state_dict` and `parameters` are those of the student (and of the weights'
    balance); the teacher is not part of the module.

    Args:
        student: The network to train; any nn.Module with outputs (B, K).
        teacher: A teacher or an nn.Module; None for labels alone.
        labels: Weight of the label term: cross-entropy, or squared error in regression.
        outputs: Weight of the output term.
        jacobians: Weight of the Jacobian term. A `Share` (the default) is the share of the gradient norm.
        probe: Which derivative products are compared.
        readout: What is differentiated; a pair (student's, teacher's) where they differ.
        output_loss: `squared` logit differences (the paper's choice), or Hinton's `kl` with τ².
        temperature: τ of `kl`.
        jacobian_loss: `relative`, `squared` or `normalized`.
        point: Where the comparison is made.
        every: The Jacobian term is computed on each n-th call in training, with n times its weight.
        schedule: Factor of the Jacobian weight by data size and progress.
        batch_norm: Policy for BatchNorm of the student in training mode.
        task: Whether labels are classes or numbers.
        seed: Seeds all directions.
        measure_every: Calls between two measurements of the shares.

    Raises:
        InputError: a setting is wrong, or settings do not go together.
        UnsupportedError: the teacher cannot answer what the probe asks.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443; the total loss is that of the precursor (section 3).

    Example:
        >>> student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> terms = Distillation(student, teacher)(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> terms.keys()
        ['loss', 'labels', 'outputs', 'jacobians']
    """

    teacher: Teacher | None

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        *,
        labels: float | int = 1.0,
        outputs: float | int = 1.0,
        jacobians: float | int = Share(0.3),
        probe: Estimator | None = None,
        readout: Readout | tuple[Readout, Readout] | None = None,
        output_loss: Literal["squared", "kl"] = "squared",
        temperature: float | int = 1.0,
        jacobian_loss: Literal["relative", "squared", "normalized"] = "relative",
        point: Point | None = None,
        every: int = 1,
        schedule: WeightSchedule | None = None,
        batch_norm: BatchNormPolicy = "frozen",
        task: Literal["classification", "regression"] = "classification",
        seed: int = 0,
        measure_every: int = 100,
    ) -> None:
        super().__init__()
        rules.separate(student, teacher)
        self.student = student
        # Not a submodule, even where somebody's teacher is an nn.Module.
        object.__setattr__(self, "teacher", None if teacher is None else as_teacher(teacher))
        if teacher is None:
            outputs = jacobians = 0.0
        self.balance = Balance({"labels": labels, "outputs": outputs, "jacobians": jacobians})
        self.probe: Estimator = RandomOutputs(1) if probe is None else probe
        readout = Logits() if readout is None else readout
        self.readout, self.teacher_readout = readout if isinstance(readout, tuple) else (readout, readout)
        self.output_loss, self.temperature, self.jacobian_loss = output_loss, temperature, jacobian_loss
        self.point = AtData() if point is None else point
        self.every, self.measure_every, self.seed = every, measure_every, seed
        self.schedule = WeightSchedule() if schedule is None else schedule
        self.batch_norm, self.task = batch_norm, task
        self.calls = 0
        rules.known_names(output_loss=output_loss, jacobian_loss=jacobian_loss, task=task, batch_norm=batch_norm)
        rules.positive_settings(every=every, measure_every=measure_every, temperature=temperature)
        rules.has_a_term(self.balance.weights)
        readouts = (self.readout, self.teacher_readout)
        rules.are_objects(self.probe, readouts, self.point)
        rules.one_pixel(readouts)
        if task == "regression":
            rules.numeric(self.probe, readouts, output_loss)
        if isinstance(self.point, AtMixedPairs):
            rules.mixable(self.probe, readouts, task, self.balance.weights)
        if self.teacher is not None and self.balance.weights["jacobians"]:
            rules.answerable(self.probe, self.teacher)

    @property
    def needs_partners(self) -> bool:
        """Whether a batch should come with partners from the data: for mixed pairs, and for directions between data."""
        return isinstance(self.point, AtMixedPairs) or isinstance(self.probe, DataPairs)

    def forward(
        self,
        x: Float[Tensor, "batch *input"],
        y: Shaped[Tensor, "batch *out"] | None = None,
        *,
        ids: Int[Tensor, "batch"] | None = None,
        partners: Float[Tensor, "batch *input"] | None = None,
        partner_labels: Shaped[Tensor, "batch *out"] | None = None,
        progress: float | int = 0.0,
    ) -> Terms:
        """The terms for a batch.

        Args:
            x: Raw inputs, the same for student and teacher.
            y: Labels: classes, probabilities, or numbers in regression. None where the label term has no weight.
            ids: A number for each sample, the same in each epoch; seeds its directions. Row numbers if None.
            partners: Another data point for each sample, where `needs_partners`; the next in the batch if None.
            partner_labels: Their labels.
            progress: Share of the training that is done, for the schedule.

        Raises:
            InputError: labels are missing, a shape is wrong, or student and teacher do not go together.
            UnsupportedError: the student cannot be differentiated as the Jacobian term needs.
        """
        draw = self.calls
        if self.training:
            self.calls += 1
        factor = self._jacobian_factor(draw, progress)
        batch = self._moved(x, y, ids, partners, partner_labels, draw)
        measured = self.training and torch.is_grad_enabled() and draw % self._period == 0
        answer = self._ask(batch, slopes=factor > 0)
        outputs, products = self._student(batch, answer, measured=measured)
        unweighted = self._terms(batch, answer, outputs, products)
        if measured:
            trained = [p for p in self.student.parameters() if p.requires_grad]
            self.balance.measure(unweighted, trained, {"jacobians": self.schedule(progress)})
        factors = {**self.balance.factors, "jacobians": self.balance.factors["jacobians"] * factor}
        values = {name: factors[name] * term for name, term in unweighted.items()}
        # Where no term is due, the loss can still be differentiated: by 0.
        total = torch.stack(list(values.values())).sum() if values else (outputs * 0).sum()
        shares = dict(self.balance.shares)
        return Terms({"loss": total, **values}, outputs, None if answer is None else answer.outputs, unweighted, shares)

    @property
    def _period(self) -> int:
        """Calls between two measurements, all of them calls with a Jacobian term."""
        return -(-self.measure_every // self.every) * self.every

    def _jacobian_factor(self, draw: int, progress: float | int) -> float:
        if not self.balance.weights["jacobians"] or (self.training and draw % self.every):
            return 0.0
        return self.schedule(progress) * (self.every if self.training else 1)

    def _moved(
        self, x: Tensor, y: Tensor | None, ids: Tensor | None, partners: Tensor | None, other: Tensor | None, draw: int
    ) -> Batch:
        if self.balance.weights["labels"] and y is None:
            raise InputError("`y` must be given where `labels` has a weight.", do="Set labels=0 to train without.")
        rules.one_for_each(x, y=y, ids=ids, partners=partners, partner_labels=other)
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        if partners is None:
            partners, other = x.roll(1, 0), None if y is None else y.roll(1, 0)
        moved, share = self.point.move(x, partners, ids=ids, seed=self.seed, draw=draw)
        return Batch(moved, y, partners, other, share, ids, draw)

    def _ask(self, batch: Batch, *, slopes: bool) -> Answer | None:
        if self.teacher is None or not (slopes or self.balance.weights["outputs"]):
            return None
        ids = batch.ids if rules.repeatable(self.point, self.probe, slopes) else None
        question = Question(readout=self.teacher_readout, labels=batch.label, ids=ids)
        if slopes and self.probe.side == "output":
            question = Question(
                readout=self.teacher_readout,
                labels=batch.label,
                cotangents=lambda values: self._directions(batch, values.to(batch.x.dtype)).to(values.dtype),
                ids=ids,
                rule=self.probe if isinstance(self.probe, Hashable) else None,
            )
        elif slopes:
            tangents = self._directions(batch, None)
            step = getattr(self.probe, "step", None)
            question = Question(readout=self.teacher_readout, labels=batch.label, tangents=tangents, step=step)
        return self.teacher.answer(batch.x, question)

    def _directions(self, batch: Batch, values: Tensor | None) -> Tensor:
        directions: Tensor = self.probe.directions(
            x=batch.x,
            outputs=values,
            labels=batch.label,
            ids=batch.ids,
            seed=self.seed,
            draw=batch.draw,
            partners=batch.partners,
        )
        return directions

    def _student(self, batch: Batch, answer: Answer | None, *, measured: bool) -> tuple[Tensor, Tensor | None]:
        if answer is None or answer.products is None:
            outputs, _ = run(self.student, batch.x)
            return outputs, None
        pixels, readout = None, self.readout
        if isinstance(self.teacher_readout, AttentionPixel):
            pixels = self.teacher_readout.largest(answer.features)
            if isinstance(readout, AttentionPixel):
                readout = rules.SameMap(readout, answer.features[self.teacher_readout.layer].shape[2:])
        context = Context(batch.label, answer.outputs, pixels)
        settings: dict[str, Any] = {"readout": readout, "context": context, "batch_norm": self.batch_norm}
        try:
            result = self._products(batch, answer, settings, traced=measured)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"`student` of `Distillation` cannot be differentiated as `probe` needs: {error} Here that is "
                "probe=AntitheticNoise(sigma=...), with values only; jacmatch.doctor(student, x) names the cause."
            ) from error
        rules.same_outputs(result.values, answer.values, self.readout)
        return result.outputs, result.products

    def _products(self, batch: Batch, answer: Answer, settings: dict[str, Any], *, traced: bool) -> Products:
        if self.probe.side == "input":
            step = getattr(self.probe, "step", None)
            with exact_values(batch.x) if step is not None else nullcontext():
                return push(self.student, batch.x, self._directions(batch, None), step=step, **settings)
        assert answer.cotangents is not None
        # Directions that ask for a gradient betray a backward that can be taken only once, where nothing else would.
        v = answer.cotangents.to(batch.x.dtype, copy=True).requires_grad_(traced)

        def checked(values: Tensor) -> Tensor:
            rules.same_outputs(values, answer.values, self.readout)
            return v

        return pull(self.student, batch.x, checked, **settings)

    def _terms(
        self, batch: Batch, answer: Answer | None, outputs: Tensor, products: Tensor | None
    ) -> dict[str, Tensor]:
        terms = {}
        if self.balance.weights["labels"]:
            assert batch.labels is not None
            terms["labels"] = label_term(self.task, outputs, batch.labels, batch.partner_labels, batch.share)
        if answer is not None and self.balance.weights["outputs"]:
            rules.same_outputs(outputs, answer.outputs)
            terms["outputs"] = output_term(self.output_loss, outputs, answer.outputs, self.temperature)
        if answer is not None and answer.products is not None and products is not None:
            terms["jacobians"] = jacobian_term(self.jacobian_loss, products, answer.products)
        return terms

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the student: calls, factors and shares."""
        return {"calls": self.calls, "factors": dict(self.balance.factors), "shares": dict(self.balance.shares)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up where `get_extra_state` left off."""
        self.calls = state["calls"]
        self.balance.factors, self.balance.shares = dict(state["factors"]), dict(state["shares"])
