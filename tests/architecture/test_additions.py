"""The lists of CONTRIBUTING.md are complete: a loss and a verb added by them work, in a copy of the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ci

LOSS = {  # the file, the line before which a text is inserted, the text; CHANGELOG and public_names.json make it six
    "src/jacmatch/losses/jacobians.py": (
        "def normalized_error(",
        '''def log_error(
    student: Float[Tensor, "batch row *input"], teacher: Float[Tensor, "batch row *input"], eps: float = 1e-6
) -> Float[Tensor, "batch"]:
    """Return log(1 + r) of the relative error r, per sample."""
    return relative_error(student, teacher, eps).log1p()


''',
    ),
    "src/jacmatch/losses/__init__.py": None,  # three lines, see below
    "tests/losses/reference.py": (
        "def normalized_error(",
        "def log_error(student, teacher, eps=1e-6):\n    return relative_error(student, teacher, eps).log1p()\n\n\n",
    ),
    "tests/losses/cases/jacobians.py": (
        '    Case(\n        "bounded",',
        '    Case("log", losses.log_error, reference.log_error, lambda: (rows(), rows())),\n',
    ),
}
LINES = {  # of losses/__init__.py: what is there, and with what after it
    "    fisher,\n": "    log_error,\n",
    'JacobianLoss: TypeAlias = Literal["bounded", ': '"log", ',
    '    "bounded": bounded_error,\n': '    "log": log_error,\n',
    '    "label_cross_entropy",\n': '    "log_error",\n',
}
VERB = '''"""A verb of a test."""

from dataclasses import dataclass
from typing import Any

from jacmatch.jobs.settings import JobFields


@dataclass(frozen=True)
class Greet(JobFields):
    """Greet somebody."""

    name: str = "world"
    """Whom to greet."""

    def run(self) -> dict[str, Any]:
        """Return the greeting."""
        return {"job": "greet", "greeting": f"hello {self.name}"}
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and of the tests of its losses."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in ("src", "tests/losses"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def insert(path: Path, before: str, text: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert content.count(before) == 1, before
    path.write_text(content.replace(before, text + before), encoding="utf-8")


def python(copy: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}", "COLUMNS": "120"}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_a_loss_costs_at_most_six_files(copy):
    for name, change in LOSS.items():
        if change is not None:
            insert(copy / name, *change)
    path = copy / "src" / "jacmatch" / "losses" / "__init__.py"
    content = path.read_text(encoding="utf-8")
    for there, added in LINES.items():
        assert content.count(there) == 1, there
        content = content.replace(there, there + added)
    path.write_text(content, encoding="utf-8")
    assert len(LOSS) + len(["CHANGELOG.md", "tests/architecture/public_names.json"]) <= 6

    assert "passed" in python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/losses", "-k", "[log]")
    assert "log" in python(copy, "-m", "jacmatch", "distill", "--help-all").split("--jacobian-loss {")[1].split("}")[0]
    script = """
import torch
from jacmatch import Distillation
objective = Distillation(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), samples_per_class=5, jacobian_loss="log")
assert 0 < float(objective(torch.randn(6, 4), torch.arange(6) % 3).unweighted["jacobians"].detach()) < 10
"""
    python(copy, "-c", script)


def test_a_verb_costs_at_most_three_files(copy):
    """The job, its line in the table, and its invalid inputs in tests/test_bad_input.py."""
    (copy / "src" / "jacmatch" / "jobs" / "greet.py").write_text(VERB, encoding="utf-8")
    line = '    "greet": Verb(f"{_JOBS}.greet:Greet", f"{_SHOW}:nothing", "greet somebody"),\n'
    insert(copy / "src" / "jacmatch" / "cli" / "verbs.py", '    "list": Verb(', line)
    assert "greet somebody" in python(copy, "-m", "jacmatch", "--help")
    assert '"greeting": "hello you"' in python(copy, "-m", "jacmatch", "greet", "--name", "you", "--json", "--out", "g")
