"""One row for each loss: its slow reference, inputs that differ, inputs that are equal, and what it claims.

A new loss is one function, one line in the dictionary of `jacmatch.losses`, and one row here, in its module's file.
"""

from . import attention, jacobians, noise, outputs, penalties
from .row import BATCH, Case

CASES: list[Case] = [*outputs.ROWS, *jacobians.ROWS, *penalties.ROWS, *noise.ROWS, *attention.ROWS]

__all__ = ["BATCH", "CASES", "Case"]
