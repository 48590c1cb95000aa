"""Errors a user can act on: what is wrong, which rule it breaks, what was given, what to do.

Every package may raise them. The command line prints an `InputError` and an `UnsupportedError` as one line and exits
with code 2. Any other exception is a bug and keeps its traceback.
"""

import difflib
import importlib
import numbers
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """An argument of the caller is invalid."""

    def __init__(self, rule: str, *, got: object = None, do: str = "") -> None:
        """Compose a message from the rule, the given value and the remedy.

        Args:
            rule: Names the argument and its caller, and the requirement.
            got: What was given instead; omitted if None.
            do: The remedy; omitted if empty.

        Example:
            >>> print(InputError("`batch_size` of `Training` must be at least 1.", got=0, do="Omit it to use 128."))
            `batch_size` of `Training` must be at least 1. Got 0. Omit it to use 128.
        """
        parts = [rule]
        if got is not None:
            parts.append(f"Got {got}".removesuffix(".") + ".")
        if do:
            parts.append(do)
        super().__init__(printable(" ".join(parts)))


class ClassDimensionError(InputError):
    """Outputs have more than two dimensions, and `class_dim` was not given."""


def class_axis(caller: str, shape: Sequence[int], class_dim: int | None) -> int:
    """Return the class dimension of outputs of this shape: 1 for (B, K); otherwise `class_dim` must be given.

    Example:
        >>> class_axis("hinton_kl", (8, 10), None), class_axis("hinton_kl", (8, 5, 10), -1)
        (1, 2)
    """
    remedy = "Pass class_dim=1 for images (B, K, H, W), class_dim=-1 for tokens (B, T, K)."
    if class_dim is None and len(shape) > 2:
        rule = f"`class_dim` of `{caller}` must be given for outputs of more than two dimensions."
        raise ClassDimensionError(rule, got=f"shape {tuple(shape)}", do=remedy)
    given = 1 if class_dim is None else class_dim
    axis = given + len(shape) if given < 0 else given
    if not 0 < axis < len(shape):
        rule = f"`class_dim` of `{caller}` must be a dimension after the batch."
        raise InputError(rule, got=f"{given} for shape {tuple(shape)}", do=remedy)
    return axis


def one_row_of_classes(caller: str, shape: Sequence[int]) -> None:
    """Refuse dense outputs where one row of classes per sample is needed."""
    if len(shape) != 2:
        rule = f"`{caller}` must have outputs (batch, out)."
        do = "For dense outputs use RandomOutputs(k) or RandomInputs(k), or select one position by output=."
        raise InputError(rule, got=f"shape {tuple(shape)}", do=do)


class Stopped(InputError):
    """A job was interrupted by a problem that the user can solve; its progress is saved."""


def printable(text: str) -> str:
    r"""Return the text in one line, with line ends and control characters as escapes.

    Example:
        >>> print(printable("a name\nof two lines"))
        a name\nof two lines
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def in_one_line(error: BaseException) -> str:
    r"""Return the type of an error and the first line of its message, at most 200 characters.

    Example:
        >>> in_one_line(ValueError("not so\nbut so")), in_one_line(MemoryError())
        ('ValueError: not so', 'MemoryError')
    """
    lines = str(error).strip().partition(" <_io.")[0].splitlines()  # a stream has no name
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def converted_errors(
    rule: str, do: str = "", *, of: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Convert exceptions of other code within the block to an `InputError`; those of jacmatch are not converted."""
    try:
        yield
    except (InputError, UnsupportedError):
        raise
    except of as error:
        raise InputError(rule, got=in_one_line(error), do=do) from error


def few(names: Sequence[object], shown: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


class UnsupportedError(RuntimeError):
    """The request is valid, but this engine, teacher or module does not support it; the message names one that does."""


class ElsewhereError(RuntimeError):
    """Another process of the same job has failed; with its exit code, and its message unless it prints that itself."""

    def __init__(self, code: int, says: str = "") -> None:
        super().__init__(says or "Another process of this job has failed.")
        self.code, self.says = code, says


def optional_package(module: str, caller: str, install: str) -> Any:
    """Import a module of an optional package."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        package = module.partition(".")[0]
        raise InputError(f"{caller} needs the package {package}.", got=f"{error}", do=f"Run: {install}.") from error


def user_callable(spec: str, what: str, rule: str) -> Any:
    """Import what `PACKAGE.MODULE:CALLABLE` names; its code runs because the user named it."""
    module_name, _, attribute = spec.partition(":")
    with converted_errors(rule, "Check the name, and that the module's folder is on PYTHONPATH."):
        module = importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"{what}: the callable of module {module_name}", attribute, known)
    return function


def whole_number(what: str, given: object, least: int = 1, other: str = "") -> None:
    """Raise `InputError` unless a setting is an integer of at least `least`; `other` names other valid values."""
    if isinstance(given, bool) or not isinstance(given, numbers.Integral) or given < least:
        raise InputError(f"{what} must be an integer of at least {least}{other}.", got=repr(given))


def unknown_name(what: str, got: str, known: Iterable[str]) -> InputError:
    """Return an error for a name that is not in a list, with the nearest known names.

    Example:
        >>> print(unknown_name("`--student`", "vgg-4", ["vgg4", "vgg9", "mlp"]))
        `--student` must be a known name. Got 'vgg-4'. Nearest: vgg4, vgg9. Known: mlp, vgg4, vgg9.
    """
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
    nearest = f"Nearest: {', '.join(near)}. " if near else ""
    return InputError(f"{what} must be a known name.", got=repr(got), do=f"{nearest}Known: {', '.join(names)}.")
