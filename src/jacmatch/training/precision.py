"""The number type in which the networks of a training compute."""

from typing import Any

import torch
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.training.schedules import Training

_LARGEST = 1024.0
"""A direction is about 1 for each sample, not 1 ÷ batch as a loss is, and float16 ends at 65504."""


def scale_slopes(objective: Any, scale: Tensor | None) -> None:
    """Scales the inner backward pass of an objective by the loss scale, up to 2¹⁰, and its products back in float32.

    A product that overflows all the same makes a gradient that is not finite: the scaler leaves that step out, and
    lowers its scale until the product fits, as in PyTorch's recipe for gradient penalties.

    References:
        PyTorch, "Automatic Mixed Precision examples", section on gradient penalty.
    """
    if scale is not None and hasattr(objective, "scale_slopes"):
        objective.scale_slopes(scale.clamp(max=_LARGEST))


def precision(settings: Training, place: torch.device) -> Any:
    """Fabric's plugin for the precision that the settings name.

    The loop runs the objective within its autocast and gives it the batch as it is: raw inputs and regression targets
    are not rounded to 16 bits, so Jacobian terms, which have the type of the input, are formed in float32.

    Raises:
        InputError: It is fp16 without a GPU.
    """
    from lightning_fabric.plugins.precision import MixedPrecision, Precision  # takes a second

    if settings.precision == "32":
        return Precision()
    if settings.precision == "bf16":
        return MixedPrecision("bf16-mixed", place.type)
    if place.type != "cuda":
        rule = "`precision='fp16'` of `Training` needs a GPU."
        raise InputError(rule, got=f"device {str(place)!r}", do="Use precision='bf16' or '32'.")
    return MixedPrecision("16-mixed", place.type)
