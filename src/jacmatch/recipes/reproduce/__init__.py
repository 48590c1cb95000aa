"""`jacmatch reproduce`: the tables of the paper, and the claims of this project, each as one command."""

from jacmatch.recipes.reproduce import low_data
from jacmatch.recipes.reproduce.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "low-data-grid": low_data.GRID,
}
"""The experiments by name."""
