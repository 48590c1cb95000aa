"""An objective as a LightningModule."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from jacmatch.integrations import require
from jacmatch.integrations.unit import TrainingUnit
from jacmatch.objectives import Objective

require("lightning", "lightning")

from lightning.pytorch import LightningModule  # noqa: E402

__all__ = ["DistillationModule"]


class DistillationModule(LightningModule):  # type: ignore[misc]
    """A LightningModule that trains the student of an objective, and logs its terms and gradient shares.

    A batch is (inputs, labels), or (inputs, labels, context) with a dictionary of other arguments of the networks.
    Training logs `train_loss`, `train_TERM` and `share_TERM`, and validation logs `val_loss` and `val_TERM`.
    `self.student` is the trained network. A checkpoint contains the student and the state of the objective (one
    tensor), but not the teacher.

    Args:
        objective: The objective, with student and teacher.
        optimizer: Function of the trained parameters that returns the optimizer, or anything else that
            `configure_optimizers` may return. None: `torch.optim.Adam` with its defaults.

    Raises:
        InputError: `objective` is not an objective.

    Example:
        >>> from jacmatch import Distillation
        >>> objective = Distillation(nn.Linear(3, 2), nn.Linear(3, 2), samples_per_class=10)
        >>> module = DistillationModule(objective, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        >>> module.student is objective.student
        True
    """

    def __init__(self, objective: Objective, optimizer: Callable[[Iterable[nn.Parameter]], Any] | None = None) -> None:
        super().__init__()
        self.unit = TrainingUnit(objective)
        self.make_optimizer = torch.optim.Adam if optimizer is None else optimizer

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.unit.student

    def forward(self, x: Tensor) -> Any:
        """Return what the student returns."""
        return self.student(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log its terms."""
        steps = self.trainer.estimated_stepping_batches  # infinite where neither epochs nor steps are limited
        returned = self._logged("train", batch, progress=min(1.0, self.global_step / max(steps, 1)))
        self.log_dict({f"share_{name}": share for name, share in self.unit.shares.items()})
        return returned["loss"]

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log the terms of a batch.

        Lightning evaluates in inference mode, whose tensors cannot be differentiated. The batch is therefore copied to
        ordinary tensors.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._logged("val", tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, batch))

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the trained parameters."""
        return self.make_optimizer([parameter for parameter in self.student.parameters() if parameter.requires_grad])

    def _logged(self, stage: str, batch: Sequence[Tensor], **settings: float) -> dict[str, Tensor]:
        x, y, *context = batch
        returned: dict[str, Tensor] = self.unit(x, y, context=context[0] if context else None, **settings)
        means = {f"{stage}_{name}": value.detach() for name, value in returned.items() if name != "student_outputs"}
        self.log_dict(means, batch_size=len(x), sync_dist=self.trainer.world_size > 1)
        return returned
