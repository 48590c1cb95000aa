"""What type checkers see of the package: checked by mypy in CI, never run."""

import torch
from torch import nn
from typing_extensions import assert_type

from jacmatch import Distillation
from jacmatch.objectives import Regression, Robustness, Terms, Transfer


def objectives(x: torch.Tensor, y: torch.Tensor, student: nn.Module) -> None:
    """A call of an objective has the type Terms, not Any as for other modules."""
    assert_type(Distillation(student)(x, y), Terms)
    assert_type(Regression(student)(x, y), Terms)
    assert_type(Robustness(student)(x, y), Terms)
    assert_type(Transfer(student, classes=3)(x, y), Terms)
    assert_type(Distillation(student)(x, y).loss, torch.Tensor)
