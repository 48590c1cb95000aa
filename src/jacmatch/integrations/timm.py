"""A timm training task that compares derivatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jacmatch.integrations import require
from jacmatch.integrations.unit import TrainingUnit
from jacmatch.jacobian import Estimator
from jacmatch.objectives import CompiledSteps, Distillation, GradientShare

require("timm.task", "timm")

from timm.task import DistillationTeacher, LogitDistillationTask  # noqa: E402
from timm.utils import ModelEmaV3, unwrap_model  # noqa: E402

__all__ = ["JacobianDistillationTask"]


class _SameInput(nn.Module):
    """The teacher as a function of the student's normalized input, so that both have the same x."""

    def __init__(self, teacher: DistillationTeacher, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.teacher, self.normalize_input = teacher, teacher.normalize_input
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.teacher(self.normalize_input(x, self.mean, self.std))


class _TaskUnit(TrainingUnit):
    """The trained part of the task: the terms of the objective, and the criterion of timm on the labels."""

    def __init__(self, objective: Distillation, criterion: Callable[..., Tensor], task_weight: float) -> None:
        super().__init__(objective)
        self.criterion, self.task_weight = criterion, task_weight

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # timm's names
        classes = target if target.dim() == 1 and not target.is_floating_point() else None
        returned = super().forward(input, classes, with_outputs=lambda outputs: self.criterion(outputs, target))
        task_loss = returned.pop("of_outputs")
        loss = self.task_weight * task_loss + returned.pop("loss")
        names = {"outputs": "kd_loss", "jacobians": "jacobian_loss"}
        terms = {names[name]: value for name, value in returned.items() if name in names}
        return {"loss": loss, "output": returned["student_outputs"], "task_loss": task_loss.detach(), **terms}


class JacobianDistillationTask(LogitDistillationTask):  # type: ignore[misc]
    """Distillation of logits and Jacobians, with the arguments of timm's `LogitDistillationTask`.

    The loss is task_weight · criterion + distill_weight · τ² KL + w · Jacobian term. Use it instead of
    `LogitDistillationTask` in timm's training script. Student and teacher are differentiated with respect to the input
    that timm's loader has normalized for the student.

    Args:
        *args: Those of `timm.task.LogitDistillationTask`: student, teacher, criterion.
        jacobians: Weight of the Jacobian term. A `GradientShare` is its share of the gradient norm of the output and
            Jacobian terms, without the criterion.
        probe: Derivative products to compare. None: `RandomOutputs(1)`.
        objective_settings: Other arguments of `Distillation`, such as `every` and `jacobian_loss`.
        **settings: Other arguments of `timm.task.LogitDistillationTask`, such as `temperature` and `device`.

    Example:
        In place of timm's own class, in the folder of its training script::

            import functools
            import train
            from jacmatch.integrations.timm import JacobianDistillationTask

            train.LogitDistillationTask = functools.partial(JacobianDistillationTask, jacobians=1.0)
            train.main()
    """

    def __init__(
        self,
        *args: Any,
        jacobians: float | int = GradientShare(0.3),
        probe: Estimator | None = None,
        objective_settings: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        student: nn.Module = self.trainable_module
        objective = Distillation(
            student,
            _SameInput(self.teacher, self.student_mean, self.student_std),
            labels=0.0,
            outputs=self.distill_loss_weight,
            output_loss="kl",
            temperature=self.temperature,
            jacobians=jacobians,
            probe=probe,
            **(objective_settings or {}),
        )
        self.trainable_module: nn.Module = _TaskUnit(objective, self.criterion, self.task_loss_weight)

    @property
    def objective(self) -> Distillation:
        """The objective, with its student."""
        objective: Distillation = unwrap_model(self.trainable_module).objective
        return objective

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return `loss`, `output` (B, K), and the parts of the loss: `task_loss`, `kd_loss`, `jacobian_loss`."""
        returned: dict[str, Tensor] = self.trainable_module(input, target)
        return returned

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compile the steps of the objective, and the student for evaluation."""
        self.objective.compiled = CompiledSteps(backend=backend)
        self.eval_model: Any = torch.compile(self.objective.student, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> Any:
        """Return a moving average of the student."""
        student = self.objective.student
        self.trainable_module_ema = ModelEmaV3(student, decay=decay, use_warmup=use_warmup, device=device, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Move the average toward the student."""
        if self.has_ema():
            self.trainable_module_ema.update(self.objective.student, step=step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the student without the wrappers that the training added."""
        model = super().get_eval_model(module=module, ema=ema)
        inner = None if model is None else unwrap_model(model)
        return inner.student if isinstance(inner, TrainingUnit) else model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the objective, one tensor."""
        return {} if ema else {"objective": self.objective.get_extra_state()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Restore the state of the objective."""
        if state and not ema:
            self.objective.set_extra_state(state["objective"])
