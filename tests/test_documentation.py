"""Everything that README and docs tell the reader to type works: Python runs, commands parse, targets exist."""

import doctest
import importlib
import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from jacmatch.cli import flags
from jacmatch.cli.verbs import verbs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SLOW_PAGES = (
    "how-to/audit.md",
    "how-to/distill.md",
    "how-to/export.md",
    "explanation/objective.md",
    "how-to/surrogate.md",
    "how-to/force-fields.md",
    "how-to/inputs-and-outputs.md",
    "how-to/transfer.md",
    "how-to/teacher-cache.md",
)
FRAMEWORKS = {
    "how-to/accelerate.md": "accelerate",
    "how-to/hugging-face.md": "transformers",
    "how-to/lightning.md": "lightning",
    "how-to/peft.md": "peft",
    "how-to/text.md": "transformers",
    "how-to/timm.md": "timm",
}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "pycon", "diff", "sh", "text", "toml", "json", "yaml"}
OTHER_COMMANDS = {"apt-get", "cd", "git", "pip", "pre-commit", "python3", "tar", "npm"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the line on which its text begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["text"], text[: match.start("text")].count("\n") + 1)
        for match in FENCE.finditer(text)
    ]


def name(page: Path) -> str:
    """The path of a page inside of the repository, or of `docs`."""
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """Line and words of each command in the shell blocks, without comments."""
    numbered = []
    for block in blocks(page):
        if block.language == "sh":
            joined = block.text.replace("\\\n", "  ")
            lines = enumerate(joined.splitlines(), block.line)
            numbered += [(number, words) for number, line in lines if (words := shlex.split(line, comments=True))]
    return numbered


def given() -> dict[str, object]:
    """What the reader of a training loop has already: two networks and a loader."""
    samples = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
    return {
        "torch": torch,
        "student": torch.nn.Linear(4, 3),
        "teacher": torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)),
        "loader": torch.utils.data.DataLoader(samples, batch_size=8, shuffle=True),
    }


def side(diff: str, sign: str) -> str:
    """The code before (`-`) or after (`+`) a change."""
    return "".join(line[1:] + "\n" for line in diff.splitlines() if line[:1] in {" ", sign, ""})


def execute(code: str, page: Path, line: int, names: dict[str, object]) -> None:
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page):
    assert not [block.line for block in blocks(page) if block.language not in LANGUAGES]
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.ci if name(page) in SLOW_PAGES else ())
        for page in PAGES
        if name(page) not in FRAMEWORKS
    ],
    ids=name,
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page are one program, in their order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            execute(block.text, page, block.line, names)
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, names, page.name, str(page), block.line - 1)
            runner = doctest.DocTestRunner(verbose=False)
            assert not runner.run(test, clear_globs=False).failed
            names = test.globs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", FRAMEWORKS)
def test_blocks_for_other_frameworks_run(page, tmp_path, monkeypatch):
    """Where the framework is installed, as .ci/integrations does."""
    importlib.import_module("tests.integrations.torchvision_operators")
    pytest.importorskip(FRAMEWORKS[page])
    test_python_blocks_run(ROOT / "docs" / page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_changes_of_a_loop_run_before_and_after(page):
    for block in blocks(page):
        if block.language == "diff":
            for sign in "-+":
                names = given()
                before = names["student"].weight.clone()
                execute(side(block.text, sign), page, block.line, names)
                assert not torch.equal(names["student"].weight, before)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_understood(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line, words in commands(page):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        program, *rest = words
        where = f"{page.name}:{line}"
        if program == "make":
            assert {word for word in rest if "=" not in word} <= targets, where
        elif program == "jacmatch":
            understood(rest)
        elif program == "torchrun":
            understood(rest[rest.index("jacmatch") + 1 :])
        else:
            assert Path(program).name in OTHER_COMMANDS, where


def understood(words: list[str]) -> None:
    """Reads the words as the command line does, without doing the job."""
    if words in (["--help"], ["--version"]):
        return
    verb, *rest = words
    if rest not in (["--help"], ["--help-all"]):
        job = verbs()[verb].load()
        flags.parse(f"jacmatch {verb}", job, rest, {})


def test_the_readme_begins_with_what_a_reader_needs():
    """One sentence, two commands, the change of a loop, a command and its table, in the first 60 of 180 lines."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:60])
    assert [words[:2] for _, words in commands(ROOT / "README.md")][:2] == [["make", "demo"], ["make", "test"]]
    begins = ("make demo", "```diff", "jacmatch reproduce defaults", "| --- |")
    assert sorted(begins, key=first.index) == list(begins)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_a_page_names_exist(page):
    """Pages name the tests that show a claim, so they move with them."""
    named = re.findall(r"(?:research/)?tests/[\w/]+\.\w+", page.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!#|[a-z]+:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_picture_of_the_readme_shows_the_committed_results():
    """`python docs/picture.py` would change nothing."""
    names = runpy.run_path(str(ROOT / "docs" / "picture.py"))
    assert names["PICTURE"].read_text(encoding="utf-8") == names["drawn"]()


def test_tables_in_the_pages_are_those_that_were_measured():
    """`python docs/tables.py` would change nothing."""
    names = {"__file__": str(ROOT / "docs" / "tables.py"), "__name__": "tables"}
    exec((ROOT / "docs" / "tables.py").read_text(encoding="utf-8"), names)
    for page in names["pages"]():
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- table ") == text.count("<!-- end of table -->"), page.name
        assert names["filled"](text) == text, page.name
