"""Surrogates: networks that learn a known or black-box function by its values and partial derivatives."""
