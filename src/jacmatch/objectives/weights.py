"""Weights of the terms: plain numbers, shares of the gradient norm, and schedules; also the defaults of distillation.

The terms of a loss have different scales, and these change while a network learns. A weight given as a share is the
contribution of the term to the norm of the parameter gradient. The norms are measured from time to time, and the factor
of the term is set from them.

The benefit of derivatives depends on the amount of data: they help most at 5 to 10 samples per class and cost accuracy
from about 500 on. So the defaults depend on the number of samples per class, which is given or counted, never assumed.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import Estimator, LabelClass, LabelLogit, Loss, Readout, gradient_norms
from jacmatch.jacobian.engines import meets_once_differentiable
from jacmatch.losses import OutputLoss, Task
from jacmatch.objectives.terms import AtData, AtMixedPairs, Part, Point

Whole = Callable[[str, list[Tensor | None]], list[Tensor | None]]


class GradientShare(float):
    """A weight as a share of the gradient norm: 0 ≤ share < 1, share of term j = wⱼ‖∂ℓⱼ/∂θ‖ ÷ Σᵢ wᵢ‖∂ℓᵢ/∂θ‖.

    It is the share in each call that computes the term; with `every=4`, three of four calls do not. A term whose share
    has not been measured yet is not part of the loss.

    Example:
        >>> GradientShare(0.3)
        GradientShare(0.3)
    """

    def __new__(cls, share: float | int) -> "GradientShare":
        """Check the range."""
        if not 0 <= share < 1:
            raise InputError("A `GradientShare` must be at least 0 and below 1.", got=share)
        return super().__new__(cls, share)

    def __repr__(self) -> str:
        return f"GradientShare({float(self)})"


@dataclass(frozen=True)
class WeightSchedule:
    """A factor in [0, 1] for the weight of the Jacobian term.

    As a function of the data size it is 1 / (1 + (n / `halves_at`)⁴), n images per class: in the paper's tables the
    term helps most at 5 to 10 images per class and costs accuracy from about 500 on (precursor, tables 1 and 2). With
    the exponent 2 instead of 4, the term lowered the accuracy by 0.6 points at 1,000 images per class of Fashion-MNIST.
    As a function of progress it is 1 until `fades_from`, and then falls to 0 at the end of training along a cosine.

    Attributes:
        samples_per_class: n, above 0; None is treated as scarce data.
        halves_at: n at which the factor is one half.
        fades_from: Progress in [0, 1] from which the factor decreases; with 1 it never does.
    """

    samples_per_class: float | int | None = None
    halves_at: float | int = 300.0
    fades_from: float | int = 1.0

    def __post_init__(self) -> None:
        if self.samples_per_class is not None and not self.samples_per_class > 0:
            raise InputError("`samples_per_class` of `WeightSchedule` must be positive.", got=self.samples_per_class)
        if not self.halves_at > 0:
            raise InputError("`halves_at` of `WeightSchedule` must be positive.", got=self.halves_at)
        if not 0 <= self.fades_from <= 1:
            raise InputError("`fades_from` of `WeightSchedule` must lie in [0, 1].", got=self.fades_from)

    def __call__(self, progress: float | int) -> float:
        """The factor at this progress, the fraction of the training that is done; values above 1 count as 1.

        Example:
            >>> WeightSchedule(samples_per_class=300)(0.0)
            0.5
        """
        size = 1.0 if self.samples_per_class is None else 1 / (1 + (self.samples_per_class / self.halves_at) ** 4)
        if progress <= self.fades_from or self.fades_from == 1:
            return size
        done = min(1.0, (progress - self.fades_from) / (1 - self.fades_from))
        return size * 0.5 * (1 + math.cos(math.pi * done))


class LossWeights:
    """Convert weights, some of them shares, into factors, and store the measured shares.

    Args:
        weights: Weight of each term: a number ≥ 0, or a `GradientShare`.

    Attributes:
        factors: Factor of each term, without `every` and schedules; None for a `GradientShare` that is not measured
            yet.
        shares: Share of each term in the gradient norm at the last measurement.
        part: The part of each batch that this process has, if several processes train together.

    Raises:
        InputError: a weight is negative or not finite, or the shares add up to 1 or more.
    """

    def __init__(self, weights: dict[str, float | int]) -> None:
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"The weight of `{name}` must be at least 0 and finite.", got=weight)
        if sum(weight for weight in weights.values() if isinstance(weight, GradientShare)) >= 1:
            raise InputError("The shares of all terms must add up to less than 1.", got=weights)
        self.weights = weights
        self.factors = {name: weight for name, weight in weights.items() if not isinstance(weight, GradientShare)}
        self.shares: dict[str, float] = {}
        self.part: Part | None = None

    @contextmanager
    def in_part(self, part: Part | None) -> Iterator[None]:
        """Context in which this process has a part of each batch."""
        self.part = part
        try:
            yield
        finally:
            self.part = None

    @property
    def unmeasured(self) -> set[str]:
        """Terms whose share has not been measured yet."""
        return {name for name, weight in self.weights.items() if weight and name not in self.factors}

    def weigh(self, unweighted: Mapping[str, Tensor], times: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Return the weighted terms, `times` further factors; one whose share was never measured is left out."""
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
        """Measure gradient norms and set the factors of terms given as shares; return whether all norms are finite.

        With N the total of all weighted norms, the factor of a term with share s and norm n is s N / n. A schedule
        reduces a weight afterwards, and the measured shares include it. If a norm is not finite, nothing changes; where
        a norm is 0, the factor of that share is left unchanged.

        Raises:
            UnsupportedError: the graph is cut: a term lacks all or part of its gradient, although its value is large
                enough to have one.
        """
        if any(hasattr(each, "full_tensor") for each in parameters):  # sharded: see `Objective.check_sharded`
            return True
        measured = _norms(unweighted, parameters, self._whole(parameters, firsts or {}))
        norms = {name: float(measured.get(name, 0.0)) for name in unweighted}
        for name in unweighted:  # a gradient of exactly 0 is valid: units may be inactive for the whole batch
            numbers = torch.finfo(unweighted[name].dtype)  # below, a gradient of 0 may be an underflow of the type
            cut = name not in measured and self.weights[name] > 0
            if cut and float(unweighted[name].detach()) > numbers.tiny / numbers.eps:
                raise UnsupportedError(
                    f"The term `{name}` has no gradient with respect to the student: something cuts it off (detach, "
                    "no_grad). See jacmatch.doctor(student, x)."
                )
        if not all(map(math.isfinite, norms.values())):  # a bad batch: earlier measurements are kept
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
        """Return the number of samples of the whole batch, of which this process has `here`."""
        return here if self.part is None else self.part.samples

    def own(self, first: int) -> int:
        """Return how many of the first `first` samples of the whole batch this process has."""
        return first if self.part is None else self.part.own(first)

    def _whole(self, parameters: list[nn.Parameter], firsts: Mapping[str, int]) -> Whole | None:
        """Return the function that computes gradients over the whole batch from those of this process."""
        if (part := self.part) is None:
            return None
        return lambda name, gradients: part.whole(gradients, parameters, firsts.get(name, part.samples))

    def _shared(self, name: str) -> bool:
        return isinstance(self.weights[name], GradientShare)


def _norms(terms: dict[str, Tensor], parameters: list[nn.Parameter], whole: Whole | None) -> dict[str, Tensor]:
    """Return the gradient norms, if all terms can be differentiated."""
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
        "jacmatch.doctor(student, x) has details."
    )


TEMPERATURE: Final = 4.0
"""τ of the KL divergence that is the output loss of a classification."""
SHARE: Final = 0.3
"""Share of the Jacobian term in the gradient norm, where there is such a term."""
SCARCE: Final = 30
"""Samples per class up to which networks are compared between data points (`AtMixedPairs`).

At 100 per class, mixing helps networks without normalization, and lowers the validation accuracy of those with
BatchNorm: docs/results/default-recipe.md."""
WORTHWHILE: Final = 200
"""Samples per class up to which there is a Jacobian term.

In equal steps it raises the validation accuracy up to 500; in equal time plain KL is as good at 300, better at 500."""


@dataclass(frozen=True)
class Recipe:
    """The resolved settings: which losses, and the points at which they are evaluated."""

    output_loss: OutputLoss  # loss of the output term
    temperature: float | int  # τ of `kl`
    point: Point  # the inputs at which student and teacher are compared
    jacobians: float | int  # weight of the Jacobian term; 0 if no derivative is computed
    schedule: WeightSchedule  # factor of that weight


def recipe(
    task: Task,
    samples_per_class: float | int | None = None,
    *,
    single_label: bool = False,
    derivatives: bool = False,
    output_loss: OutputLoss | None = None,
    temperature: float | int | None = None,
    point: Point | None = None,
    jacobians: float | int | None = None,
    schedule: WeightSchedule | None = None,
) -> Recipe:
    """Return the settings of a distillation: given values are used, and None is replaced by the default.

    | | classification | regression |
    |---|---|---|
    | `output_loss` | `kl` at τ = 4; an explicit `kl` without a temperature has τ = 1 | `squared` |
    | `point` | mixed pairs up to 30 samples per class, unless `single_label`; else the data | the data |
    | `jacobians` | `GradientShare(0.3)` up to 200 samples per class; else 0, and no derivative is computed | \
`GradientShare(0.3)` |

    With `samples_per_class=None` the data of a classification are assumed not to be scarce: there is no Jacobian term
    unless `derivatives` requests it.

    `single_label` says that probe or readouts need the label of a single sample, which a mixed pair does not have, and
    `derivatives` that a setting of the Jacobian term was given, which requests that term for any amount of data. If
    `jacobians` is given and the schedule is not, the schedule is constant.
    """
    if samples_per_class is not None and not samples_per_class > 0:
        raise InputError("`samples_per_class` of `Distillation` must be positive.", got=samples_per_class)
    classes = task == "classification"
    if schedule is None:
        schedule = WeightSchedule(samples_per_class if classes and jacobians is None else None)
    if jacobians is None:
        known = samples_per_class is not None and samples_per_class <= WORTHWHILE
        jacobians = GradientShare(SHARE) if derivatives or known or not classes else 0.0
    usual = TEMPERATURE if classes and output_loss is None else 1.0
    if output_loss is None:
        output_loss = "kl" if classes else "squared"
    if point is None:
        scarce = classes and samples_per_class is not None and samples_per_class <= SCARCE
        point = AtMixedPairs() if scarce and not single_label else AtData()
    return Recipe(output_loss, usual if temperature is None else temperature, point, jacobians, schedule)


def needs_single_label(probe: Estimator | None, *readouts: Readout | None) -> bool:
    """Whether a probe or readout needs the label of a single sample."""
    return isinstance(probe, LabelClass) or any(isinstance(readout, LabelLogit | Loss) for readout in readouts)


_REMEDY = "Give samples_per_class=... instead (training samples divided by classes), and task=... for a regression."


def labels_of(data: object) -> Tensor:
    """Return all labels (N,) or (N, K) of a data set, without loading any input.

    `data` are the labels themselves (tensor, array or list), or a data set with `targets`, `labels`, `y` or `tensors`,
    a column `label` or `labels` (Hugging Face), a `Subset` or `ConcatDataset` of these, or a `DataLoader`.
    """
    if isinstance(data, Tensor):
        return data.detach()
    if isinstance(data, np.ndarray | list | tuple | range):
        try:
            return torch.as_tensor(np.asarray(data))
        except (TypeError, ValueError) as error:
            raise _no_labels(type(data).__name__) from error
    if isinstance(data, torch.utils.data.DataLoader):
        return labels_of(data.dataset)
    if isinstance(data, torch.utils.data.ConcatDataset):
        return torch.cat([labels_of(part) for part in data.datasets])
    indices, whole = getattr(data, "indices", None), getattr(data, "dataset", None)
    if indices is not None and whole is not None:
        return labels_of(whole)[torch.as_tensor(indices)]
    return labels_of(_column(data))


def _column(data: Any) -> Any:
    """Return the labels from the attribute or column in which a data set stores them."""
    tensors = getattr(data, "tensors", None)
    if isinstance(tensors, tuple | list) and len(tensors) == 2:
        return tensors[1]
    for name in ("targets", "labels", "y"):
        labels = getattr(data, name, None)
        if isinstance(labels, Tensor | np.ndarray | list | tuple):
            return labels
    columns = getattr(data, "column_names", None)
    if isinstance(columns, Iterable):
        for name in ("label", "labels"):
            if name in columns:
                return list(data[name])
    raise _no_labels(type(data).__name__)


def _no_labels(got: str) -> InputError:
    rule = (
        "`dataset` of `Distillation.for_dataset` must have its labels as `targets`, `labels`, `y` or the second of "
        "`tensors`, or be the labels."
    )
    return InputError(rule, got=got, do=_REMEDY)


def describe_labels(labels: Tensor, task: Task | None = None) -> tuple[Task, float | None]:
    """Return the task, and the samples per class (None in a regression).

    Integers (N,) are classes, and floats are numbers. Rows of zeros with a single 1 are one-hot classes, with a
    warning.
    """
    if task == "regression":
        return task, None
    if labels.numel() == 0 or labels.is_complex() or labels.dim() == 0:
        raise _unusable("must be classes (N,), or numbers (N,) or (N, K)", labels, _REMEDY)
    if not labels.is_floating_point():
        if labels.dim() != 1:
            raise _unusable("must be one class for each sample", labels, _REMEDY)
        return "classification", len(labels) / _distinct(labels)
    distributions = labels.dim() == 2 and labels.shape[1] > 1 and bool((labels >= 0).all())
    distributions = distributions and bool(((labels.sum(1) - 1).abs() < 1e-3).all())
    if distributions:
        one_hot = bool(((labels == 0) | (labels == 1)).all())
        if task is None and not one_hot:
            do = "Pass task='classification' for probabilities of classes, task='regression' for numbers."
            raise _unusable("have rows that sum to 1", labels, do)
        if task is None:
            warnings.warn(
                "`dataset` of `Distillation.for_dataset` has float labels whose rows are one-hot: taken as classes. "
                "Pass task='classification' to confirm, or task='regression' for numbers.",
                stacklevel=3,
            )
        return "classification", len(labels) / _distinct(labels.argmax(1))
    if task == "classification":
        raise _unusable("must be class indices, or probabilities (N, K)", labels, "Convert class indices by .long().")
    if labels.dim() == 1 and bool((labels == labels.round()).all()) and _distinct(labels) <= len(labels) / 2:
        do = "Convert class indices by .long(), or pass task='regression' for numbers."
        raise _unusable("are integers of a floating-point type", labels, do)
    return "regression", None


def _distinct(labels: Tensor) -> int:
    return len(torch.unique(labels))


def _unusable(what: str, labels: Tensor, do: str) -> InputError:
    kind = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
    return InputError(f"The labels of `dataset` of `Distillation.for_dataset` {what}.", got=kind, do=do)
