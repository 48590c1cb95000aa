"""What needs the extra `train` says so where it is missing; `.ci/bare` sees the same in an environment without it."""

import sys

import pytest

import jacmatch
from jacmatch import plugins
from jacmatch.cli import main


def test_the_command_line_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    for words in ([], ["--help"], ["list"], ["distill", "--smoke"]):
        assert main(words) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert captured.out == ""
        assert line.startswith("jacmatch: the command line needs the extra train; not installed: tyro.")
        assert line.endswith("Run: pip install 'jacmatch[train]'.")


def test_the_version_needs_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jacmatch {jacmatch.__version__}\n"


def test_load_student_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(jacmatch, "find_spec", lambda name: None)
    with pytest.raises(jacmatch.UnsupportedError, match=r"needs the extra train.*pip install 'jacmatch\[train\]'"):
        jacmatch.load_student(tmp_path)


def test_load_student_is_that_of_the_jobs(tmp_path):
    with pytest.raises(jacmatch.InputError, match="must be"):
        jacmatch.load_student(tmp_path / "nowhere")


@pytest.mark.parametrize("words", [["reproduce", "distillation"], ["bench", "--help"]])
def test_a_verb_of_the_studies_names_their_package(words, monkeypatch, capsys):
    monkeypatch.setattr(plugins, "verbs", dict)
    assert main(words) == 2
    rule = f"jacmatch: `{words[0]}` is a verb of jacmatch-research, which is not installed."
    assert capsys.readouterr().err == f"{rule} Run: pip install jacmatch-research.\n"
