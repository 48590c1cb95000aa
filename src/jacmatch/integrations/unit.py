"""An objective as the module that a framework moves to a device, wraps for several processes, and calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian.engines import connected
from jacmatch.jacobian.modules import in_several_processes
from jacmatch.objectives import Objective, Terms
from jacmatch.objectives.terms import Part


class TrainingUnit(nn.Module):
    """An objective whose `forward` returns only tensors, as DistributedDataParallel needs.

    In one process it returns the same as the objective. In several processes, each with its own part of a batch:

    - gradient shares are measured on the mean gradient of all processes, so that all processes use the same weights;
    - the loss depends on all trained parameters, because a bias gets no gradient from a Jacobian term, and
      DistributedDataParallel would wait for this gradient.

    All processes must have the same number of samples, as with samplers that drop or repeat the last ones.

    Args:
        objective: The objective. The parameters of the unit are those of its student; the teacher is not part of it.

    Attributes:
        shares: Share of each term in the gradient norm at the last measurement.

    Raises:
        InputError: `objective` is not an objective.

    Example:
        >>> from jacmatch import Distillation
        >>> unit = TrainingUnit(Distillation(nn.Linear(3, 2), nn.Linear(3, 2), samples_per_class=10))
        >>> returned = unit(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> list(returned)
        ['loss', 'student_outputs', 'labels', 'outputs', 'jacobians']
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            do = "Pass Distillation(student, teacher, ...), Regression(...), Robustness(...) or Transfer(...)."
            name = type(self).__name__
            raise InputError(f"`objective` of `{name}` must be an objective.", got=type(objective).__name__, do=do)
        self.objective = objective
        self.shares: dict[str, float] = {}

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.objective.student

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        with_outputs: Callable[[Tensor], Tensor] | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        """Return the loss, the student's outputs (B, K) without their graph, and the weighted terms, detached.

        Args:
            x: Raw inputs (B, …), the same for student and teacher.
            y: Labels.
            with_outputs: A function of the student's outputs that returns an additional loss; its value is returned as
                `of_outputs`.
            **settings: Other arguments of the objective's `forward`, such as `ids` and `progress`.

        Raises:
            UnsupportedError: Derivatives are computed under fp16 autocast, in which small ones become 0.
        """
        self._check_precision(x)
        part = _part(len(x))
        with self.objective.loss_weights.in_part(part):
            terms: Terms = self.objective(x, y, **settings)
        self.shares = terms.shares
        values = dict(terms.items()) if part is None else terms.of_part(part)
        loss = values.pop("loss")
        if part is not None:
            trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
            loss = connected(loss, trained) if loss.requires_grad else loss
        detached = {name: value.detach() for name, value in values.items()}
        more = {} if with_outputs is None else {"of_outputs": with_outputs(terms.student_outputs)}
        return {"loss": loss, "student_outputs": terms.student_outputs.detach(), **more, **detached}

    def _check_precision(self, x: Tensor) -> None:
        """Refuse fp16 where derivatives are taken and not scaled: frameworks scale only the loss."""
        device, objective = x.device.type, self.objective
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        if half and objective.takes_derivatives and objective.differentiation.scale is None:
            raise UnsupportedError(
                f"`{type(objective).__name__}` cannot take derivatives under autocast in fp16: small ones become 0, "
                "and a gradient scaler scales only the loss. Use bf16, or `jacmatch distill --precision fp16`."
            )


def _part(samples: int) -> Part | None:
    """Return the part of a batch that this process has, where all have this number of samples; None in one process."""
    ranks = distributed.get_world_size() if in_several_processes() else 1
    return Part(distributed.get_rank(), ranks, ranks * samples) if ranks > 1 else None
