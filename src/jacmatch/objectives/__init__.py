"""Objectives: (student, teacher, batch) → named terms that add up to a loss.

An objective is an nn.Module, so it is the unit that is compiled and distributed. For each batch it
queries the teacher once, runs the student once, and passes both results to the losses.
"""

from typing import TYPE_CHECKING

from jacmatch.former_names import lookup
from jacmatch.objectives.base import Objective
from jacmatch.objectives.compiled import CompiledSteps
from jacmatch.objectives.differentiation import Differentiation
from jacmatch.objectives.distillation import Distillation
from jacmatch.objectives.heads import Heads
from jacmatch.objectives.regression import Regression
from jacmatch.objectives.robustness import Robustness, jacobian_norm_penalty
from jacmatch.objectives.terms import POINTS, AtData, AtMixedPairs, AtNoise, Point, Terms
from jacmatch.objectives.transfer import Transfer
from jacmatch.objectives.weights import GradientShare, LossWeights, WeightSchedule

__all__ = [
    "POINTS",
    "AtData",
    "AtMixedPairs",
    "AtNoise",
    "CompiledSteps",
    "Differentiation",
    "Distillation",
    "GradientShare",
    "Heads",
    "LossWeights",
    "Objective",
    "Point",
    "Regression",
    "Robustness",
    "Terms",
    "Transfer",
    "WeightSchedule",
    "jacobian_norm_penalty",
]

if not TYPE_CHECKING:
    __getattr__ = lookup(__name__)
