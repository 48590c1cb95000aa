"""Units: slopes of outputs in units t by inputs in units s, so that metres and radians weigh alike.

With η = y/t and ξ = x/s the slopes are ∂η/∂ξ = diag(1/t) J diag(s). The readout divides the outputs by t; a probe on
the input side gives s v instead of v, and products on the output side are multiplied by s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.errors import InputError
from jacmatch.jacobian import Context, Cost, Estimator


def as_scale(name: str, given: Tensor | float | int | None) -> Tensor:
    """The scale as a tensor that is detached; 1 if None.

    Raises:
        InputError: a number is not positive and finite.
    """
    scale = torch.as_tensor(1.0 if given is None else given).detach().clone()
    scale = scale if scale.is_floating_point() else scale.float()
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise InputError(
            f"`{name}` of `Regression` must be positive and finite.",
            got=scale.tolist(),
            do="Give 1 for what never varies.",
        )
    return scale


@dataclass(frozen=True, eq=False)
class ScaledOutputs:
    """The outputs in units: yₖ/tₖ."""

    scale: Tensor

    @property
    def layers(self) -> tuple[str, ...]:
        """None."""
        return ()

    def __call__(
        self, outputs: Float[Tensor, "batch *out"], features: Mapping[str, Tensor], context: Context
    ) -> Float[Tensor, "batch *out"]:
        """Returns the outputs, divided."""
        return outputs / self.scale.to(outputs)


@dataclass(frozen=True, eq=False)
class InUnits:
    """A probe on the input side whose directions are in units of the inputs: s v."""

    probe: Estimator
    scale: Tensor
    side = "input"

    def __getattr__(self, name: str) -> Any:
        """A `step` where the probe has one: it then is in units as well."""
        if name == "step":
            return self.probe.step  # type: ignore[attr-defined]
        raise AttributeError(name)

    def directions(self, **about: Any) -> Tensor:
        """The directions of the probe in units of the inputs, turned into those of x."""
        v = self.probe.directions(**about)
        return v * self.scale.to(v)

    def variance(self, matrix: Tensor, **more: Any) -> float:
        """That of the probe, for a matrix in units."""
        return self.probe.variance(matrix, **more)

    def passes(self, outputs: int) -> Cost:
        """Those of the probe."""
        return self.probe.passes(outputs)
