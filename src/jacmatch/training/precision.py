"""The number type in which the networks of a training compute."""

import torch
from lightning_fabric.plugins.precision import MixedPrecision, Precision

from jacmatch.errors import InputError
from jacmatch.training.schedules import Training


def precision(settings: Training, place: torch.device) -> Precision:
    """Fabric's plugin for the precision that the settings name.

    The loop runs the objective within its autocast and gives it the batch as it is: raw inputs and regression targets
    are not rounded to 16 bits, so Jacobian terms, which have the type of the input, are formed in float32.

    Raises:
        InputError: It is fp16 without a GPU.
    """
    if settings.precision == "32":
        return Precision()
    if settings.precision == "bf16":
        return MixedPrecision("bf16-mixed", place.type)
    if place.type != "cuda":
        rule = "`precision='fp16'` of `Training` needs a GPU."
        raise InputError(rule, got=f"device {str(place)!r}", do="Use precision='bf16' or '32'.")
    return MixedPrecision("16-mixed", place.type)
