"""Surrogates: networks that learn a known or black-box function by its values and partial derivatives."""

from jacmatch.surrogates.modules import fit_surrogate

__all__ = ["fit_surrogate"]
