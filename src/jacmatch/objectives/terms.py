"""The terms of distillation: each a mean over the batch, in float32 at least whatever the networks computed in."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.losses import JACOBIAN_LOSSES
from jacmatch.losses import outputs as output_losses


def label_term(
    task: str,
    outputs: Tensor,
    labels: Tensor,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Cross-entropy or squared error; of dense outputs the sum over positions.

    At mixed pairs it is λ ℓ(y) + (1 − λ) ℓ(y′), which for cross-entropy is the loss of the mixed label.
    """
    loss: Callable[[Tensor, Tensor], Tensor] = output_losses.squared_error
    if task == "classification":
        loss = partial(output_losses.cross_entropy, class_dim=class_dim)
    outputs = precise(outputs)
    each = loss(outputs, labels)
    if share is None:
        return each.mean()
    if partner_labels is None:
        raise InputError("`partner_labels` must be given with `partners` where `labels` has a weight.")
    return (share * each + (1 - share) * loss(outputs, partner_labels)).mean()


def output_term(
    name: str, student: Tensor, teacher: Tensor, temperature: float, class_dim: int | None = None
) -> Tensor:
    """Squared differences of the outputs, or Hinton's KL; of dense outputs the sum over positions."""
    student, teacher = precise(student), precise(teacher)
    if name == "kl":
        return output_losses.hinton_kl(student, teacher, temperature, class_dim).mean()
    return output_losses.squared_error(student, teacher).mean()


def jacobian_term(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of products (P, B, …), which are the rows of each sample.

    `relative` is the squared one here: `TeacherNorm` divides it, by a number that does not depend on the directions.
    """
    name = "squared" if name == "relative" else name
    return JACOBIAN_LOSSES[name](precise(student).transpose(0, 1), precise(teacher).transpose(0, 1)).mean()


def exact_values(x: Tensor) -> AbstractContextManager[object]:
    """Within the context autocast is off: a difference of values in 16 bits has no digits left."""
    return torch.autocast(x.device.type, enabled=False)


def precise(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
