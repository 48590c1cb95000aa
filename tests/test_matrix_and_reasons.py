"""The tests that the matrix of frameworks names exist, and the commands of the reasons run, where they are cheap."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from jacmatch.cli import flags, main
from jacmatch.cli.verbs import verbs

ROOT = Path(__file__).resolve().parents[1]
MATRIX = (ROOT / "docs/how-to/frameworks.md").read_text("utf-8").partition("The test of each cell")[2]
REASONS = re.findall(
    r"^\| (\d+)\. .* \| `jacmatch ([^`]+)` \|$", (ROOT / "docs/how-to/reasons.md").read_text("utf-8"), re.M
)


def test_each_cell_of_the_matrix_names_a_test_that_exists():
    named = re.findall(r"`((?:\w+/)+test_\w+\.py)(?:::(test_\w+))?`", MATRIX)
    assert len(named) > 25
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in tests if test else any(each.startswith("test_") for each in tests), f"{file}::{test}"


def test_a_feature_without_a_test_has_a_dash():
    rows = [
        line for line in MATRIX.splitlines() if re.match(r"\| (fp32|bf16|accum|DDP|compile|checkpointing|resume)", line)
    ]
    cells = [cell.strip() for row in rows if "test_" in row for cell in row.strip("|").split("|")[1:]]
    assert len(cells) == 7 * 5
    assert not [cell for cell in cells if cell != "—" and not cell.startswith("`")]


GUIDES = """accelerate audit data export force-fields hugging-face inputs-and-outputs lightning models peft photos
text timm training-loop weights"""


@pytest.mark.parametrize("guide", GUIDES.split())
def test_a_guide_needs_at_most_40_lines_of_code(guide):
    """The lines of Python and of commands in each section of a page."""
    for section in (ROOT / f"docs/how-to/{guide}.md").read_text("utf-8").split("\n## "):
        blocks = re.findall(r"^```(?:python|sh)\n(.*?)^```", section, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines() if line.strip()]
        assert len(lines) <= 40, section.partition("\n")[0]


def test_there_are_fifteen_reasons():
    assert [int(number) for number, _ in REASONS] == list(range(1, 16))


@pytest.mark.parametrize(("number", "command"), REASONS)
def test_the_command_of_a_reason_can_be_parsed(number, command):
    verb, *words = shlex.split(command)
    flags.parse("jacmatch", verbs()[verb].load(), words, {})


@pytest.mark.ci
def test_cheap_commands_run(tmp_path, monkeypatch):
    """Stop a training, resume it, export it, and compare: reasons 14 and 15."""
    monkeypatch.chdir(tmp_path)
    commands = dict(REASONS)
    stopped = [*shlex.split(commands["14"]), "--model", "mlp:4", "--no-doctor"]
    assert main(stopped) == 0
    assert not Path("runs/a/result.json").exists()
    start = stopped.index("--max-steps")
    assert main(stopped[:start] + stopped[start + 2 :]) == 0
    assert main([*shlex.split(commands["15"]), "--out", "export", "--smoke"]) == 0
    assert Path("export/README.md").exists()
