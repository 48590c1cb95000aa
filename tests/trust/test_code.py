"""Code outside the package runs because the user named it, never because a file did."""

import json
import shutil
import sys

import pytest
from torch import nn

from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.recipes import networks

pytestmark = pytest.mark.usefixtures("all_as_users_run")
MODULE = """
import pathlib, numpy as np, torch
pathlib.Path("ran").touch()
def data():
    x, y = np.random.default_rng(0).random((12, 4)).astype("float32"), np.arange(12) % 2
    return x, y, x, y
def network(outputs):
    return torch.nn.Linear(4, outputs)
"""
FEW = "--steps 2 --batch-size 4 --validation 0"


@pytest.fixture
def _code(tmp_path, monkeypatch):
    """A module that leaves a file where it is imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "somebodys.py").write_text(MODULE)
    (tmp_path / "here").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "somebodys", raising=False)
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.usefixtures("_code")
@pytest.mark.parametrize(
    ("key", "value"), [("data", "somebodys:data"), ("model", "somebodys:network"), ("data", "some.bodys:not/a name")]
)
def test_a_config_runs_no_code_without_leave(key, value, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value, "allow_code": True}))
    assert main(f"train --config {file} {FEW} --out run".split()) == 2
    said = capsys.readouterr().err
    assert f"`{key}` in `--config {file}` must not name code outside the package, which the job would run." in said
    assert f"Got '{value}'. If you trust it, add --allow-code.\n" in said
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.usefixtures("_code")
def test_code_that_the_user_names_or_allows_runs(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"data": "somebodys:data", "model": "somebodys:network"}))
    assert main(f"train --config {file} {FEW} --allow-code --out allowed".split()) == 0
    named = "--data somebodys:data --model=somebodys:network"
    assert main(f"train --config {file} {FEW} {named} --out named".split()) == 0
    for folder in ("allowed", "named"):
        assert "allow_code" not in json.loads((tmp_path / "here" / folder / "settings.json").read_text())["settings"]


@pytest.mark.usefixtures("_code")
def test_a_run_that_somebody_left_runs_no_code(trained, tmp_path, capsys):
    shutil.copytree(trained, "run")
    (tmp_path / "here" / "run" / "result.json").unlink()
    file = tmp_path / "here" / "run" / "settings.json"
    said = json.loads(file.read_text())
    said["settings"]["model"] = "somebodys:network"
    file.write_text(json.dumps(said))
    assert main(["train", "--resume", "run"]) == 2
    assert "`model` in `--resume run` must not name code outside the package" in capsys.readouterr().err
    assert not (tmp_path / "here" / "ran").exists()


@pytest.mark.usefixtures("_code")
def test_a_job_builds_only_its_own_network(trained, tmp_path):
    shutil.copytree(trained, "run")
    file = tmp_path / "here" / "run" / "network.json"
    assert isinstance(networks.load_own(file.parent, "mlp:3"), nn.Module)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"spec": "somebodys:network"}))
    with pytest.raises(InputError, match=r"must be 'mlp:3', which this job makes\. Got 'somebodys:network'"):
        networks.load_own(file.parent, "mlp:3")
    assert not (tmp_path / "here" / "ran").exists()
