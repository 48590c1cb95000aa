"""What a checkpoint says of whose training it is, besides the settings."""

import hashlib
import json
from typing import Any

from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import UnsupportedError
from jacmatch.teachers import CachedTeacher, Teacher
from jacmatch.teachers.cached.fingerprint import of_teacher

_LETTERS = 16  # of a digest


def identity(objective: nn.Module, train: Split, seed: int) -> dict[str, Any]:
    """Seed, number of samples, and which teacher: its type, and a digest of weights, architecture and preprocessing.

    Args:
        objective: What is trained.
        train: The training split.
        seed: Of the run.

    Example:
        >>> import torch
        >>> from jacmatch.objectives import Distillation
        >>> split = Split(torch.rand(20, 3), torch.arange(20) % 2)
        >>> identity(Distillation(nn.Linear(3, 2)), split, 0)
        {'seed': 0, 'samples': 20, 'teacher': 'none'}
    """
    teacher = getattr(objective, "teacher", None)
    return {"seed": seed, "samples": len(train), "teacher": "none" if teacher is None else named(teacher)}


def named(teacher: Teacher) -> str:
    """The teacher in a line. One that is read from a cache has the name of the live one.

    A function, a black box for instance, has no weights: of such a teacher the line says the type only.
    """
    try:
        whole = teacher.head.fingerprint if isinstance(teacher, CachedTeacher) else of_teacher(teacher)
    except UnsupportedError:
        return type(teacher).__name__
    parts = {name: value for name, value in whole.items() if name.startswith(("teacher", "member"))}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{parts['teacher']} {digest[:_LETTERS]}"
