"""The table of verbs: the help of each, what a new verb needs, and what a mistyped one gets."""

import fractions
import inspect
import json
import re
import shlex
import sys
from importlib.metadata import EntryPoint

import pytest

from jacmatch import plugins
from jacmatch.cli import VERBS, flags, main
from jacmatch.cli.verbs import verbs
from jacmatch.plugins import Verb

TOY = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Toy:
    '''Double a number.'''

    number: int = 1
    '''The number.'''

    def run(self):
        return {"job": "toy", "double": 2 * self.number}

def show(console, result):
    console.print(f"Twice: {result['double']}")
"""


# The help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"│ {verb} " in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_all_options_of_a_verb(verb, capsys):
    assert main([verb, "--help-all"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert f"\nusage: jacmatch {verb} " in out
    own = flags.flags(VERBS[verb].load(), verb)
    common = flags.flags(flags.Options)
    refused = [] if flags.has_run(own) else [flag for flag in common if flag.name in ("config", "resume")]
    for flag in own + common:
        assert flag.help, f"the field {flag.name} of {verb} has no docstring"
        assert (flag.words[0] in out) == (flag not in refused), flag
        assert flag in refused or flag.help.split()[0] in out
    for flag in refused:  # there are no settings without a run
        assert main([verb, flag.words[0], "run"]) == 2
        assert f"unknown flag {flag.words[0]}." in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_of_a_verb_that_matter_first(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    job = VERBS[verb].load()
    known = flags.flags(job, verb) + flags.flags(flags.Options)
    shown = [flag for flag in known if re.search(rf"^. {flag.words[0]}\b(?!-)", out, re.MULTILINE)]
    assert len(shown) <= 10 + sum(flag.positional for flag in known)
    assert ("--help-all" in out) == (len(shown) < len(known))
    assert max(map(len, out.splitlines())) <= 80
    if hasattr(job, "main"):
        assert [flag.name for flag in known if flag.name in job.main.split() or flag.positional] == [
            f.name for f in shown
        ]


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_ends_with_two_examples_that_can_be_parsed(verb, capsys):
    assert main(["help", verb]) == 0
    out = capsys.readouterr().out
    _, _, lines = out.partition("examples:\n")
    examples = lines.splitlines()
    assert len(examples) == 2
    for example in examples:
        program, name, *words = shlex.split(example)
        assert (program, name) == ("jacmatch", verb)
        flags.parse(f"jacmatch {verb}", VERBS[verb].load(), words, {})


# A new verb -------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """One new file; each test adds one line that names it."""
    (tmp_path / "toy_verb.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_verb", raising=False)
    monkeypatch.chdir(tmp_path)
    return Verb("toy_verb:Toy", "toy_verb:show", "double a number")


def check_toy(capsys):
    assert main(["--help"]) == 0
    assert "toy        double a number" in capsys.readouterr().out
    assert main(["toy", "--help"]) == 0
    assert "--number INT" in capsys.readouterr().out
    assert main(["toy", "--number", "4"]) == 0
    assert capsys.readouterr().out == "Twice: 8\n"
    assert main(["toy", "--number", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"job": "toy", "double": 8}
    assert main(["toy", "--nummer", "4"]) == 2
    assert capsys.readouterr().err.startswith("jacmatch toy: unknown flag --nummer. Nearest: --number. ")


def test_a_verb_by_a_line_in_the_table(toy, monkeypatch, capsys):
    monkeypatch.setitem(VERBS, "toy", toy)
    check_toy(capsys)


def test_a_verb_by_an_entry_point_of_another_distribution(toy, tmp_path, monkeypatch, capsys):
    with (tmp_path / "toy_verb.py").open("a") as file:
        file.write(
            "\nfrom jacmatch.plugins import Verb\nTOY = Verb('toy_verb:Toy', 'toy_verb:show', 'double a number')\n"
        )
    (tmp_path / "toy-1.0.dist-info").mkdir()
    (tmp_path / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (tmp_path / "toy-1.0.dist-info" / "entry_points.txt").write_text("[jacmatch.verbs]\ntoy = toy_verb:TOY\n")
    plugins.verbs.cache_clear()
    try:
        check_toy(capsys)
    finally:
        plugins.verbs.cache_clear()


def test_an_entry_point_that_cannot_be_loaded_is_reported_and_left_out(tmp_path, monkeypatch, capsys):
    broken = EntryPoint("broken", "no_such_module:VERB", plugins.GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [broken])
    plugins.verbs.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match="The verb `broken` of no_such_module:VERB cannot be loaded: ModuleNotFound"
        ):
            assert main(["--help"]) == 0
    finally:
        plugins.verbs.cache_clear()
    assert "broken" not in capsys.readouterr().out


def test_a_verb_of_this_package_cannot_be_replaced(toy, monkeypatch):
    monkeypatch.setattr(plugins, "verbs", lambda: {"train": toy})
    assert verbs()["train"] is VERBS["train"]


def test_a_mistyped_verb_gets_the_nearest(capsys):
    assert main(["distil"]) == 2
    assert "Got 'distil'. Nearest: distill" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_read_from_the_source_are_those_of_the_job(verb):
    declared, job = flags.stand_in(verbs()[verb].job), verbs()[verb].load()
    assert flags.flags(declared, verb) == flags.flags(job, verb)
    for name in ("main", "examples"):
        assert getattr(declared, name, None) == getattr(job, name, None)
    assert inspect.getdoc(declared) == inspect.getdoc(job)


def test_what_cannot_be_read_from_the_source_is_imported():
    with pytest.raises(LookupError):
        flags.stand_in("jacmatch.jacobian.engines:torch")
    assert flags.declared("fractions:Fraction") is fractions.Fraction


@pytest.mark.parametrize(
    ("verb", "flag", "use"),
    [
        ("distill", "--epochs", "steps"),
        ("train", "--num_epochs", "steps"),
        ("distill", "--alpha", "outputs-weight"),
        ("distill", "--kd-weight", "outputs-weight"),
        ("distill", "--temp", "temperature"),
        ("train", "--learning-rate", "lr"),
        ("train", "--arch", "model"),
        ("distill", "--arch", "student"),
        ("robust", "--lambda", "penalty-weight"),
        ("surrogate", "--data", "teacher. It is a function, or a table: npz:FILE, csv:FILE or parquet:FILE"),
    ],
)
def test_a_flag_of_other_programs_is_answered_by_ours(verb, flag, use, capsys):
    assert main([verb, flag, "3"]) == 2
    assert f"unknown flag {flag}. Use --{use}. " in capsys.readouterr().err


def test_each_answer_to_a_flag_of_other_programs_is_a_flag():
    known = {word for verb in verbs() for flag in flags.flags(verbs()[verb].load(), verb) for word in flag.words}
    assert {f"--{flag}" for flag in flags.SYNONYMS} <= known


def test_a_missing_action_is_answered_with_the_actions(capsys):
    assert main(["cache"]) == 2
    assert "ACTION must be given. Write jacmatch cache ACTION. ACTION is one of build, check" in capsys.readouterr().err
