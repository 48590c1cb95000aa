"""Which settings of an objective are allowed, alone and together."""

from collections.abc import Iterable

from torch import nn

from jacmatch.errors import InputError, UnsupportedError, unknown_name
from jacmatch.jacobian import Estimator, LabelClass, LabelLogit, Loss, Readout
from jacmatch.teachers import ModuleTeacher, Teacher


def known_setting(name: str, given: str, known: Iterable[str]) -> None:
    """Refuses a name that is not among the known ones."""
    if given not in known:
        raise unknown_name(f"`{name}` of `Distillation`", str(given), known)


def positive_settings(*, every: int, measure_every: int, temperature: float) -> None:
    """Refuses steps below 1, and temperatures that are not above 0."""
    for name, given in (("every", every), ("measure_every", measure_every)):
        if given < 1:
            raise InputError(f"`{name}` of `Distillation` must be at least 1.", got=given)
    if not temperature > 0:
        raise InputError("`temperature` of `Distillation` must be positive.", got=temperature)


def has_a_term(weights: dict[str, float]) -> None:
    """Refuses an objective without any term."""
    if not any(weights.values()):
        raise InputError("`Distillation` must have a term with a weight.", got=weights)


def mixable(probe: Estimator, readout: Readout, task: str, weights: dict[str, float]) -> None:
    """Refuses at mixed pairs what needs the label of one sample."""
    if task == "regression" and weights["labels"]:
        raise InputError(
            "`labels` of `Distillation` must be 0 at mixed pairs in regression: a mixture of labels is not the label of "
            "the mixture.",
            got=weights["labels"],
        )
    if isinstance(probe, LabelClass) or isinstance(readout, LabelLogit | Loss):
        raise InputError(
            "A mixed pair has no single label, so `probe` and `readout` of `Distillation` must not need one.",
            do="Use TopClass() or TopLogit(), whose class is the teacher's.",
        )


def separate(student: nn.Module, teacher: Teacher) -> None:
    """Refuses a student that shares parameters with its frozen teacher."""
    if not isinstance(teacher, ModuleTeacher):
        return
    frozen = set(map(id, teacher.module.parameters()))
    if any(id(parameter) in frozen for parameter in student.parameters()):
        raise InputError(
            "`student` and `teacher` of `Distillation` must not share parameters: the teacher is frozen.",
            do="Give the student a copy (copy.deepcopy).",
        )


def answerable(probe: Estimator, teacher: Teacher) -> None:
    """Refuses directions on the output side where the teacher cannot answer vᵀJ."""
    if probe.side == "output" and not teacher.answers_vjp:
        raise UnsupportedError(
            f"`teacher` of `Distillation(probe={type(probe).__name__}())` must answer vᵀJ; {type(teacher).__name__} has "
            "values only. Use probe=RandomInputs(k)."
        )
