"""The size of the wheel of jacmatch: `python tests/architecture/wheel.py` builds it and prints lines, files and bytes.

The wheel is what a user installs; the studies of jacmatch-research are not in it.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Size(NamedTuple):
    """Lines and number of the Python files in a wheel, and the bytes of the wheel."""

    lines: int
    files: int
    bytes: int


AIM = Size(20_000, 140, 350_000)
CEILING = Size(30_400, 215, 520_000)
"""What the wheel must not exceed; lower it when the wheel has become smaller, until it is `AIM`."""


def build(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, without a network."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
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


def main() -> int:
    """Print the figures; return 1 if one is above its ceiling."""
    with tempfile.TemporaryDirectory() as folder:
        size = size_of(build(Path(folder)))
    for name, value, ceiling, aim in zip(Size._fields, size, CEILING, AIM, strict=True):
        print(f"{name:<6} {value:>8,}   at most {ceiling:>8,}   aim {aim:>8,}")
    return int(any(value > ceiling for value, ceiling in zip(size, CEILING, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
