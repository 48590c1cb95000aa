"""Random states besides torch's: functions of a user's own may draw from Python's and NumPy's."""

import math
import random

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

_PYTHON, _NUMPY = 625, 624  # whole numbers below 2³², exact in float64
_VERSION = 3


def host_state() -> Float64[Tensor, "numbers"]:
    """The states of `random` and of `numpy.random`'s old interface, as numbers that a checkpoint can hold.

    Example:
        >>> state = host_state()
        >>> first = random.random(), float(np.random.rand())
        >>> set_host_state(state)
        >>> (random.random(), float(np.random.rand())) == first
        True
    """
    _, whole, pending = random.getstate()
    _, key, position, has, cached = np.random.get_state()
    last = [math.nan if pending is None else pending, position, has, cached]
    return torch.tensor([*whole, *map(int, key), *last], dtype=torch.float64)


def set_host_state(state: Float64[Tensor, "numbers"]) -> None:
    """Puts back what `host_state` gave."""
    numbers = state.tolist()
    whole, key, rest = numbers[:_PYTHON], numbers[_PYTHON : _PYTHON + _NUMPY], numbers[_PYTHON + _NUMPY :]
    if len(rest) != 4 or not all(each.is_integer() and 0 <= each < 2**32 for each in (*whole, *key, *rest[1:3])):
        raise ValueError("numbers that are no random state")
    pending, position, has, cached = rest
    random.setstate((_VERSION, tuple(map(int, whole)), None if math.isnan(pending) else pending))
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), int(position), int(has), cached))
