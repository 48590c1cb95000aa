"""`jacmatch reproduce`: the tables of the paper, and the claims of this project, each as one command."""

from jacmatch.recipes.reproduce import low_data
from jacmatch.recipes.reproduce.appearance import APPEARANCE
from jacmatch.recipes.reproduce.defaults import DEFAULTS, DEFAULTS_GRID
from jacmatch.recipes.reproduce.distillation import DISTILLATION
from jacmatch.recipes.reproduce.experiment import Experiment
from jacmatch.recipes.reproduce.fewer_passes import FEWER_PASSES
from jacmatch.recipes.reproduce.force_field import FORCE_FIELD
from jacmatch.recipes.reproduce.grasp import GRASP
from jacmatch.recipes.reproduce.kinematics import KINEMATICS
from jacmatch.recipes.reproduce.pricing import PRICING
from jacmatch.recipes.reproduce.propositions import PROPOSITIONS
from jacmatch.recipes.reproduce.robustness import ROBUSTNESS
from jacmatch.recipes.reproduce.steering import STEERING
from jacmatch.recipes.reproduce.surrogate import SURROGATE_TABLE
from jacmatch.recipes.reproduce.transfer import TRANSFER_TABLE
from jacmatch.recipes.reproduce.weight_rule import WEIGHT_RULE

EXPERIMENTS: dict[str, Experiment] = {
    "appearance": APPEARANCE,
    "defaults": DEFAULTS,
    "defaults-grid": DEFAULTS_GRID,
    "distillation": DISTILLATION,
    "fewer-passes": FEWER_PASSES,
    "force-field": FORCE_FIELD,
    "grasp": GRASP,
    "kinematics": KINEMATICS,
    "low-data": low_data.LOW_DATA,
    "low-data-grid": low_data.GRID,
    "pricing": PRICING,
    "propositions": PROPOSITIONS,
    "robustness": ROBUSTNESS,
    "steering": STEERING,
    "surrogate": SURROGATE_TABLE,
    "transfer": TRANSFER_TABLE,
    "weight-rule": WEIGHT_RULE,
}
"""The experiments by name."""
