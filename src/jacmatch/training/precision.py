"""The number type in which the networks of a training compute."""

from typing import Any

import torch
from lightning_fabric.plugins.precision import MixedPrecision, Precision

from jacmatch.errors import InputError
from jacmatch.training.schedules import Training


class _Autocast(MixedPrecision):  # type: ignore[misc]
    """Fabric's autocast, which however would round the batch itself to 16 bits.

    Raw inputs and regression targets must stay as they are: the Jacobian's rows have the type of the input, so the
    Jacobian term is formed in float32 as long as the input is.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def precision(settings: Training, place: torch.device) -> Precision:
    """Fabric's plugin for the precision that the settings name.

    Raises:
        InputError: It is fp16 without a GPU.
    """
    if settings.precision == "32":
        return Precision()
    if settings.precision == "bf16":
        return _Autocast("bf16-mixed", place.type)
    if place.type != "cuda":
        rule = "`precision='fp16'` of `Training` needs a GPU."
        raise InputError(rule, got=f"device {str(place)!r}", do="Use precision='bf16' or '32'.")
    return _Autocast("16-mixed", place.type)
