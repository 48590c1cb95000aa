"""A run that can be spoilt."""

import numpy as np
import pytest

from jacmatch.cli import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run with a network."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    rows = np.random.default_rng(0).random((12, 4), dtype=np.float32)
    arrays = {"x_train": rows, "x_test": 1 - rows, "y_train": np.arange(12) % 2, "y_test": np.arange(12) % 2}
    np.savez(folder.parent / "data.npz", **arrays)
    words = f"train --data npz:{folder.parent}/data.npz --model mlp:3 --steps 2 --batch-size 4 --validation 0"
    assert main([*words.split(), "--out", str(folder)]) == 0
    return folder
