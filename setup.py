"""The long description of the package: README.md with absolute links, since a package index resolves no relative ones.

Everything else is in pyproject.toml, also the address: `Repository` of `project.urls`.
"""

import re
from pathlib import Path

from setuptools import setup

_FOLDER = Path(__file__).parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def long_description() -> str:
    """Return README.md with every relative link below the address of the repository."""
    repository = re.search(r'^Repository = "([^"]+)"', (_FOLDER / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert repository is not None
    address = repository.group(1).rstrip("/")

    def absolute(link: "re.Match[str]") -> str:
        kind = "raw" if link.group(1) else "blob"
        return f"{link.group(1)}[{link.group(2)}]({address}/{kind}/main/{link.group(3)})"

    return _LINK.sub(absolute, (_FOLDER / "README.md").read_text("utf-8"))


setup(long_description=long_description(), long_description_content_type="text/markdown")
