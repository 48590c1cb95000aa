"""Which settings name code outside the package, PACKAGE.MODULE:CALLABLE, that a job would run: decided by field.

A family of data sets (`npz`) is none of models, and the reverse (`mlp`): as the other it is the name of a module. So
what a text means depends on the field it stands in, and each field has the function that decides it, which is the one
that the loader itself goes by. What a command line says is trusted; a file of settings, a run folder and a cache are
not.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jacmatch.datasets import catalog as data
from jacmatch.errors import InputError
from jacmatch.models import catalog as models

_NEVER = ("device", "pairs", "probe", "readout", "name", "names", "rows", "action", "x_columns", "y_columns")
"""Fields of text of which no value is ever run."""
_FIELDS: Mapping[str, Callable[[str], bool]] = {
    **dict.fromkeys(("data", "unlabelled"), data.is_code),
    **dict.fromkeys(("model", "student", "teacher", "first", "second"), models.is_code),
}


def _is_function(spec: str) -> bool:
    from jacmatch.jobs.surrogate.functions import is_code  # imports scikit-learn

    return is_code(spec)


_OF_JOB: Mapping[str, Mapping[str, Callable[[str], bool]]] = {
    "surrogate": {"teacher": _is_function, "jacobian": _is_function},
}


def names_code(job: str, field: str, value: object) -> bool:
    """Return whether a setting names code that the job would run. A field that nobody decided on may always do so.

    Args:
        job: The verb.
        field: The name of the setting.
        value: Its value; of a list or a mapping each entry counts.

    Example:
        >>> names_code("train", "data", "npz:data.npz"), names_code("train", "model", "npz:data")
        (False, True)
    """
    if field in _NEVER:
        return False
    if isinstance(value, str):
        decides = _OF_JOB.get(job, {}).get(field) or _FIELDS.get(field)
        return ":" in value if decides is None else decides(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(names_code(job, field, part) for part in parts)


def check_no_code(job: str, settings: Mapping[str, Any], source: str) -> None:
    """Refuse settings of a file that name code outside the package.

    Args:
        job: The verb.
        settings: By field name.
        source: Where they stand, for the message.

    Raises:
        InputError: One does.
    """
    for field, value in settings.items():
        if names_code(job, field, value):
            rule = f"`{field}` in {source} must not name code outside the package, which the job would run."
            raise InputError(rule, got=repr(value), do="If you trust it, add --allow-code.")
