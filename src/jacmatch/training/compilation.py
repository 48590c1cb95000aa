"""Whether the steps of an objective are compiled."""

from torch import nn

from jacmatch.objectives import CompiledSteps
from jacmatch.training.layout import channels_last
from jacmatch.training.schedules import Training


def compile_steps(objective: nn.Module, settings: Training) -> CompiledSteps | None:
    """What compiles the steps of this objective, None where the settings do not ask for it.

    An objective that cannot be compiled says so in a warning, and in the report. In a compiled training the student's
    convolutions are laid out channels-last on a GPU, where they are faster so.
    """
    if hasattr(objective, "compiled"):
        setattr(objective, "compiled", None)  # noqa: B010 - not every module has it
    if not settings.compile:
        return None
    steps = CompiledSteps(cuda_graphs=settings.cuda_graphs)
    if not hasattr(objective, "compiled"):
        steps.give_up(f"{type(objective).__name__} is not compiled; Distillation is.")
        return steps
    setattr(objective, "compiled", steps)  # noqa: B010 - not every module has it
    if any(parameter.is_cuda for parameter in objective.parameters()):
        channels_last(objective)
    return steps
