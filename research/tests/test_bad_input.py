"""What a user of `reproduce` and `bench` gets wrong: one line, exit code 2, and nothing half written."""

import re
import shlex
from pathlib import Path

import pytest

from jacmatch.cli import main

pytestmark = pytest.mark.usefixtures("all_as_users_run")

CASES = {
    "no such experiment": ("reproduce tabel", r"The experiment of `reproduce`.* Got 'tabel'\. .*distillation"),
    "no experiment": ("reproduce", r"NAME must be given\. Write jacmatch reproduce NAME"),
    "no such row": ("reproduce distillation --rows label", r"A row .* Got 'label'\. Nearest: labels"),
    "no workers": ("reproduce distillation --workers 0", r"`--workers` of `reproduce` must be at least 1\. Got 0"),
    "more images than there are": (
        "reproduce distillation --per-class 5000",
        r"`--per-class` of `reproduce` must be 0 .* at most 113 with these data\. Got 5000",
    ),
    "an experiment on numbers": (
        "reproduce distillation --data synthetic:D=3,K=2,N=30,T=10",
        r"`--data` of `reproduce distillation` must have classes\. Got a regression",
    ),
    "an unknown benchmark": (
        "bench speed",
        r"A benchmark of `bench` must be a known name\. Got 'speed'\..*Known: attention, cac",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, tmp_path, monkeypatch, capsys):
    command, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("jacmatch")
    assert re.search(expected, err), err
    assert not out
    assert not list(Path().iterdir())
