"""Example functions of the job `surrogate`; their attributes `low` and `high` are the bounds of the inputs."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LOW = (0.05, 100.0, 63_070.0, 990.0, 63.1, 700.0, 1120.0, 9855.0)
HIGH = (0.15, 50_000.0, 115_600.0, 1110.0, 116.0, 820.0, 1680.0, 12_045.0)


def flow(x: Float[Tensor, "sample 8"]) -> Float[Tensor, "sample 1"]:
    """Flow through a borehole in m³/a, for r_w, r (m), T_u (m²/a), H_u (m), T_l (m²/a), H_l, L (m) and K_w (m/a).

    Q = 2π T_u (H_u − H_l) / (λ (1 + 2 L T_u/(λ r_w² K_w) + T_u/T_l)), λ = ln(r/r_w). Almost monotonic.

    References:
        Harper & Gupta 1983, BMI/ONWI-516; Morris, Mitchell & Ylvisaker 1993, Technometrics 35(3) (the ranges, and its
        use as a problem where derivatives are known).

    Example:
        >>> middle = (torch.tensor(LOW, dtype=torch.float64) + torch.tensor(HIGH, dtype=torch.float64)) / 2
        >>> round(float(flow(middle[None])), 2)
        70.87
    """
    well, reach, upper, head, lower, below, length, conductivity = x.unbind(1)
    depth = torch.log(reach / well)
    resistance = 1 + 2 * length * upper / (depth * well**2 * conductivity) + upper / lower
    return (2 * math.pi * upper * (head - below) / (depth * resistance))[:, None]


def ishigami(x: Float[Tensor, "sample 3"]) -> Float[Tensor, "sample 1"]:
    """The Ishigami function sin x₁ + 7 sin² x₂ + 0.1 x₃⁴ sin x₁, angles in [−π, π], without units.

    References:
        Ishigami & Homma 1990 (the form); Crestaux, Le Maître & Martinez 2009 (the factors 7 and 0.1).
    """
    first, second, third = x.unbind(1)
    return (torch.sin(first) * (1 + 0.1 * third**4) + 7 * torch.sin(second).square())[:, None]


flow.low, flow.high = LOW, HIGH  # type: ignore[attr-defined]
ishigami.low, ishigami.high = (-math.pi,) * 3, (math.pi,) * 3  # type: ignore[attr-defined]

EXAMPLES: dict[str, Callable[[Tensor], Tensor]] = {"borehole": flow, "ishigami": ishigami}
"""The functions by name."""
