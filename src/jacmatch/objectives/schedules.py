"""How the weight of the Jacobian term falls with the amount of data and with the progress of training."""

import math
from dataclasses import dataclass

from jacmatch.errors import InputError


@dataclass(frozen=True)
class WeightSchedule:
    """A factor in [0, 1] for the weight of the Jacobian term.

    By data size the factor is 1 / (1 + (n / `halves_at`)⁴), n images per class: in the paper's tables the term gains
    most at 5 to 10 images per class and costs accuracy from about 500 on (precursor, tables 1 and 2). With the square
    in place of the fourth power it still cost 0.6 points at 1,000 images per class of Fashion-MNIST. By progress the
    factor is 1 until `fades_from`, then falls to 0 at the end of training along a cosine.

    Attributes:
        samples_per_class: n, above 0; None counts as scarce.
        halves_at: n at which the factor is one half.
        fades_from: Progress in [0, 1] from which the factor falls; 1 never.
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
        """The factor at this progress.

        Args:
            progress: Share of the training that is done, 0 to 1; more counts as 1.

        Example:
            >>> WeightSchedule(samples_per_class=300)(0.0)
            0.5
        """
        size = 1.0 if self.samples_per_class is None else 1 / (1 + (self.samples_per_class / self.halves_at) ** 4)
        if progress <= self.fades_from or self.fades_from == 1:
            return size
        done = min(1.0, (progress - self.fades_from) / (1 - self.fades_from))
        return size * 0.5 * (1 + math.cos(math.pi * done))
