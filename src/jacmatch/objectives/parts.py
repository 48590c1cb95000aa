"""Which part of a batch one of several processes has, and how gradients of parts are those of the whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The samples rank, rank + ranks, rank + 2 ranks, … of a batch: any first so many are spread evenly.

    Attributes:
        rank: Which of the processes, from 0.
        ranks: How many there are.
        samples: Samples of the whole batch.
        measured: Whether the shares of the gradient norm can be measured; not where parameters are cut in pieces.

    Example:
        >>> part = Part(rank=1, ranks=2, samples=7)
        >>> part.own(7), part.own(3), part.scale(7)  # samples 1, 3 and 5; of the first three sample 1
        (3, 1, 0.8571428571428571)
    """

    rank: int
    ranks: int
    samples: int
    measured: bool = True

    def own(self, first: int) -> int:
        """How many of the first so many samples of the batch are here."""
        return max(0, -(-(first - self.rank) // self.ranks))

    def scale(self, first: int) -> float:
        """What a mean over own samples is multiplied by, so that the mean over processes is that over `first`."""
        return self.ranks * self.own(first) / first

    def whole(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor], first: int) -> list[Tensor | None]:
        """The gradients of a mean over the first so many samples of the whole batch. Every process has to call this.

        Args:
            gradients: Those of the mean over own samples; None where there is none.
            like: Tensors of the same shapes: the parameters.
            first: Over how many samples of the whole batch the mean is.
        """
        share = self.own(first) / first
        pieces = [
            (torch.zeros_like(tensor) if gradient is None else gradient * share).flatten()
            for gradient, tensor in zip(gradients, like, strict=True)
        ]
        table = torch.cat([*pieces, like[0].new_tensor([gradient is not None for gradient in gradients])])
        torch.distributed.all_reduce(table)
        *sums, found = torch.split(table, [*map(torch.numel, like), len(like)])
        return [
            summed.view_as(tensor) if there else None
            for summed, tensor, there in zip(sums, like, found.tolist(), strict=True)
        ]
