"""The word list of `docs/words.py`: what counts and what does not; and that no word of it is used."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script():
    spec = importlib.util.spec_from_file_location("words", ROOT / "docs" / "words.py")
    module = sys.modules["words"] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


words = script()


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        ("_asked_rows = 1", ["asked"]),
        ("class HeldRows: ...", ["held"]),
        ("found = 1  # the file is found", ["found"]),
        ('"""The file is kept and found."""', []),
        ("def f(place): ...", ["place"]),
        ("x = y.place", ["place"]),
        ("x.narrow(0, 1, 2)", []),
        ("held_out = 1", []),
        ("negative_slope = 0.1  # slopes", ["slopes"]),
        ("from a import Share, Shares", ["Share"]),
        ("share = 1  # a Share of it", []),
        ("# a `Share` of it", ["Share"]),
        ("written_out = True  # a way out", ["written out", "way out"]),
        ("astonished = retold = delegate = 1", []),
    ],
)
def test_what_counts_in_python(tmp_path, line, counted):
    path = tmp_path / "a.py"
    path.write_text(line + "\n", encoding="utf-8")
    assert [hit.word for hit in words.hits(path)] == counted


def test_what_counts_on_a_page(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "The file is kept.\n\nThe field `kept` and slopes.\n\n```python\nfound = 1\n```\n", encoding="utf-8"
    )
    assert [(hit.line, hit.word) for hit in words.hits(page)] == [(3, "kept"), (3, "slopes"), (6, "found")]


CEILINGS = {"src": 0, "tests": 0, "research": 0, "docs": 0, "benchmarks": 0, "README.md": 0, "CONTRIBUTING.md": 0}
"""Words of the list that are left in a directory. A ceiling can only fall."""


@pytest.mark.parametrize("part", CEILINGS)
def test_the_standard_terms_are_used(part):
    hits = [hit for path in words.files([ROOT / part]) for hit in words.hits(path)]
    lines = [f"{hit.path.relative_to(ROOT)}:{hit.line}: {hit.word}" for hit in hits]
    assert len(hits) <= CEILINGS[part], "\n".join(lines[:20])
