"""Distillation by values and slopes: labels + outputs + Jacobians."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from jacmatch.errors import InputError
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
from jacmatch.losses import JACOBIAN_LOSSES, OUTPUT_LOSSES
from jacmatch.losses import outputs as output_losses
from jacmatch.objectives import rules
from jacmatch.objectives.base import Balance, Share, Terms
from jacmatch.objectives.points import AtData, AtMixedPairs, Point
from jacmatch.objectives.schedules import WeightSchedule
from jacmatch.teachers import Answer, Question, Teacher, as_teacher


@dataclass(frozen=True)
class _Batch:
    """A batch at the points where it is compared.

    Where pairs are mixed, `share` is that of the first of each pair; readouts then know no label.
    """

    x: Tensor
    labels: Tensor | None
    partners: Tensor
    partner_labels: Tensor | None
    share: Tensor | None
    ids: Tensor
    draw: int

    @property
    def label(self) -> Tensor | None:
        return self.labels if self.share is None else None


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

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        *,
        labels: float = 1.0,
        outputs: float = 1.0,
        jacobians: float = Share(0.3),
        probe: Estimator | None = None,
        readout: Readout | tuple[Readout, Readout] | None = None,
        output_loss: Literal["squared", "kl"] = "squared",
        temperature: float = 1.0,
        jacobian_loss: Literal["relative", "squared", "normalized"] = "relative",
        point: Point | None = None,
        every: int = 1,
        schedule: WeightSchedule | None = None,
        batch_norm: BatchNormPolicy = "batch",
        task: Literal["classification", "regression"] = "classification",
        seed: int = 0,
        measure_every: int = 100,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else as_teacher(teacher)
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
        for name, known, given in (
            ("output_loss", OUTPUT_LOSSES, output_loss),
            ("jacobian_loss", JACOBIAN_LOSSES, jacobian_loss),
            ("task", ("classification", "regression"), task),
        ):
            rules.known_setting(name, given, known)
        rules.positive_settings(every=every, measure_every=measure_every, temperature=temperature)
        rules.has_a_term(self.balance.weights)
        if isinstance(self.point, AtMixedPairs):
            rules.mixable(self.probe, self.readout, task, self.balance.weights)
        if self.teacher is not None:
            rules.separate(student, self.teacher)
            if self.balance.weights["jacobians"]:
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
        progress: float = 0.0,
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
            InputError: labels are missing, or student and teacher do not go together.
        """
        draw = self.calls
        if self.training:
            self.calls += 1
        factor = self._jacobian_factor(draw, progress)
        batch = self._moved(x, y, ids, partners, partner_labels, draw)
        answer = self._ask(batch, slopes=factor > 0)
        outputs, products = self._student(batch, answer)
        unweighted = self._terms(batch, answer, outputs, products)
        if self.training and torch.is_grad_enabled() and draw % self.measure_every == 0:
            self.balance.measure(unweighted, [p for p in self.student.parameters() if p.requires_grad])
        factors = {**self.balance.factors, "jacobians": self.balance.factors["jacobians"] * factor}
        values = {name: factors[name] * term for name, term in unweighted.items()}
        total = torch.stack(list(values.values())).sum()
        shares = dict(self.balance.shares)
        return Terms({"loss": total, **values}, outputs, None if answer is None else answer.outputs, unweighted, shares)

    def _jacobian_factor(self, draw: int, progress: float) -> float:
        if not self.balance.weights["jacobians"] or (self.training and draw % self.every):
            return 0.0
        return self.schedule(progress) * (self.every if self.training else 1)

    def _moved(
        self, x: Tensor, y: Tensor | None, ids: Tensor | None, partners: Tensor | None, other: Tensor | None, draw: int
    ) -> _Batch:
        if self.balance.weights["labels"] and y is None:
            raise InputError("`y` must be given where `labels` has a weight.", do="Set labels=0 to train without.")
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        if partners is None:
            partners, other = x.roll(1, 0), None if y is None else y.roll(1, 0)
        moved, share = self.point.move(x, partners, ids=ids, seed=self.seed, draw=draw)
        return _Batch(moved, y, partners, other, share, ids, draw)

    def _ask(self, batch: _Batch, *, slopes: bool) -> Answer | None:
        if self.teacher is None or not (slopes or self.balance.weights["outputs"]):
            return None
        question = Question(readout=self.teacher_readout, labels=batch.label)
        if slopes and self.probe.side == "output":
            question = Question(
                readout=self.teacher_readout,
                labels=batch.label,
                cotangents=lambda values: self._directions(batch, values.to(batch.x.dtype)).to(values.dtype),
            )
        elif slopes:
            tangents = self._directions(batch, None)
            step = getattr(self.probe, "step", None)
            question = Question(readout=self.teacher_readout, labels=batch.label, tangents=tangents, step=step)
        return self.teacher.answer(batch.x, question)

    def _directions(self, batch: _Batch, values: Tensor | None) -> Tensor:
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

    def _student(self, batch: _Batch, answer: Answer | None) -> tuple[Tensor, Tensor | None]:
        if answer is None or answer.products is None:
            outputs, _ = run(self.student, batch.x)
            return outputs, None
        pixels = None
        if isinstance(self.teacher_readout, AttentionPixel):
            pixels = self.teacher_readout.largest(answer.features)
        context = Context(batch.label, answer.outputs, pixels)
        settings: dict[str, Any] = {"readout": self.readout, "context": context, "batch_norm": self.batch_norm}
        result: Products
        if self.probe.side == "output":
            assert answer.cotangents is not None
            result = pull(self.student, batch.x, answer.cotangents.to(batch.x.dtype), **settings)
        else:
            step = getattr(self.probe, "step", None)
            result = push(self.student, batch.x, self._directions(batch, None), step=step, **settings)
        return result.outputs, result.products

    def _terms(
        self, batch: _Batch, answer: Answer | None, outputs: Tensor, products: Tensor | None
    ) -> dict[str, Tensor]:
        terms = {}
        if self.balance.weights["labels"]:
            terms["labels"] = self._label_term(batch, outputs.float()).mean()
        if answer is not None and self.balance.weights["outputs"]:
            if outputs.shape != answer.outputs.shape:
                raise InputError(
                    "Student and teacher must have the same outputs.",
                    got=f"{tuple(outputs.shape[1:])} and {tuple(answer.outputs.shape[1:])}",
                    do="Build the student with the teacher's number of classes.",
                )
            if self.output_loss == "kl":
                each = output_losses.hinton_kl(outputs.float(), answer.outputs.float(), self.temperature)
            else:
                each = output_losses.squared_error(outputs.float(), answer.outputs.float())
            terms["outputs"] = each.mean()
        if answer is not None and answer.products is not None and products is not None:
            rows, wanted = (p.transpose(0, 1).float() for p in (products, answer.products))
            terms["jacobians"] = JACOBIAN_LOSSES[self.jacobian_loss](rows, wanted).mean()
        return terms

    def _label_term(self, batch: _Batch, outputs: Tensor) -> Tensor:
        """Per sample; at mixed pairs λ ℓ(y) + (1 − λ) ℓ(y′), which for cross-entropy is the loss of the mixed label."""
        loss = output_losses.cross_entropy if self.task == "classification" else output_losses.squared_error
        assert batch.labels is not None
        each = loss(outputs, batch.labels)
        if batch.share is None:
            return each
        if batch.partner_labels is None:
            raise InputError("`partner_labels` must be given with `partners` where `labels` has a weight.")
        return batch.share * each + (1 - batch.share) * loss(outputs, batch.partner_labels)

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the student: calls, factors and shares."""
        return {"calls": self.calls, "factors": self.balance.factors, "shares": self.balance.shares}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up where `get_extra_state` left off."""
        self.calls = state["calls"]
        self.balance.factors, self.balance.shares = dict(state["factors"]), dict(state["shares"])
