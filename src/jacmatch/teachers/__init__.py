"""Teachers: frozen functions that answer about themselves.

A teacher is queried once for each batch, and returns its outputs together with the derivative products that the
objective needs. A network knows everything about itself, a formula its Jacobian, a black box only its values.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from jacmatch.errors import InputError, renamed
from jacmatch.jacobian.features import Select
from jacmatch.models.values import ValuesOnly
from jacmatch.teachers.base import Answer, Question, Teacher
from jacmatch.teachers.cached import CachedTeacher
from jacmatch.teachers.ensemble import EnsembleTeacher
from jacmatch.teachers.functions import AnalyticTeacher, BlackBoxTeacher
from jacmatch.teachers.memoized import MemoizedTeacher
from jacmatch.teachers.module import ModuleTeacher

TEACHERS = {
    "module": ModuleTeacher,
    "black-box": BlackBoxTeacher,
    "analytic": AnalyticTeacher,
    "ensemble": EnsembleTeacher,
    "memoized": MemoizedTeacher,
    "cached": CachedTeacher,
}


def as_teacher(given: object, output: Select | None = None) -> Teacher:
    """The teacher itself; an nn.Module as ModuleTeacher, or as BlackBoxTeacher if it is `models.ValuesOnly`.

    Args:
        given: Either.
        output: What selects the outputs of an nn.Module.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, Teacher):
        return given
    if isinstance(given, ValuesOnly):
        return BlackBoxTeacher(given, relative_step=given.step)
    if isinstance(given, nn.Module):
        return ModuleTeacher(given, output=output)
    raise InputError(
        "`teacher` must be a Teacher or an nn.Module.",
        got=type(given).__name__,
        do="Wrap a function into BlackBoxTeacher, or into AnalyticTeacher if it knows its Jacobian.",
    )


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

_RENAMED = {"RememberedTeacher": "MemoizedTeacher"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Return what a name of the last release stands for, with a DeprecationWarning."""
        return renamed(__name__, name, _RENAMED)
