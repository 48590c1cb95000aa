"""Validation of values: the same rule for a flag and for a key of a `--config`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_SCALARS = {
    int: ("a whole number", "INT"),
    float: ("a number", "FLOAT"),
    str: ("a string", "TEXT"),
    bool: ("true or false", "BOOL"),
    Path: ("a path", "PATH"),
    NoneType: ("none", "NONE"),
}


def fitted(kind: Any, value: object) -> Any:
    """Return the value converted to the type `kind`: list to tuple, int to float, text to path.

    Example:
        >>> fitted(tuple[float, ...] | None, [1, 0.5])
        (1.0, 0.5)
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for each in inner:
            if fits(each, value):
                return fitted(each, value)
    elif origin is Literal:
        if any(type(value) is type(each) and value == each for each in inner):
            return value
    elif origin is tuple:
        kinds = _elements(inner, value)
        if isinstance(value, list | tuple) and len(kinds) == len(value):
            return tuple(fitted(each, element) for each, element in zip(kinds, value, strict=True))
    elif isinstance(value, str) and "\0" in value:
        pass  # no path or name can have it
    elif kind is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{value!r} is not {described(kind)}")


def fits(kind: Any, value: object) -> bool:
    """Return whether `fitted` accepts the value."""
    try:
        fitted(kind, value)
    except ValueError:
        return False
    return True


def readable(kind: Any, words: list[str]) -> bool:
    """Return whether the words after a flag can be parsed as the type `kind`.

    Example:
        >>> readable(int | None, ["3"]), readable(int, ["3.5"]), readable(tuple[int, ...], ["1", "2"])
        (True, False, True)
    """
    for each in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if get_origin(each) is tuple:
            kinds = _elements(get_args(each), words)
            if len(kinds) == len(words) and all(map(_readable, kinds, words)):
                return True
        elif len(words) == 1 and _readable(each, words[0]):
            return True
    return False


def many(kind: Any) -> bool:
    """Return whether a flag of this type takes more than one word."""
    return get_origin(kind) is tuple or any(get_origin(each) is tuple for each in get_args(kind))


def described(kind: Any) -> str:
    """Return the type in words, without None.

    Example:
        >>> described(int | None), described(Literal["adam", "sgd"]), described(tuple[float, ...])
        ('a whole number', 'one of adam, sgd', 'a list, each a number')
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(described(each) for each in inner if each is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list, each {described(inner[0])}" if inner[-1] is ... else f"a list of {len(inner)}"
    return _SCALARS[kind][0] if kind in _SCALARS else str(kind)


def metavar(kind: Any) -> str:
    """Return the placeholder of a flag's value in the help.

    Example:
        >>> metavar(int | None), metavar(tuple[Literal["crop", "flip"], ...])
        ('INT', '{crop,flip} ...')
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return "|".join(metavar(each) for each in inner if each is not NoneType)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin is tuple:
        return f"{metavar(inner[0])} ..." if inner[-1] is ... else " ".join(map(metavar, inner))
    return _SCALARS[kind][1] if kind in _SCALARS else "VALUE"


def _elements(inner: tuple[Any, ...], value: object) -> tuple[Any, ...]:
    """Return the type of each element of a tuple."""
    endless = len(inner) == 2 and inner[1] is ... and isinstance(value, list | tuple)
    return (inner[0],) * len(value) if endless else inner  # type: ignore[arg-type]


def _readable(kind: Any, word: str) -> bool:
    return any(fits(kind, reading) for reading in _readings(word))


def _readings(word: str) -> Iterator[object]:
    """Yield the values that a word on the command line can mean."""
    yield word
    if word == "None":
        yield None
    for number in (int, float):
        with contextlib.suppress(ValueError):
            yield number(word)
