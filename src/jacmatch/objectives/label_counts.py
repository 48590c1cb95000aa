"""What the labels of a data set say: classes or numbers, and how many samples each class has."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.objectives.recipe import Task

_REMEDY = "Give samples_per_class=... instead (training samples divided by classes), and task=... for a regression."


def labels_of(data: object) -> Tensor:
    """Return all labels (N,) or (N, K) of a data set, without loading one input.

    Args:
        data: The labels themselves (tensor, array or list), or a data set with `targets`, `labels`, `y` or `tensors`,
            a column `label` or `labels` (Hugging Face), a `Subset` or `ConcatDataset` of such, or a `DataLoader`.

    Raises:
        InputError: the labels cannot be had without going through the inputs.

    Example:
        >>> labels_of(torch.utils.data.TensorDataset(torch.rand(3, 2), torch.tensor([0, 1, 1])))
        tensor([0, 1, 1])
    """
    if isinstance(data, Tensor):
        return data.detach()
    if isinstance(data, np.ndarray | list | tuple | range):
        try:
            return torch.as_tensor(np.asarray(data))
        except (TypeError, ValueError) as error:
            raise _unreadable(type(data).__name__) from error
    if isinstance(data, torch.utils.data.DataLoader):
        return labels_of(data.dataset)
    if isinstance(data, torch.utils.data.ConcatDataset):
        return torch.cat([labels_of(part) for part in data.datasets])
    indices, whole = getattr(data, "indices", None), getattr(data, "dataset", None)
    if indices is not None and whole is not None:
        return labels_of(whole)[torch.as_tensor(indices)]
    return labels_of(_column(data))


def _column(data: Any) -> Any:
    """The labels where a data set keeps them."""
    tensors = getattr(data, "tensors", None)
    if isinstance(tensors, tuple | list) and len(tensors) == 2:
        return tensors[1]
    for name in ("targets", "labels", "y"):
        found = getattr(data, name, None)
        if isinstance(found, Tensor | np.ndarray | list | tuple):
            return found
    columns = getattr(data, "column_names", None)
    if isinstance(columns, Iterable):
        for name in ("label", "labels"):
            if name in columns:
                return list(data[name])
    raise _unreadable(type(data).__name__)


def _unreadable(got: str) -> InputError:
    return InputError(
        "`dataset` of `Distillation.for_dataset` must have its labels as `targets`, `labels`, `y` or the second of "
        "`tensors`, or be the labels.",
        got=got,
        do=_REMEDY,
    )


def describe_labels(labels: Tensor, task: Task | None = None) -> tuple[Task, float | None]:
    """Return the task, and the samples per class (None in a regression).

    Integers (N,) are classes, floats numbers. Rows of zeros with a single 1 are one-hot classes, with a warning.

    Args:
        labels: All labels of the training set.
        task: Where it is known already.

    Raises:
        InputError: the labels may be classes as well as numbers, or are neither.

    Example:
        >>> describe_labels(torch.tensor([0, 0, 1, 1])), describe_labels(torch.tensor([0.5, 1.7]))
        (('classification', 2.0), ('regression', None))
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
