"""Jacobian."""
