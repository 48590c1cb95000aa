"""Distillation of values and derivatives: labels + outputs + Jacobians."""

import warnings
from dataclasses import dataclass
from typing import Any, Final

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from jacmatch.errors import ClassDimensionError, InputError
from jacmatch.jacobian import (
    BatchNormPolicy,
    Engine,
    Estimator,
    Logits,
    OutputsFrom,
    RandomOutputs,
    Readout,
    TokenSubstitutions,
)
from jacmatch.losses import IGNORED, JacobianLoss, OutputLoss, Positions, Task
from jacmatch.models import FirstOutputs
from jacmatch.objectives import validation
from jacmatch.objectives.base import Computed, Objective, Output
from jacmatch.objectives.compiled import Compared, Step
from jacmatch.objectives.differentiation import Differentiation
from jacmatch.objectives.terms import AtData, Batch, Point, jacobian_term, label_term, output_term, positions_of
from jacmatch.objectives.weights import WeightSchedule, describe_labels, labels_of, needs_single_label, recipe
from jacmatch.teachers import Answer, Question, Teacher

_NOT_KNOWN: Final = (
    "`Distillation` compares outputs alone: whether Jacobians help depends on the amount of data, and "
    "`samples_per_class` is not given. Pass samples_per_class=..., use Distillation.for_dataset(student, teacher, "
    "training_set), or pass jacobians=0 for outputs alone."
)


@dataclass(frozen=True)
class _Comparison:
    """The losses of `Distillation`."""

    task: Task
    output_loss: OutputLoss
    temperature: float | int
    jacobian_loss: JacobianLoss
    class_dim: int | None
    classes: int | None = None
    positions: Positions = "sum"

    def __call__(self, outputs: Tensor, values: Tensor, rows: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Return the terms whose tensors the step contains."""
        terms = {}
        if step.labels is not None:
            mixed, of_labels = (
                (step.partner_labels, step.share),
                outputs[:, : self.classes] if self.classes else outputs,
            )
            terms["labels"] = label_term(self.task, of_labels, step.labels, *mixed, class_dim=self.class_dim)
        if step.targets is not None:
            compared = outputs[:, self.classes :] if self.classes else outputs
            terms["outputs"] = output_term(self.output_loss, compared, step.targets, self.temperature, self.class_dim)
        if rows is not None and step.rows is not None:
            terms["jacobians"] = jacobian_term(self.jacobian_loss, rows, step.rows)
        if self.positions == "mean":  # for terms that are sums over positions; other Jacobian losses are ratios
            number = positions_of(outputs, self.class_dim)
            sums = {name for name in terms if name != "jacobians" or self.jacobian_loss == "squared"}
            terms = {name: term / number if name in sums else term for name, term in terms.items()}
        return terms


class Distillation(Objective):
    """Labels, the teacher's outputs and the teacher's Jacobian, as one loss: ℓ = Σⱼ wⱼ ℓⱼ.

    Each term is a sum over outputs, rows and input elements and a mean over the batch. The teacher is queried once and
    the student run once for each batch. `parameters` are those of the student, and `state_dict` adds the state of the
    loss weights; the teacher is not part of the module.

    Args:
        student: The network to train; any nn.Module with outputs (B, K).
        teacher: A teacher or an nn.Module; None to train on labels alone.
        samples_per_class: Training samples for each class. The defaults of `output_loss`, `temperature`, `point`,
            `jacobians` and `schedule` follow from it and `task` (`objectives.weights.recipe`); `for_dataset` counts it.
            With None, data are assumed not to be scarce: classification has no Jacobian term unless `jacobians` or
            another setting of that term is given.
        labels: Weight of the label term: cross-entropy, or squared error in regression.
        outputs: Weight of the output term.
        jacobians: Weight of the Jacobian term. A `GradientShare` is the share of the gradient norm; 0 computes no
            derivative.
        probe: The derivative products that are compared; None means RandomOutputs(1).
        readout: What is differentiated; a pair (student's, teacher's) where they differ.
        output_loss: `squared` logit differences (the paper's choice), or Hinton's `kl` with τ². None is `kl` at τ = 4
            in classification, `squared` in regression.
        temperature: τ of `kl`; None is 1 where `output_loss` is given.
        jacobian_loss: `bounded` (None), d / (d + t) with d the squared error of a sample and t the squared norm of the
            teacher's products; `relative`, the squared error over the mean squared norm of the teacher's products, 1
            for a student with zero derivatives; `squared`; or `normalized`, which compares only the direction of each
            row.
        point: The inputs at which student and teacher are compared.
        every: The Jacobian term is computed on each n-th call in training, with n times its weight; a
            `GradientShare` is that of such a call.
        fraction: Share of a batch, its first samples, whose derivatives are compared; the term is their mean.
        engine: How Jv is taken for directions on the input side; see `jacmatch.jvp`.
        chunk_size: Rows whose graphs are in memory at once, for a probe of several output directions; None for all.
            Chunks of 1 need the memory of one row, and about 2½ times the time.
        schedule: Factor of the Jacobian weight, as a function of data size and progress.
        batch_norm: Policy for BatchNorm of the student in training mode.
        task: Whether labels are classes or numbers.
        seed: Seeds all directions.
        measure_every: Calls between two measurements of the shares.
        output: Selects the outputs where a network returns more than one tensor, for example `lambda out: out[0]`; a
            pair (student's, teacher's) where they differ.
        class_dim: The dimension of the classes of dense outputs, (B, K, H, W) or (B, T, K). None infers it from
            the layer that computes the student's outputs, if the last operation is a linear layer or a convolution.
        classes: K, if the last layer of the student has two heads: K outputs that learn the labels, followed by those
            that are compared with the teacher, whose outputs may be other classes or features. `student` is then the
            first head. None for one head.

        positions: Reduction of dense outputs over their positions, for values and derivatives alike. The terms that are
            sums over positions (labels, outputs and the `squared` Jacobian term) are the `sum`, or the `mean` over all
            positions, including those without a label. The other Jacobian losses are ratios, and do not change.
        ignore_index: The label of a position, in (B, H, W) or (B, T), that is left out of the label term.

    Dense outputs are compared position by position; all terms are means over the batch.

    Raises:
        InputError: a setting is invalid, or two settings are incompatible.
        UnsupportedError: the teacher cannot compute the products that the probe needs.

    Warns:
        UserWarning: there is a teacher but no Jacobian term, because the samples per class are not known.

    References:
        Srinivas & Fleuret 2018, arXiv:1803.00443; the total loss is that of the precursor (section 3).

    Example:
        >>> import torch
        >>> student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> objective = Distillation(student, teacher, samples_per_class=10)
        >>> terms = objective(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> terms.keys()
        ['loss', 'labels', 'outputs', 'jacobians']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | None = None,
        *,
        samples_per_class: float | int | None = None,
        labels: float | int = 1.0,
        outputs: float | int = 1.0,
        jacobians: float | int | None = None,
        probe: Estimator | None = None,
        readout: Readout | tuple[Readout, Readout] | None = None,
        output_loss: OutputLoss | None = None,
        temperature: float | int | None = None,
        jacobian_loss: JacobianLoss | None = None,
        point: Point | None = None,
        every: int = 1,
        fraction: float | int = 1.0,
        engine: Engine = "auto",
        chunk_size: int | None = None,
        schedule: WeightSchedule | None = None,
        batch_norm: BatchNormPolicy = "frozen",
        task: Task = "classification",
        seed: int = 0,
        measure_every: int = 100,
        output: Output = None,
        class_dim: int | None = None,
        classes: int | None = None,
        positions: Positions = "sum",
        ignore_index: int = IGNORED,
    ) -> None:
        validation.known_names("Distillation", task=task, positions=positions)
        own = Logits() if classes is None else OutputsFrom(classes)
        readouts = readout if isinstance(readout, tuple) else (readout or own, readout or Logits())
        settings = (probe, readout, jacobian_loss, chunk_size, schedule)
        derivatives = any(given is not None for given in settings) or (every, fraction, engine) != (1, 1, "auto")
        if teacher is None:
            outputs = jacobians = 0.0
        point = AtData() if point is None and isinstance(probe, TokenSubstitutions) else point
        losses: dict[str, Any] = {"output_loss": output_loss, "temperature": temperature, "point": point}
        needs: dict[str, Any] = {"single_label": needs_single_label(probe, *readouts), "derivatives": derivatives}
        chosen = recipe(task, samples_per_class, jacobians=jacobians, schedule=schedule, **losses, **needs)
        weights = {"labels": labels, "outputs": outputs, "jacobians": chosen.jacobians}
        calls: dict[str, Any] = {"every": every, "schedule": chosen.schedule, "measure_every": measure_every}
        probe = RandomOutputs(1) if probe is None else probe
        how = Differentiation(probe, *readouts, chosen.point, batch_norm, engine, seed, chunk_size, fraction)
        self.classes = classes
        student = student if classes is None else FirstOutputs(student, classes)
        super().__init__(student, teacher, weights, how, output=output, class_dim=class_dim, **calls)
        self.output_loss, self.temperature = chosen.output_loss, chosen.temperature
        self.jacobian_loss: JacobianLoss = "bounded" if jacobian_loss is None else jacobian_loss
        self.task, self.positions, self.ignore_index = task, positions, ignore_index
        self._check()
        if jacobians is None and not chosen.jacobians and samples_per_class is None:
            warnings.warn(_NOT_KNOWN, stacklevel=2)

    def _check(self) -> None:
        """Raise an error for settings that are invalid or incompatible."""
        how, weights = self.differentiation, self.loss_weights.weights
        names = {"output_loss": self.output_loss, "jacobian_loss": self.jacobian_loss}
        validation.known_names("Distillation", **names)
        validation.positive_settings("Distillation", temperature=self.temperature)
        readouts = (how.readout, how.teacher_readout)
        validation.fitting_task(how.probe, readouts, how.point, self.task, self.output_loss, weights)
        if self.teacher is not None and weights["jacobians"]:
            validation.answerable("Distillation", how.probe, self.teacher)

    @classmethod
    def for_dataset(
        cls,
        student: nn.Module,
        teacher: Teacher | nn.Module | None,
        dataset: object = None,
        *,
        samples_per_class: float | int | None = None,
        task: Task | None = None,
        **settings: Any,
    ) -> "Distillation":
        """Return the objective with the defaults for a training set, whose labels determine task and samples per class.

        Integer labels are classes, and float labels are numbers; one-hot rows are read as classes, with a warning. No
        input is loaded.

        Args:
            student: The network to train.
            teacher: A teacher or an nn.Module.
            dataset: The training set, its `DataLoader`, or all of its labels (N,) or (N, K).
            samples_per_class: Number to use instead of counting.
            task: Task to use instead of inferring it.
            **settings: Further settings of `Distillation`.

        Raises:
            InputError: neither a data set nor `samples_per_class` is given, or the labels are ambiguous.

        Example:
            >>> import torch
            >>> labels = torch.arange(10).repeat(20)
            >>> objective = Distillation.for_dataset(nn.Linear(4, 10), nn.Linear(4, 10), labels)
            >>> objective.schedule.samples_per_class, objective.output_loss
            (20.0, 'kl')
        """
        if dataset is not None:
            task, counted = describe_labels(labels_of(dataset), task)
            samples_per_class = counted if samples_per_class is None else samples_per_class
        elif samples_per_class is None and task != "regression":
            rule = "`dataset` or `samples_per_class` of `Distillation.for_dataset` must be given."
            raise InputError(rule, do="Pass the training set, its labels, or samples_per_class=...")
        return cls(student, teacher, samples_per_class=samples_per_class, task=task or "classification", **settings)

    def question(
        self,
        x: Float[Tensor, "batch *input"],
        y: Shaped[Tensor, "batch *out"] | None = None,
        *,
        ids: Int[Tensor, "batch"],
        draw: int,
        partners: Float[Tensor, "batch *input"] | None = None,
        partner_labels: Shaped[Tensor, "batch *out"] | None = None,
        products: bool = True,
    ) -> tuple[Float[Tensor, "batch *input"], Question]:
        """Return the inputs and the query that `forward` sends to the teacher; arguments as in `forward`.

        Without `products` the query is for the outputs alone.
        """
        batch = self._moved(x, y, draw=draw, ids=ids, partners=partners, partner_labels=partner_labels)
        return batch.x, self.differentiation.question(batch, products=products)

    def _terms(self, batch: Batch, count: int, *, measured: bool) -> Computed:
        answer, of_all = self._answers(batch, count, self._query)
        teacher_outputs = None if of_all is None else of_all.outputs
        step, how = self._step(batch, answer, teacher_outputs), self.differentiation

        def eager() -> Compared:
            first_or_all = batch.part(slice(count)) if count else batch
            outputs, products = self._in_parts(
                self.network,
                batch,
                len(first_or_all.x),
                lambda: how.of_student(self.network, first_or_all, answer, traced=measured),
            )
            validation.one_output_for_each("Distillation", outputs, batch.x)
            if step.targets is not None:
                validation.same_outputs(outputs if self.classes is None else outputs[:, self.classes :], step.targets)
            if step.labels is not None and outputs.dim() > 2 and self.class_dim is None and self._classes:
                self._read_class_dim(batch)
            return outputs, self._comparison(outputs, outputs, products, step)

        outputs, terms = self._compiled_step(step, self._comparison, how.readout, eager, count > 0, measured)
        first_head = outputs[:, : self.classes] if self.classes else outputs
        return first_head, teacher_outputs, terms, step.rows

    def _step(self, batch: Batch, answer: Answer | None, teacher_outputs: Tensor | None) -> Step:
        """Return the tensors needed by the terms that have a weight."""
        weights = self.loss_weights.weights
        labels, others = (batch.labels, batch.partner_labels) if weights["labels"] else (None, None)
        step = Step(batch.x, labels, None if batch.share is None else others, batch.share)
        step.targets = teacher_outputs if weights["outputs"] else None
        step.arguments = batch.arguments
        if answer is not None and answer.products is not None:
            step.v, step.rows = answer.cotangents, answer.products
            step.label, step.teacher_outputs = batch.label, answer.outputs
        return step

    @property
    def _comparison(self) -> "_Comparison":
        losses = (self.task, self.output_loss, self.temperature, self.jacobian_loss)
        return _Comparison(*losses, self.class_dim, self.classes, self.positions)

    @property
    def _classes(self) -> bool:
        return self.task == "classification"

    def _query(self, batch: Batch, *, products: bool) -> Answer | None:
        if self.teacher is None or not (products or self.loss_weights.weights["outputs"]):
            return None
        try:
            answer = self.differentiation.ask(self.teacher, batch, products=products)
        except ClassDimensionError:
            self._read_class_dim(batch)
            answer = self.differentiation.ask(self.teacher, batch, products=products)
        classes = self._classes and (self.output_loss == "kl" or self.loss_weights.weights["labels"])
        if answer.outputs.dim() > 2 and self.class_dim is None and classes:
            self._read_class_dim(batch)
        return answer
