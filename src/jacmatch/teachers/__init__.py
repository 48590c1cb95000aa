"""Teachers: frozen functions that return their outputs and derivatives.

An objective queries its teacher once for each batch. The teacher returns its outputs and the Jacobian products that the
objective needs. A network can compute all products; an analytic function uses its known Jacobian; a black box has
values only.
"""

from typing import TYPE_CHECKING

from torch import nn

from jacmatch.errors import InputError
from jacmatch.former_names import lookup
from jacmatch.jacobian.features import Select
from jacmatch.models.values import ValuesOnly
from jacmatch.teachers.base import Answer, Question, Teacher
from jacmatch.teachers.cached import CachedTeacher
from jacmatch.teachers.ensemble import EnsembleTeacher, MemoizedTeacher
from jacmatch.teachers.functions import AnalyticTeacher, BlackBoxTeacher, ModuleTeacher

TEACHERS = {
    "module": ModuleTeacher,
    "black-box": BlackBoxTeacher,
    "analytic": AnalyticTeacher,
    "ensemble": EnsembleTeacher,
    "memoized": MemoizedTeacher,
    "cached": CachedTeacher,
}


def as_teacher(given: object, output: Select | None = None) -> Teacher:
    """Return a teacher as it is, an nn.Module as ModuleTeacher, or a `models.ValuesOnly` as BlackBoxTeacher.

    Args:
        given: A teacher or an nn.Module.
        output: Selects the outputs of an nn.Module.

    Raises:
        InputError: `given` is neither.
    """
    if isinstance(given, Teacher):
        return given
    if isinstance(given, ValuesOnly):
        return BlackBoxTeacher(given, relative_step=given.step)
    if isinstance(given, nn.Module):
        return ModuleTeacher(given, output=output)
    do = "Wrap a function into BlackBoxTeacher, or into AnalyticTeacher if it knows its Jacobian."
    raise InputError("`teacher` must be a Teacher or an nn.Module.", got=type(given).__name__, do=do)


__all__ = [
    "TEACHERS",
    "AnalyticTeacher",
    "Answer",
    "BlackBoxTeacher",
    "CachedTeacher",
    "EnsembleTeacher",
    "MemoizedTeacher",
    "ModuleTeacher",
    "Question",
    "Teacher",
    "as_teacher",
]

if not TYPE_CHECKING:
    __getattr__ = lookup(__name__)
