"""The defaults of distillation, for `Distillation` in Python and `jacmatch distill` alike.

The benefit of derivatives depends on the amount of data: they help most at 5 to 10 samples per class and cost accuracy
from about 500 on. So the defaults depend on the number of samples per class, which is given or counted, never assumed.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.jacobian import Estimator, LabelClass, LabelLogit, Loss, Readout
from jacmatch.losses import OutputLoss, Task
from jacmatch.objectives.points import AtData, AtMixedPairs, Point
from jacmatch.objectives.weights import GradientShare, WeightSchedule

TEMPERATURE: Final = 4.0
"""τ of the KL divergence that is the output loss of a classification."""
SHARE: Final = 0.3
"""Share of the Jacobian term in the gradient norm, where there is such a term."""
SCARCE: Final = 30
"""Samples per class up to which networks are compared between data points (`AtMixedPairs`).

At 100 per class mixing still helps networks without normalization and already costs those with BatchNorm accuracy, on
validation images: docs/results/default-recipe.md."""
WORTHWHILE: Final = 200
"""Samples per class up to which there is a Jacobian term.

It gains up to 500 in as many steps; in the same time plain KL is as good at 300 and better at 500, on validation
images."""


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
    """Return the settings of a distillation: given values are kept, and None is replaced by the default.

    | | classification | regression |
    |---|---|---|
    | `output_loss` | `kl` at τ = 4; an explicit `kl` without a temperature has τ = 1 | `squared` |
    | `point` | mixed pairs up to 30 samples per class, unless `single_label`; else the data | the data |
    | `jacobians` | `GradientShare(0.3)` up to 200 samples per class; else 0, and no derivative is computed | \
`GradientShare(0.3)` |

    With `samples_per_class=None` the data of a classification are assumed not to be scarce: there is no Jacobian term
    unless `derivatives` requests it.

    `single_label` says that probe or readouts need the label of a single sample, which a mixed pair does not have, and
    `derivatives` that a setting of the Jacobian term was given, which requests that term for any amount of data. With
    given `jacobians` the schedule is constant unless it is given too.
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

    Args:
        data: The labels themselves (tensor, array or list), or a data set with `targets`, `labels`, `y` or `tensors`,
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
    return InputError(
        "`dataset` of `Distillation.for_dataset` must have its labels as `targets`, `labels`, `y` or the second of "
        "`tensors`, or be the labels.",
        got=got,
        do=_REMEDY,
    )


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
                "Pass task='classification' to say so, or task='regression' for numbers.",
                stacklevel=3,
            )
        return "classification", len(labels) / _distinct(labels.argmax(1))
    if task == "classification":
        raise _unusable("must be class numbers, or probabilities (N, K)", labels, "Convert class numbers by .long().")
    if labels.dim() == 1 and bool((labels == labels.round()).all()) and _distinct(labels) <= len(labels) / 2:
        do = "Convert class numbers by .long(), or pass task='regression' for numbers."
        raise _unusable("are whole numbers of a floating-point type", labels, do)
    return "regression", None


def _distinct(labels: Tensor) -> int:
    return len(torch.unique(labels))


def _unusable(what: str, labels: Tensor, do: str) -> InputError:
    kind = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
    return InputError(f"The labels of `dataset` of `Distillation.for_dataset` {what}.", got=kind, do=do)
