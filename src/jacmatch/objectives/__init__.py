"""Objectives: (student, teacher, batch) → named terms that add up to a loss.

An objective is an nn.Module, so it is the unit that is compiled and distributed. It asks the teacher once and runs the
student once for each batch, and gives both answers to the losses.
"""

from jacmatch.objectives.base import Balance, Share, Terms
from jacmatch.objectives.compiled import CompiledSteps
from jacmatch.objectives.distillation import Distillation
from jacmatch.objectives.points import POINTS, AtData, AtMixedPairs, AtNoise, Point
from jacmatch.objectives.regression import Regression
from jacmatch.objectives.robustness import Robustness, jacobian_norm_penalty
from jacmatch.objectives.schedules import WeightSchedule
from jacmatch.objectives.transfer import Transfer

__all__ = [
    "POINTS",
    "AtData",
    "AtMixedPairs",
    "AtNoise",
    "Balance",
    "CompiledSteps",
    "Distillation",
    "Point",
    "Regression",
    "Robustness",
    "Share",
    "Terms",
    "Transfer",
    "WeightSchedule",
    "jacobian_norm_penalty",
]
