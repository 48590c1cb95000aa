"""Small arrays that pass every check; each test spoils a copy."""

import numpy as np
import pytest


@pytest.fixture
def images():
    """Bytes (N, 1, 6, 5) in three classes."""
    random = np.random.RandomState(0)
    return {
        "x_train": random.randint(0, 256, (12, 1, 6, 5)).astype(np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": random.randint(0, 256, (6, 1, 6, 5)).astype(np.uint8),
        "y_test": np.arange(6) % 3,
    }


@pytest.fixture
def vectors():
    """A regression from (N, 4) to (N, 2) with Jacobians."""
    random = np.random.RandomState(1)
    matrix = random.randn(2, 4)
    x, z = random.randn(9, 4), random.randn(5, 4)
    return {
        "x_train": x,
        "y_train": x @ matrix.T,
        "x_test": z,
        "y_test": z @ matrix.T,
        "j_train": np.broadcast_to(matrix, (9, 2, 4)),
    }
