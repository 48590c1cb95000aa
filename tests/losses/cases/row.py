"""What one row of the contract's table says of a loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

BATCH = 3
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """What the contract tests need to know of one loss."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    unequal: Callable[[], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    equal: Callable[[], Inputs] | None = None
    """Inputs at which the loss is zero; it must rise when any entry of the first tensor moves. None: not claimed."""
    invariances: dict[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)
    """Changes of the inputs that leave the result as it is."""
    batch_dim: int = 0
    refused: dict[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)
    """Pattern of the error's message -> the change of the inputs that must raise it."""
    differentiable: bool = True
    at_zero: dict[str, Callable[[], Inputs]] = field(default_factory=dict)
    """Inputs as dead ReLUs or saturated classes give them: the gradients must be finite there."""
