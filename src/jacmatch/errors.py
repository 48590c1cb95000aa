"""Errors a user can act on: what is wrong, which rule it breaks, what was got, what to do.

They are the ground floor: every package may raise them, and the command line turns exactly these two into one line and
exit code 2. Anything else that is raised is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the caller gave cannot be used."""

    def __init__(self, rule: str, *, got: object = None, do: str = "") -> None:
        """Composes one sentence each: the rule, what was got, what to do.

        Args:
            rule: Names the argument and its caller and says what is required.
            got: What was given instead, left out if None.
            do: The way out, left out if empty.

        Example:
            >>> print(InputError("`batch_size` of `Training` must be at least 1.", got=0, do="Leave it out for 128."))
            `batch_size` of `Training` must be at least 1. Got 0. Leave it out for 128.
        """
        parts = [rule]
        if got is not None:
            parts.append(f"Got {got}.")
        if do:
            parts.append(do)
        super().__init__(printable(" ".join(parts)))


def printable(text: str) -> str:
    r"""The text in one line: what a file or a name brings in of line ends and control characters is written as escapes.

    Example:
        >>> print(printable("a name\nof two lines"))
        a name\nof two lines
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class UnsupportedError(RuntimeError):
    """What was asked is sensible, but this engine, teacher or module cannot do it; the message names one that can."""


class ElsewhereError(RuntimeError):
    """Another process of the same job has failed.

    Attributes:
        code: What the job exits with.
        says: What there is to say; empty where the other process says it.
    """

    def __init__(self, code: int, says: str = "") -> None:
        super().__init__(says or "Another process of this job has failed.")
        self.code, self.says = code, says


def unknown_name(what: str, got: str, known: Iterable[str]) -> InputError:
    """An error for a name that is not in a list, with the nearest known names.

    Example:
        >>> print(unknown_name("`--student`", "vgg-4", ["vgg4", "vgg9", "mlp"]))
        `--student` must be a known name. Got 'vgg-4'. Nearest: vgg4, vgg9. Known: mlp, vgg4, vgg9.
    """
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
    nearest = f"Nearest: {', '.join(near)}. " if near else ""
    return InputError(f"{what} must be a known name.", got=repr(got), do=f"{nearest}Known: {', '.join(names)}.")
