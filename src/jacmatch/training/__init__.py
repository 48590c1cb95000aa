"""Training: one loop on Lightning Fabric, its settings and batches, and the evaluation of networks.

Example:
    >>> import torch
    >>> from jacmatch.datasets import Split
    >>> from jacmatch.objectives import Distillation
    >>> split = Split(torch.rand(20, 3), torch.arange(20) % 2)
    >>> student, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> objective = Distillation(student, teacher, samples_per_class=10)
    >>> fit(objective, split, Training(steps=20, batch_size=10), seed=0).finished
    True
    >>> sorted(evaluate(student, split, device="cpu"))
    ['accuracy']
"""

from jacmatch.former_names import lookup
from jacmatch.runs import CHECKPOINT
from jacmatch.training.configuration import OPTIMIZERS, PRECISIONS, SCHEDULES, Training, factor
from jacmatch.training.data import AUGMENTATIONS, Batches, augment
from jacmatch.training.evaluation import (
    SHIFTS,
    agreement,
    calibration,
    evaluate,
    evaluate_under_shifts,
    find_device,
    shifted,
)
from jacmatch.training.loop import Fitted, fit

__all__ = [
    "AUGMENTATIONS",
    "CHECKPOINT",
    "OPTIMIZERS",
    "PRECISIONS",
    "SCHEDULES",
    "SHIFTS",
    "Batches",
    "Fitted",
    "Training",
    "agreement",
    "augment",
    "calibration",
    "evaluate",
    "evaluate_under_shifts",
    "factor",
    "find_device",
    "fit",
    "shifted",
]

__getattr__ = lookup(__name__)
