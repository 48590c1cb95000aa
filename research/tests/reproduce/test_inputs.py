"""A table goes on with the data, the code and the teacher that it was begun with."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jacmatch.errors import InputError
from jacmatch.jobs import Train
from jacmatch.jobs.study import Progress
from jacmatch_research.reproduce.command import Reproduce

MODULE = """
import torch
def net(outputs, shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 8), torch.nn.{}(), torch.nn.Linear(8, outputs))
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the user's module, which the next import reads."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def change(activation):
        sys.modules.pop("usersnet", None)
        (tmp_path / "usersnet.py").write_text(MODULE.format(activation))

    change("ReLU")
    yield change
    sys.modules.pop("usersnet", None)


def _arrays(label=0):
    x, y = np.random.default_rng(0).random((60, 1, 2, 2), dtype=np.float32), (np.arange(60) + label) % 3
    np.savez("d.npz", x_train=x, y_train=y, x_test=1 - x, y_test=y)


def _reproduce(out="rep", **changes):
    fields = {"name": "distillation", "smoke": True, "per_class": (5,), "rows": ("labels",), "data": "npz:d.npz"}
    fields |= {"teacher": "mlp:4", "student": "usersnet:net", "out": Path(out), **changes}
    return Reproduce(**fields).run(Progress(quiet=True))


@pytest.mark.ci
def test_no_table_of_reproduce_mixes_two_experiments(write):
    _arrays()
    _reproduce()
    _reproduce(seeds=2)
    document = json.loads(Path("rep/results.json").read_text())
    _arrays(label=1)
    with pytest.raises(InputError, match=r"rep must be resumed with the data .* changes in y_train \(.*, y_test \("):
        _reproduce(seeds=3)
    _reproduce("other", seeds=3)
    _arrays()
    write("Tanh")
    with pytest.raises(InputError, match=r"rep must be resumed with the network usersnet:net .* code usersnet \("):
        _reproduce(seeds=3)
    write("ReLU")
    assert json.loads(Path("rep/results.json").read_text()) == document
    shutil.copytree("other/cells/labels/5/seed2", "rep/cells/labels/5/seed2")
    with pytest.raises(InputError, match=r"seed2 \(`--out`\) must be .* Got a run with other inputs"):
        _reproduce(seeds=3)
    with pytest.raises(
        InputError, match=r"cells of rep must have the data.* Got others in rep.*seed2\. Remove that cell"
    ):
        _reproduce()


@pytest.mark.ci
def test_reproduce_names_a_teacher_that_has_changed_in_its_folder(write):
    _arrays()
    for seed in (0, 1):
        shutil.rmtree("teacher", ignore_errors=True)
        Train(data="npz:d.npz", model="mlp:4", smoke=True, seed=seed, out=Path("teacher")).run(Progress(quiet=True))
        if not seed:
            _reproduce(teacher="./teacher")
    with pytest.raises(InputError, match=r"rep must be resumed with the teacher .* Got changes in weights and"):
        _reproduce(teacher="./teacher", seeds=2)
    assert len(json.loads(Path("rep/results.json").read_text())["cells"]) == 1
