"""A file holds one concept in at most 600 lines, functions are short, and no module is named after nothing."""

import ast

from . import source

FILE_LINES, FUNCTION_LINES = 600, 50

LONGER_FILES: dict[str, str] = {
    "tests/test_bad_input.py": "a table with a row for each mistake",
}
"""The exceptions and the reason of each; never a file of the package."""

NAMES_OF_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "core"}

FILES = source.files("src", "research", "tests", "benchmarks")


def long_files() -> dict[str, int]:
    counts = {source.name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    return {name: count for name, count in counts.items() if count > FILE_LINES}


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: a formula or an example should not be shortened to fit."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_files_are_short():
    too_long = {name: count for name, count in long_files().items() if name not in LONGER_FILES}
    assert not too_long, "split them by concept"


def test_functions_are_short():
    too_long = {
        f"{source.name(path)}:{function.lineno} {function.name}": lines_of(function)
        for path in FILES
        for function in ast.walk(source.tree(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(function) > FUNCTION_LINES
    }
    assert not too_long


def test_modules_are_named_after_their_concept():
    found = [
        source.name(path)
        for path in FILES
        if NAMES_OF_NOTHING & set(path.relative_to(source.ROOT).with_suffix("").parts)
    ]
    assert not found, "a helper lives where its one concept lives"


def test_no_exception_outlives_its_reason():
    assert set(LONGER_FILES) <= set(long_files())
    assert not [name for name in LONGER_FILES if name.startswith("src/")]


def test_a_docstring_does_not_count_as_lines_of_its_function():
    (function,) = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n').body
    assert lines_of(function) == 2
