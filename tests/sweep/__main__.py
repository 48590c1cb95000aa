"""Writes the table of the sweep again: `PYTHONHASHSEED=0 python tests/sweep`, about ten minutes on one core."""

import sys
import warnings
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from sweep import cells, table
    from sweep.configurations import families

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made = (configuration for make in families().values() for configuration in make())
    table.write(cells.line(configuration)[0] for configuration in made)
