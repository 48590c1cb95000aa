"""`jacmatch reproduce`: the tables of the paper, and the claims of this project, each as one command."""

from jacmatch_research.reproduce import low_data
from jacmatch_research.reproduce.appearance import APPEARANCE
from jacmatch_research.reproduce.defaults import DEFAULTS, DEFAULTS_GRID
from jacmatch_research.reproduce.distillation import DISTILLATION
from jacmatch_research.reproduce.experiment import Experiment
from jacmatch_research.reproduce.fewer_passes import FEWER_PASSES
from jacmatch_research.reproduce.force_field import FORCE_FIELD
from jacmatch_research.reproduce.grasp import GRASP
from jacmatch_research.reproduce.kinematics import KINEMATICS
from jacmatch_research.reproduce.pricing import PRICING
from jacmatch_research.reproduce.propositions import PROPOSITIONS
from jacmatch_research.reproduce.robustness import ROBUSTNESS
from jacmatch_research.reproduce.steering import STEERING
from jacmatch_research.reproduce.surrogate import SURROGATE_TABLE
from jacmatch_research.reproduce.transfer import TRANSFER_TABLE
from jacmatch_research.reproduce.weight_rule import WEIGHT_RULE

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
    "low-data-directions": low_data.LOW_DATA_DIRECTIONS,
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
