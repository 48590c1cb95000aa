"""Fingerprints of what determines a result besides its settings: data, code, teachers, functions, points.

A run folder stores them in `inputs.json`, by part (`data`, `teacher`, …) and name. They are compared when the run is
resumed, and a run inside the run stores a digest of them, so that no table mixes two experiments. A fingerprint is a
string, most often a SHA-256, which must be equal; or a `probe`, numbers that must agree up to rounding.
"""

import ast
import functools
import hashlib
import inspect
import json
import math
import re
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

Fingerprint = str | dict[str, Any]
Fingerprints = dict[str, Fingerprint]

INPUTS = "inputs.json"
"""The file in a run folder."""
SINGLE, DOUBLE = 1e-4, 1e-9
"""Tolerances of probes relative to the largest number: outputs of networks in float32, of functions in float64."""
COARSE = 2e-2
"""The same on a GPU, which may round to shorter types, and for networks in 16 bits."""
_SHOWN, _LETTERS = 8, 12  # differing names, and letters of a digest, in a message
_LARGEST = 64  # numbers in a probe
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib"))
_PROJECT = ("jacmatch", "jacmatch_research")  # a run records their versions
_ABSENT = object()
_DIGEST = re.compile(r"[0-9a-f]{64}")


def probe(values: Sequence[float], tolerance: float = SINGLE) -> Fingerprint:
    """Return a fingerprint of numbers, which must agree up to `tolerance` times the largest of them."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    return {"values": [float(value) for value in values[:_LARGEST]], "tolerance": tolerance}


def changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return the names whose values differ, with both values in short form; empty if there are none."""
    pairs = {name: (there.get(name, _ABSENT), here.get(name, _ABSENT)) for name in dict.fromkeys((*there, *here))}
    shown = [f"{name} {_difference(*pair)}" for name, pair in pairs.items() if not _agree(*pair)]
    return ", ".join(shown[:_SHOWN] + ([f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []))


def _agree(there: Any, here: Any) -> bool:
    if not (isinstance(there, Mapping) and isinstance(here, Mapping) and "values" in there):
        return bool(there == here)
    return _gap(there, here) <= max(float(each.get("tolerance", 0.0)) for each in (there, here))


def _gap(there: Mapping[str, Any], here: Mapping[str, Any]) -> float:
    """Return the largest difference of two probes, relative to the largest number; infinite if their lengths differ."""
    first, second = there.get("values", ()), here.get("values", ())
    if len(first) != len(second):
        return math.inf
    largest = max((abs(value) for value in (*first, *second)), default=0.0)
    return max((abs(a - b) for a, b in zip(first, second, strict=True)), default=0.0) / (largest or 1.0)


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, Mapping) and isinstance(here, Mapping) and "values" in there:
        return f"(off by {_gap(there, here):.1%} of the largest)"
    return f"({_short(there)} there, {_short(here)} here)"


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    if isinstance(value, Mapping) and "values" in value:
        return "values"
    if isinstance(value, str):
        return value[:_LETTERS] if _DIGEST.fullmatch(value) else value
    return repr(value)


def digest_of(value: object) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_of(module: str) -> Fingerprints:
    """Return the SHA-256 of the source of a module and of each module that it imports, if they are the user's own.

    The standard library, installed packages and this package are left out: a run stores their versions. Comments and
    layout do not count. Nothing is imported.
    """
    fingerprints: Fingerprints = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = None if f"code {name}" in fingerprints else _file_of(name)
        if file is None:
            continue
        content = file.read_bytes()
        text, imports = _parsed(content, name, file.name == "__init__.py")
        fingerprints[f"code {name}"] = hashlib.sha256(content if text is None else text.encode()).hexdigest()
        waiting += imports
    return dict(sorted(fingerprints.items()))


@functools.lru_cache(maxsize=256)
def _parsed(content: bytes, name: str, package: bool) -> tuple[str | None, list[str]]:
    """Return the source of a module without comments and layout (None if it has none), and all names it may import."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return None, []
    names = [name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    parts = [each.split(".") for each in names]
    return ast.unparse(tree), [".".join(each[:count]) for each in parts for count in range(1, len(each) + 1)]


def _file_of(name: str) -> Path | None:
    """Return the file of one of the user's modules; None for others and for missing modules."""
    top = name.partition(".")[0]
    if not name or top in sys.stdlib_module_names or top in _PROJECT:
        return None
    loaded = sys.modules.get(name)
    origin = getattr(loaded, "__file__", None) if loaded is not None else _origin_on_path(name)
    if not origin or str(origin).startswith(tuple(f"{each}/" for each in _INSTALLED if each)):
        return None
    file = Path(origin)
    return None if {"site-packages", "dist-packages"} & set(file.parts) or not file.is_file() else file


def _origin_on_path(name: str) -> str | None:
    """Return the file that an import would load."""
    search_paths, spec = None, None
    try:
        for count in range(1, name.count(".") + 2):
            spec = PathFinder.find_spec(".".join(name.split(".")[:count]), search_paths)
            if spec is None:
                return None
            search_paths = list(spec.submodule_search_locations or ())
    except (ImportError, ValueError, OSError):
        return None
    return spec.origin if spec is not None and spec.has_location else None


def source_of(given: object, depth: int = 3) -> str:
    """Return a string that identifies a function or class by its own source; empty for installed code.

    For a function it includes default values and numbers, strings and functions in its closure, `depth` levels deep;
    for a class the user's base classes. Without source, as at a prompt, the compiled code is used.
    """
    if isinstance(given, type):
        return "\n".join(_of_class(each) for each in given.__mro__ if _is_users(each))
    if isinstance(given, functools.partial):
        parts = (given.func, *given.args, *given.keywords.items())
        return "\n".join(_described(part, depth) for part in parts)
    function = inspect.unwrap(given) if callable(given) else given
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return "" if isinstance(function, types.BuiltinFunctionType) else source_of(type(function))
    if not _is_users(function):
        return ""
    inner = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
    around = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *inner)
    return "\n".join([_text_of(function, function.__code__), *(_described(value, depth) for value in around)])


def _of_class(given: type) -> str:
    codes = [member.__code__ for _, member in sorted(vars(given).items()) if isinstance(member, types.FunctionType)]
    return f"{given.__qualname__}\n{_text_of(given, *codes)}"


def _text_of(given: Any, *codes: types.CodeType) -> str:
    """Return the source; or the compiled code, also for a lambda, which shares its line with others."""
    try:
        if getattr(given, "__name__", "") == "<lambda>":
            raise OSError
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(given))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return "\n".join(line for code in codes for line in _of_code(code))


def _of_code(code: types.CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant)
        else:
            yield repr(constant)


def _is_users(given: Any) -> bool:
    """Whether a class or function belongs to the user, not to Python, an installed package or this one."""
    name = getattr(given, "__module__", None) or "__main__"
    return name == "__main__" or name not in sys.modules or _file_of(name) is not None


def _is_full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _described(value: object, depth: int) -> str:
    """Describe a value that a function uses: plain values literally, functions by source, others by type."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(_described(each, depth) for each in value)})"
    if callable(value) and depth:
        return f"{getattr(value, '__qualname__', type(value).__qualname__)} {source_of(value, depth - 1)}"
    return type(value).__qualname__
