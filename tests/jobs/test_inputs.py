"""A job goes on with the data, the code and the teacher that it was started with."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from jacmatch.cli import main
from jacmatch.datasets import from_arrays
from jacmatch.errors import InputError
from jacmatch.jobs import Train
from jacmatch.jobs.networks import Description, inputs_of, same_inputs
from jacmatch.jobs.study import Progress
from jacmatch.jobs.teachers import cached_folder, prepare
from jacmatch.runs import Run

MODULE = """
import torch
from pathlib import Path
def net(outputs, shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 8), torch.nn.{}(), torch.nn.Linear(8, outputs))
def read(outputs):
    linear = torch.nn.Linear(4, outputs)
    torch.nn.init.constant_(linear.weight, float(Path("start.txt").read_text()))
    return linear
"""


def data(first=0.5, label=0):
    x, y = np.random.default_rng(0).random((30, 4), dtype=np.float32), (np.arange(30) + label) % 3
    x[0, 0] = first
    return from_arrays("mine", {"x_train": x, "y_train": y, "x_test": x, "y_test": y})


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


def test_other_data_and_another_teacher_are_named(tmp_path):
    torch.manual_seed(0)
    teacher = torch.nn.Linear(4, 3)
    same_inputs(Run.create(tmp_path / "run", "distill", {}, "0"), data(), teacher)
    run = Run.create(tmp_path / "run", "distill", {}, "0")
    same_inputs(run, data(), teacher)
    with pytest.raises(InputError, match=r"Got changes in x_train \(\w{12} there, \w{12} here\), x_test \("):
        same_inputs(run, data(0.25), teacher)
    with pytest.raises(InputError, match=r"Got changes in y_train \(\w{12} there, \w{12} here\), y_test \("):
        same_inputs(run, data(label=1), teacher)
    teacher.weight.data[0, 0] += 1e-6
    with pytest.raises(
        InputError, match=r"changes in weights and code \(Linear \w{16} there, .*Restore the original inputs"
    ):
        same_inputs(run, data(), teacher)


def test_a_teacher_whose_forward_has_changed_is_another(tmp_path):
    """The weights, and all that the network prints, are the same."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(4, 3))
    run = Run.create(tmp_path / "run", "distill", {}, "0")
    same_inputs(run, data(), teacher)
    teacher[0].forward = lambda x: torch.nn.functional.linear(x, teacher[0].weight) + 2 * teacher[0].bias
    with pytest.raises(InputError, match=r"changes in weights and code .*, outputs \(off by \d+\.\d% of"):
        same_inputs(run, data(), teacher)


def test_the_code_of_a_network_and_what_it_reads_are_compared(write, tmp_path):
    (tmp_path / "start.txt").write_text("0.5")
    for spec in ("usersnet:net", "usersnet:read"):
        before = inputs_of(networks=(Description.of(spec, data()),))
        assert inputs_of(networks=(Description.of(spec, data()),)) == before
        assert sorted(before[f"network {spec}"]) == ["code usersnet", "outputs of a new network"]
    run = Run.create(tmp_path / "run", "train", {}, "0")
    same_inputs(run, networks=(Description.of("usersnet:read", data()),))
    (tmp_path / "start.txt").write_text("0.25")
    with pytest.raises(InputError, match=r"Got changes in outputs of a new network \(off by \d"):
        same_inputs(run, networks=(Description.of("usersnet:read", data()),))
    assert inputs_of(networks=(Description.of("mlp:4", data()),)) == {}


@pytest.mark.parametrize("job", ["train", *(pytest.param(job, marks=pytest.mark.ci) for job in ("robust", "distill"))])
def test_a_job_does_not_go_on_with_other_code(job, write, capsys):
    named = "--teacher mlp:4 --teacher-steps 2 --student" if job == "distill" else "--model"
    command = f"{job} --data synthetic:D=4,K=2,N=40,T=20 {named} usersnet:net --smoke --out run".split()
    assert main([*command, "--max-steps", "1"]) == 0
    write("Tanh")
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "run must be resumed with the network usersnet:net that it was started with. Got changes in" in message
    assert "code usersnet (" in message
    write("ReLU")
    assert main(command) == 0


def _teacher(given, model="usersnet:net"):
    messages = []
    progress = Progress(quiet=True)
    progress.message = messages.append
    recipe = Train(data="mine", model=model, steps=4, doctor=False)
    prepared = prepare(model, given, None, recipe, progress, allow_code=True)
    return cached_folder(recipe, given), prepared.network, messages


def test_a_cached_teacher_is_that_of_this_code_and_of_these_data(write):
    first, network, _ = _teacher(data())
    again, same, messages = _teacher(data())
    assert first == again
    assert not messages
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True))
    assert _teacher(data(0.25))[0] != first
    write("Tanh")
    other, network, messages = _teacher(data())
    assert other != first
    assert "Tanh" in str(network)
    assert not messages
    write("ReLU")
    assert _teacher(data())[0] == first


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("student.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "must have the checksum that"),
        *(
            pytest.param(*case, marks=pytest.mark.ci)
            for case in (
                ("student.safetensors", None, r"must contain the weights of its network\. Got no student\.safetensors"),
                ("network.json", lambda content: content[:9], "must be one JSON object"),
                ("settings.json", None, "must be a run folder"),
                ("inputs.json", None, r"its data has changed: x_train \(nothing there"),
                (
                    "inputs.json",
                    lambda content: content.replace(b'"x_train": "', b'"x_train": "0'),
                    "its data has changed",
                ),
            )
        ),
    ],
)
def test_a_damaged_cached_teacher_is_trained_again(file, damage, reason, write):
    folder, network, _ = _teacher(data(), "mlp:6")
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(damage(content)) if damage else (folder / file).unlink()
    _, healed, messages = _teacher(data(), "mlp:6")
    assert len(messages) == 1
    assert messages[0].startswith(
        f"The teacher in {folder} is trained again; the old files are in {folder.name}-damaged-"
    )
    (aside,) = folder.parent.glob("*-damaged-*")
    assert len([*aside.iterdir()]) >= 5, "nothing is deleted"
    assert re.search(reason, messages[0]), messages[0]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), healed.parameters(), strict=True))
    assert _teacher(data(), "mlp:6")[2] == []


def test_a_link_instead_of_a_cached_teacher_is_refused(write, tmp_path):
    folder, _, _ = _teacher(data(), "mlp:6")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    folder.rename(tmp_path / "away")
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"must be a folder\. Got a symbolic link\. Remove the link"):
        _teacher(data(), "mlp:6")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_a_half_trained_cached_teacher_with_a_damaged_checkpoint_begins_anew(write):
    folder, network, _ = _teacher(data(), "mlp:6")
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"no checkpoint")
    _, healed, messages = _teacher(data(), "mlp:6")
    assert "must be a complete checkpoint" in messages[0]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), healed.parameters(), strict=True))


def test_a_half_trained_cached_teacher_of_the_same_data_under_another_name_begins_anew(write):
    folder, network, _ = _teacher(data(), "mlp:6")
    (folder / "result.json").unlink()
    settings = json.loads((folder / "settings.json").read_text())
    settings["settings"]["data"] = "folder:elsewhere"
    (folder / "settings.json").write_text(json.dumps(settings))
    _, trained, messages = _teacher(data(), "mlp:6")
    assert "it was started with --data folder:elsewhere." in messages[0]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), trained.parameters(), strict=True))
