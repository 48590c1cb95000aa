"""Puts the measured tables into the pages: what stands between two marks is the file that the first one names.

<!-- table results/distillation-cifar10-cpu/accuracy.md -->
...
<!-- end of table -->

Run it after an experiment was measured again: `python docs/tables.py`. A test holds that it changes nothing.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- table (?P<file>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with its tables as they are in their files."""
    return MARKED.sub(lambda match: f"{match[1]}{(DOCS / match['file']).read_text(encoding='utf-8')}{match[3]}", page)


def pages() -> list[Path]:
    """README and all pages of the documentation."""
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


if __name__ == "__main__":
    for path in pages():
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
