"""The wheel stays small and holds nothing of the studies; modules are named after what they hold."""

import ast
import zipfile

import pytest

from . import sizes, source

NAMES_OF_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "core"}


@pytest.mark.ci
def test_the_wheel_is_within_its_ceiling(tmp_path):
    built = sizes.build(tmp_path)
    size = sizes.size_of(built)
    assert all(value <= ceiling for value, ceiling in zip(size, sizes.CEILING, strict=True)), size
    assert all(ceiling >= aim for ceiling, aim in zip(sizes.CEILING, sizes.AIM, strict=True))
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
    assert "jacmatch/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"jacmatch"}
    assert not [name for name in names if "research" in name or "/reproduce/" in name or "/bench/" in name]


def test_long_files_and_functions_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    (tmp_path / "long.py").write_text("def f():\n" + "    pass\n" * 60 + "x = 1\n" * 540)
    (tmp_path / "short.py").write_text("def f():\n" + "    pass\n" * 59 + "x = 1\n" * 540)
    paths = sorted(tmp_path.glob("*.py"))
    assert sizes.long_files(paths) == {"long.py": 601}
    assert sizes.long_functions(paths) == {"long.py:1 f": 61}


def test_a_docstring_does_not_count_as_lines_of_its_function():
    (function,) = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n').body
    assert sizes.lines_of(function) == 2


def test_modules_are_named_after_their_concept():
    forbidden = [
        source.name(path)
        for path in source.files(*sizes.FOLDERS)
        if NAMES_OF_NOTHING & set(path.relative_to(source.ROOT).with_suffix("").parts)
    ]
    assert not forbidden, "a helper lives where its one concept lives"
