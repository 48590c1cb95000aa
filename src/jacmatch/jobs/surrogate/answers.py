"""What a function returned: checked, and as a tensor."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacmatch.datasets.files import in_one_line
from jacmatch.errors import InputError

_TYPES = "must return float32 or float64."
OURS = "It is called with float64 tensors or arrays on the CPU, and returns the same."


def checked(rule: str, given: Any, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample *out"]:
    """What was returned, as a tensor of finite numbers, one row for each point.

    Args:
        rule: Who must return it, the beginning of a message.
        given: What was returned.
        x: The points.

    Raises:
        InputError: it is something else.
    """
    if isinstance(given, np.ndarray) or np.isscalar(given) or isinstance(given, list | tuple):
        try:
            array = np.asarray(given)
        except ValueError as error:  # rows of different lengths
            raise InputError(f"{rule} must return an array.", got=in_one_line(error), do=OURS) from error
        if array.dtype.kind != "f" or array.dtype == np.float16:
            raise InputError(f"{rule} {_TYPES}", got=f"{array.dtype}", do=".astype(float) makes them.")
        given = torch.from_numpy(np.array(array, np.float64, order="C"))
    if not isinstance(given, Tensor):
        raise InputError(f"{rule} must return a tensor or an array.", got=type(given).__name__, do=OURS)
    if given.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{rule} {_TYPES}", got=given.dtype, do=".double() makes them.")
    if given.device != x.device:
        raise InputError(f"{rule} must return a tensor on the {x.device}.", got=given.device, do=OURS)
    if given.dim() == 0 or len(given) != len(x):
        raise InputError(
            f"{rule} must return one row for each of the {len(x)} points.",
            got=f"shape {tuple(given.shape)}",
            do="If it takes one point at a time, wrap it: lambda x: np.stack([f(each) for each in x]).",
        )
    return finite(rule, given.detach(), x)


def finite(
    rule: str, given: Float[Tensor, "sample *out"], x: Float[Tensor, "sample input"]
) -> Float[Tensor, "sample *out"]:
    """The same, if all of it is finite; an `InputError` says where it is not."""
    bad = torch.nonzero(~given.reshape(len(x), -1).isfinite().all(1))
    if len(bad):
        raise InputError(
            f"{rule} must be finite.",
            got=f"NaN or infinity at {len(bad)} of {len(x)} points, first at x = {place(x[int(bad[0])])}",
            do="Sample where it is defined (--low, --high), or give the points.",
        )
    return given


def place(x: Float[Tensor, "input"]) -> str:
    """A point in words, its first eight numbers."""
    shown = ", ".join(f"{value:.6g}" for value in x[:8].tolist())
    return f"({shown}{', …' if len(x) > 8 else ''})"
