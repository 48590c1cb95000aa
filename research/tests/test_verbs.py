"""The verbs that this distribution adds to `jacmatch`."""

from pathlib import Path

import pytest

import jacmatch
from jacmatch import plugins
from jacmatch.cli import flags, main

VERBS = ("reproduce", "bench")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, capsys):
    assert main([verb, "--help-all"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert f"\nusage: jacmatch {verb} " in out
    for flag in flags.flags(plugins.verbs()[verb].load(), verb) + flags.flags(flags.Options):
        assert flag.words[0] in out, flag
        assert flag.help, f"the field {flag.name} of {verb} has no docstring"
        assert flag.help.split()[0] in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_options_that_matter_and_ends_with_two_examples(verb, capsys):
    assert main([verb, "--help"]) == 0
    out, job = capsys.readouterr().out, plugins.verbs()[verb].load()
    assert all(f"--{name}" in out for name in job.main.split())
    assert len(job.main.split()) <= 10
    assert "--help-all" in out
    examples = out.partition("examples:\n")[2].splitlines()
    assert len(examples) == 2
    for example in examples:
        program, name, *words = example.split()
        assert (program, name) == ("jacmatch", verb)
        flags.parse(f"jacmatch {verb}", job, words, {})


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_are_read_without_an_import(verb):
    declared, job = flags.stand_in(plugins.verbs()[verb].job), plugins.verbs()[verb].load()
    assert flags.flags(declared, verb) == flags.flags(job, verb)


def test_the_library_lists_verbs_experiments_and_benchmarks(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {verb} " in shown for verb in VERBS)
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "experiments" in shown
    assert "propositions" in shown
    assert "benchmarks" in shown


def test_both_distributions_have_one_version():
    """A run folder says the version of jacmatch alone."""
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    text = file.read_text(encoding="utf-8")
    assert f'version = "{jacmatch.__version__}"' in text
    assert f'dependencies = ["jacmatch[train]=={jacmatch.__version__}"]' in text
