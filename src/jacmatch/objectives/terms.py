"""The terms of a loss: what an objective returns, and how each term is computed.

A term is a mean over the batch, in float32 or float64 whatever type the networks compute in.
"""

from collections.abc import Callable, ItemsView, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.losses import JACOBIAN_LOSSES
from jacmatch.losses import outputs as output_losses
from jacmatch.objectives.weights import Part


@dataclass(repr=False)
class Terms:
    """What an objective returns for a batch.

    Attributes:
        values: `loss`, and the weighted terms that add up to it. Means over the batch.
        student_outputs: (B, K), attached to the graph.
        teacher_outputs: (B, K); None if the teacher was not queried.
        unweighted: The terms before weighting.
        shares: Share of each term in the gradient norm at the last measurement; empty before the first.
        firsts: For a term that is the mean over the first samples of the whole batch only, how many these are.
    """

    values: dict[str, Tensor]
    student_outputs: Tensor
    teacher_outputs: Tensor | None = None
    unweighted: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """Return the term of this name; terms with weight 0 are absent."""
        if name not in self.values:
            message = f"no term {name!r} in this call, which has {', '.join(self.values)}"
            raise KeyError(
                f"{message}; it is not part of the loss until its share is measured"
                if name in self.unweighted
                else message
            )
        return self.values[name]

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in self.values.items())
        return f"Terms({numbers})"

    @property
    def loss(self) -> Tensor:
        """The sum of the weighted terms, to call `backward()` on."""
        return self.values["loss"]

    def items(self) -> ItemsView[str, Tensor]:
        """Return pairs of name and weighted term, `loss` first."""
        return self.values.items()

    def keys(self) -> list[str]:
        """Return the names, `loss` first."""
        return list(self.values)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


@dataclass
class TeacherNorm:
    """The mean squared norm of the teacher's products, by which a `relative` Jacobian term is divided.

    The ratio of two squared products along one random direction is heavy-tailed: if the teacher's product happens to be
    small, the ratio is unbounded, and its mean is not the relative error. The mean squared norm does not depend on the
    directions of a sample, so the mean over directions is exactly E‖J_S − J_T‖² ÷ E‖J_T‖².
    """

    mean: float | None = None  # mean over the samples of all calls that measured it; None before the first
    calls: int = 0  # number of those calls

    def measured(self, products: Tensor | None, like: Tensor, part: Part | None, *, counts: bool) -> "TeacherNorm":
        """Return the norm updated with the products of one more call; over all processes if the call counts.

        A call that does not count is used only if there is no mean yet.
        """
        if not counts and self.mean is not None:
            return self
        table = torch.zeros(2, dtype=torch.float64, device=like.device)
        if products is not None:
            norm = products.detach().double().square().sum()
            table = torch.stack([norm, norm.new_tensor(products.shape[1])])
        if counts and part is not None and part.ranks > 1:
            torch.distributed.all_reduce(table)
        here = float(table[0] / table[1].clamp_min(1))
        calls = self.calls + 1
        return TeacherNorm(here if self.mean is None else self.mean + (here - self.mean) / calls, calls)


def label_term(
    task: str,
    outputs: Tensor,
    labels: Tensor,
    partner_labels: Tensor | None = None,
    share: Tensor | None = None,
    class_dim: int | None = None,
) -> Tensor:
    """Return the cross-entropy or squared error; for dense outputs the sum over positions.

    For mixed pairs it is λ ℓ(y) + (1 − λ) ℓ(y′), which for cross-entropy is the loss of the mixed label.
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
    """Return squared differences of the outputs, or Hinton's KL; for dense outputs the sum over positions."""
    student, teacher = precise(student), precise(teacher)
    if name == "kl":
        return output_losses.hinton_kl(student, teacher, temperature, class_dim).mean()
    return output_losses.squared_error(student, teacher).mean()


def positions_of(outputs: Tensor, class_dim: int | None) -> int:
    """Return how many positions a sample has; 1 for (B, K). Without `class_dim`, dimension 1 is that of the classes."""
    return outputs[0].numel() // outputs.shape[1 if class_dim is None else class_dim]


def jacobian_term(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss between products (P, B, …), the P rows of each sample.

    `relative` equals `squared` here; its division by `TeacherNorm`, the same for all directions, comes later.
    """
    name = "squared" if name == "relative" else name
    return JACOBIAN_LOSSES[name](precise(student).transpose(0, 1), precise(teacher).transpose(0, 1)).mean()


def exact_values(x: Tensor) -> AbstractContextManager[object]:
    """Context without autocast: a difference of nearby values has no significant digits left in 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def precise(x: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
