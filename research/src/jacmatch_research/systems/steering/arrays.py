"""What numpy's arrays are called here."""

from typing import Any

Array = Any
"""A numpy array of float64; shapes are in the docstrings."""
