"""Sizes: `python tests/architecture/sizes.py` builds the wheel of jacmatch and prints its lines, files and bytes.

The wheel is what a user installs; the studies of jacmatch-research are not in it. Below stand the files and functions
that are long. This is advice: split a file that mixes concepts, and leave alone one that holds a single concept.
"""

import ast
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


FOLDERS = ("src", "research", "tests", "benchmarks")
FILE_LINES, FUNCTION_LINES = 600, 60


class Size(NamedTuple):
    """Lines and number of the Python files in a wheel, and the bytes of the wheel."""

    lines: int
    files: int
    bytes: int


AIM = Size(20_000, 140, 350_000)
CEILING = Size(35_526, 148, 600_100)
"""What the wheel must not exceed; lower it when the wheel has become smaller, until it is `AIM`."""


def build(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, without a network."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def size_of(wheel: Path) -> Size:
    """Return the size of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        lines = sum(archive.read(name).count(b"\n") for name in names)
    return Size(lines, len(names), wheel.stat().st_size)


def long_files(paths: Iterable[Path]) -> dict[str, int]:
    """Return the lines of the files that have more than `FILE_LINES`, by name."""
    counts = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return {name: count for name, count in counts.items() if count > FILE_LINES}


def long_functions(paths: Iterable[Path]) -> dict[str, int]:
    """Return the lines of the functions that have more than `FUNCTION_LINES`, by place and name."""
    return {
        f"{_name(path)}:{node.lineno} {node.name}": lines_of(node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > FUNCTION_LINES
    }


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: a formula or an example should not be shortened to fit."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    end = function.end_lineno or function.lineno
    return end - function.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def main() -> int:
    """Print the figures and the advice; return 1 if the wheel is above its ceiling."""
    with tempfile.TemporaryDirectory() as folder:
        size = size_of(build(Path(folder)))
    for name, value, ceiling, aim in zip(Size._fields, size, CEILING, AIM, strict=True):
        print(f"{name:<6} {value:>8,}   at most {ceiling:>8,}   aim {aim:>8,}")
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    for title, long in (("files", long_files(paths)), ("functions", long_functions(paths))):
        for name, lines in sorted(long.items(), key=lambda item: -item[1]):
            print(f"long {title}: {name}, {lines} lines")
    return int(any(value > ceiling for value, ceiling in zip(size, CEILING, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
