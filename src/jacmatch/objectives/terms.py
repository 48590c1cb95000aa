"""A batch at the points where networks are compared, and the terms of a loss that are computed from it.

A point is the data, noisy data, or lies between two data points. A term is a mean over the batch, in float32 or float64
whatever type the networks compute in.
"""

import math
from collections.abc import Callable, ItemsView, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.jacobian import Arguments, probes
from jacmatch.losses import JACOBIAN_LOSSES
from jacmatch.losses import outputs as output_losses
from jacmatch.losses.outputs import precise

Inputs: TypeAlias = Float[Tensor, "batch *input"]
Ids: TypeAlias = Int[Tensor, "batch"]
Moved: TypeAlias = tuple[Float[Tensor, "batch *input"], Float[Tensor, "batch"] | None]
_NOISE, _MIX = 1_000_003, 1_000_033
"""Offsets of the seed, so that noise and mixing are independent of the probes at the same sample and draw."""


@runtime_checkable
class Point(Protocol):
    """Map from the inputs of a batch to the points at which student and teacher are compared."""

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return the moved inputs, and the share of x in a mixture (None if nothing is mixed)."""
        ...


@dataclass(frozen=True)
class Batch:
    """A batch, moved to the points at which student and teacher are compared.

    For mixed pairs, `share` is the share λ of the first sample of each pair; readouts then get no label.
    """

    x: Tensor
    labels: Tensor | None
    partners: Tensor
    partner_labels: Tensor | None
    share: Tensor | None
    ids: Tensor
    draw: int
    arguments: Arguments | None = None

    def part(self, rows: slice) -> "Batch":
        """Return the batch restricted to these samples."""
        tensors: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, arguments=None if self.arguments is None else self.arguments.part(rows))

    @property
    def label(self) -> Tensor | None:
        """The labels, or None if they are mixed."""
        return self.labels if self.share is None else None


@dataclass(frozen=True)
class Part:
    """The samples rank, rank + ranks, rank + 2 ranks, … of a batch: for any n the first n are spread evenly.

    Example:
        >>> part = Part(rank=1, ranks=2, samples=7)
        >>> part.own(7), part.own(3), part.scale(7)  # samples 1, 3 and 5; of the first three sample 1
        (3, 1, 0.8571428571428571)
    """

    rank: int  # rank of this process, from 0
    ranks: int  # number of processes
    samples: int  # number of samples of the whole batch

    def own(self, first: int) -> int:
        """Return how many of the first `first` samples of the whole batch this process has."""
        return max(0, -(-(first - self.rank) // self.ranks))

    def scale(self, first: int) -> float:
        """Return own(first) · ranks / first: means over own samples, times it, average to the mean over `first`."""
        return self.ranks * self.own(first) / first

    def whole(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor], first: int) -> list[Tensor | None]:
        """Return the gradients of the mean over the first samples of the whole batch. Every process must call this.

        The gradients are those of the mean over own samples; None where there is none.
        """
        share = self.own(first) / first
        pieces = [
            (torch.zeros_like(tensor) if gradient is None else gradient * share).flatten()
            for gradient, tensor in zip(gradients, like, strict=True)
        ]
        table = torch.cat([*pieces, like[0].new_tensor([gradient is not None for gradient in gradients])])
        torch.distributed.all_reduce(table)
        *sums, counts = torch.split(table, [*map(torch.numel, like), len(like)])
        return [
            summed.view_as(tensor) if there else None
            for summed, tensor, there in zip(sums, like, counts.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class AtData:
    """At the data points themselves."""

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return x."""
        return x, None


@dataclass(frozen=True)
class AtNoise:
    """At x + ξ, ξ ~ N(0, σ²I), new noise for each sample and step.

    Attributes:
        sigma: σ > 0, in units of the raw input.
    """

    sigma: float | int

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise InputError("`sigma` of `AtNoise` must be positive and finite.", got=self.sigma)

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return x + ξ."""
        noise = probes.directions(
            "gaussian", seed=seed + _NOISE, ids=ids, draw=draw, count=1, shape=tuple(x.shape[1:]), dtype=x.dtype
        )
        return x + self.sigma * noise[0], None


@dataclass(frozen=True)
class AtMixedPairs:
    """At λx + (1 − λ)x′ with a partner x′ from the data and λ uniform on [0, 1] (mixup, arXiv:1710.09412, α = 1).

    A teacher can be evaluated at any input, so mixing adds points of comparison; labels are mixed with the same λ.
    """

    def move(self, x: Inputs, partners: Inputs, *, ids: Ids, seed: int, draw: int) -> Moved:
        """Return the mixture and λ."""
        share = probes.uniform(seed + _MIX, ids, draw, 1)[:, 0].to(x.dtype)
        weight = share.view(-1, *[1] * (x.dim() - 1))
        return weight * x + (1 - weight) * partners, share


POINTS: dict[str, type[AtData] | type[AtNoise] | type[AtMixedPairs]] = {
    "data": AtData,
    "noise": AtNoise,
    "mixed-pairs": AtMixedPairs,
}


@dataclass(repr=False)
class Terms:
    """What an objective returns for a batch.

    Attributes:
        values: `loss`, and the weighted terms that add up to it. Means over the batch.
        student_outputs: (B, K), attached to the graph.
        teacher_outputs: (B, K); None if the teacher was not queried.
        unweighted: The terms before weighting.
        shares: Share of each term in the gradient norm at the last measurement; empty before the first.
        firsts: For a term that averages only the first samples of the whole batch, their number.
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

    def of_part(self, part: Part) -> dict[str, Tensor]:
        """Return loss and terms of a part of a batch, scaled so that their means over processes are the batch's."""
        scales = {name: part.scale(self.firsts.get(name, part.samples)) for name in self.values if name != "loss"}
        values = {name: scale * self.values[name] for name, scale in scales.items()}
        even = all(scale == part.scale(part.samples) for scale in scales.values())
        loss = part.scale(part.samples) * self.loss if even else torch.stack(list(values.values())).sum()
        return {"loss": loss, **values}

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
        raise InputError("`partner_labels` must be given with `partners` if `labels` has a weight.")
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
