"""Code outside the package runs because the user named it, never because a file did."""

import importlib
import json
import shutil
import sys
from typing import get_args

import pytest
from torch import nn

from jacmatch import datasets
from jacmatch.cli import VERBS, flags, main, settings
from jacmatch.datasets import LOADERS
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs import settings as job_settings
from jacmatch.jobs.surrogate import functions
from jacmatch.models import catalog
from jacmatch.models.catalog import FAMILIES

pytestmark = pytest.mark.usefixtures("all_as_users_run")
MODULE = """
import pathlib, numpy as np, torch
pathlib.Path("ran").touch()
def data():
    x, y = np.random.default_rng(0).random((12, 4)).astype("float32"), np.arange(12) % 2
    return x, y, 1 - x, y
def network(outputs):
    return torch.nn.Linear(4, outputs)
"""
NAMES = sorted({*LOADERS, *FAMILIES, "somebodys", "os", "package.module"})
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
    message = capsys.readouterr().err
    assert f"`{key}` in `--config {file}` must not name code outside the package, which the job would run." in message
    assert f"Got '{value}'. If you trust it, add --allow-code.\n" in message
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
    result = json.loads(file.read_text())
    result["settings"]["model"] = "somebodys:network"
    file.write_text(json.dumps(result))
    assert main(["train", "--resume", "run"]) == 2
    assert "`model` in `--resume run` must not name code outside the package" in capsys.readouterr().err
    assert not (tmp_path / "here" / "ran").exists()


@pytest.mark.usefixtures("_code")
def test_a_job_builds_only_its_own_network(trained, tmp_path):
    shutil.copytree(trained, "run")
    file = tmp_path / "here" / "run" / "network.json"
    assert isinstance(networks.load_own(file.parent, "mlp:3"), nn.Module)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"spec": "somebodys:network"}))
    with pytest.raises(InputError, match=r"must be 'mlp:3', which this job builds\. Got 'somebodys:network'"):
        networks.load_own(file.parent, "mlp:3")
    assert not (tmp_path / "here" / "ran").exists()


class Imported(Exception):
    """Code outside the package would run."""


def texts(recipe):
    """The fields of a job that hold texts, or several."""
    return [flag for flag in flags.flags(recipe) if str in (flag.kind, *get_args(flag.kind))]


def load(job, field, spec):
    """What the job does with the value of a field, as far as the import of a module."""
    if job == "surrogate":
        functions.import_callable(spec)
    elif field in ("data", "unlabelled"):
        datasets.load(spec)
    else:
        catalog.build(spec, 2, (1, 8, 8))


@pytest.mark.parametrize("job", VERBS)
def test_no_field_of_any_job_takes_code_from_a_file_under_any_name(job, tmp_path, monkeypatch):
    """Whatever the loader of the field would import is refused in a --config."""

    def refuse(name, *_):
        raise Imported(name)

    monkeypatch.setattr(datasets.catalog, "_exists", lambda name: True)
    known = flags.flags(VERBS[job].load())
    for flag in texts(VERBS[job].load()):
        if flag.name in job_settings._NEVER:
            continue
        assert flag.name in job_settings._FIELDS or flag.name in job_settings._OF_JOB.get(job, {}), (
            "decide what this field may name"
        )
        for name in NAMES:
            file = tmp_path / "config.json"
            file.write_text(json.dumps({flag.name.replace("_", "-"): f"{name}:make"}))
            with monkeypatch.context() as patched:
                patched.setattr(importlib, "import_module", refuse)
                try:
                    load(job, flag.name, f"{name}:make")
                    runs = False
                except Exception as error:
                    cause = error.__cause__ or error
                    library = name in FAMILIES and job_settings._FIELDS.get(flag.name) is catalog.is_code  # timm itself
                    runs = isinstance(cause, Imported) and str(cause) == name and not library
            try:
                settings.chosen(["--config", str(file)], job, known)
                refused = False
            except InputError as error:
                refused = "must not name code outside the package" in str(error)
            assert refused or not runs, (flag.name, name)
            assert refused == job_settings.names_code(job, flag.name, f"{name}:make")
    assert job_settings.names_code(job, "a field of tomorrow", {"deep": ["somebodys:network"]})


@pytest.mark.usefixtures("_code")
@pytest.mark.parametrize(("key", "family"), [("model", "npz"), ("data", "mlp"), ("model", "digits"), ("data", "timm")])
def test_a_name_that_is_another_fields_family_runs_no_code(key, family, tmp_path, monkeypatch, capsys):
    (tmp_path / "code" / f"{family}.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, family, raising=False)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: f"{family}:network"}))
    for words in ("", "--devices 2", "--smoke"):
        assert main(f"train --config {file} {FEW} {words} --out run".split()) == 2
        assert f"`{key}` in `--config {file}` must not name code" in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())
