"""`evaluate`, `compare` and `doctor` take the data of the run, its split and its test part; or say why they cannot."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jacmatch import datasets
from jacmatch.cli import main
from jacmatch.errors import InputError
from jacmatch.jobs import Compare, Doctor, Evaluate, Surrogate, Train, Transfer
from jacmatch.jobs.settings import data_for, data_of_run, load, without_labels
from jacmatch.jobs.study import Progress

QUICK = {"steps": 2, "batch_size": 8, "validation": 0.0, "doctor": False}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, as_users_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))


def arrays(seed=0, file="d.npz"):
    x = np.random.default_rng(seed).random((30, 4), dtype=np.float32)
    np.savez(file, x_train=x[:20], y_train=np.arange(20) % 3, x_test=x[20:], y_test=np.arange(10) % 3)


def train(out="run", **settings):
    settings = {"data": "npz:d.npz", "model": "mlp:3", **QUICK, **settings}
    return Train(out=Path(out), **settings).run(Progress(quiet=True))


def test_a_network_is_measured_on_the_data_of_its_run():
    arrays()
    trained = train()["student"]
    evaluated = Evaluate(model="run", out=Path("evaluated")).run()
    assert evaluated["student"]["accuracy"] == trained["accuracy"]
    assert (evaluated["data"], evaluated["test_samples"]) == ("npz:d.npz", 10)
    assert Doctor(model="run", out=Path("doctor")).run()["data"] == "npz:d.npz"
    same = Compare(first="run", second="run", out=Path("compared")).run()
    assert (same["data"], same["agreement"]["top1"]) == ("npz:d.npz", 1.0)


def test_test_inputs_among_the_training_inputs_or_of_another_scale_are_a_warning(recwarn):
    arrays()
    stored = dict(np.load("d.npz"))
    load("npz:d.npz", 0, False)
    assert not recwarn
    for changed, text in (
        (stored["x_train"][:10], r"10 of the 10 test inputs of npz:d.npz are training inputs too"),
        (255 * stored["x_test"], r"the root mean square 0\.\d+, the test inputs 1\d\d: they must have the same scale"),
    ):
        np.savez("d.npz", **{**stored, "x_test": changed})
        with pytest.warns(UserWarning, match=text):
            load("npz:d.npz", 0, False)


def test_only_jobs_that_measure_generalization_warn_of_shared_inputs(recwarn):
    arrays()
    train()
    stored = dict(np.load("d.npz"))
    np.savez("shared.npz", **{**stored, "x_test": stored["x_train"][:10]})
    for verb, expected in (("doctor", 0), ("export", 0), ("compare", 0), ("evaluate", 1)):
        data_for(verb, ("run", "run"), "npz:shared.npz", seed=0, smoke=False, allow_code=False)
        assert len(recwarn) == expected, verb
    without_labels("npz:shared.npz", 0)
    assert len(recwarn) == 1


@pytest.mark.ci
def test_the_split_is_that_of_the_run():
    """With another seed the network would have been trained on a part of what it is tested on."""
    train(data="digits", seed=3, smoke=True)
    own, other = datasets.load("digits", 3), datasets.load("digits", 0)
    settings = {"seed": 0, "smoke": False, "allow_code": False}
    assert own.train.digests != other.train.digests
    for data in (None, "digits"):
        assert data_for("evaluate", ("run",), data, **settings).train.digests == own.train.digests
    assert data_for("evaluate", ("cnn3",), None, **settings).train.digests == other.train.digests
    assert len(data_for("evaluate", ("run",), None, seed=0, smoke=True, allow_code=False).test) == 20  # 2 of each class


def test_data_that_have_changed_or_gone_are_named():
    arrays()
    train()
    arrays(seed=1)
    message = r"must be those that it was started with\. Got changes in x_train \(.*, x_test \(.* --data npz:d\.npz\."
    with pytest.raises(InputError, match=message):
        Evaluate(model="run", out=Path("evaluated")).run()
    assert Evaluate(model="run", data="npz:d.npz", out=Path("named")).run()["test_samples"] == 10
    Path("d.npz").unlink()
    with pytest.raises(
        InputError, match=r"`--data` must be given: the data of the run in run cannot be .*'npz:d\.npz': "
    ):
        Doctor(model="run", out=Path("doctor")).run()
    assert not Path("evaluated").exists()


def test_two_runs_with_different_test_data_need_data():
    arrays()
    train()
    arrays(1, "e.npz")
    train("other", data="npz:e.npz")
    message = r"`--data` of `compare` must be given for two runs .* Got npz:d\.npz and npz:e\.npz: x_test \(.*--data\."
    with pytest.raises(InputError, match=message):
        Compare(first="run", second="other", out=Path("compared")).run()
    assert Compare(first="run", second="other", data="npz:d.npz", out=Path("compared")).run()["data"] == "npz:d.npz"


CODE = """
import numpy as np
from pathlib import Path
def data():
    Path("ran").touch()
    x, y = np.random.default_rng(0).random((12, 4)).astype("float32"), np.arange(12) % 2
    return x, y, 1 - x, y
"""


@pytest.mark.ci
def test_code_that_makes_the_data_runs_only_where_it_is_allowed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("sets_of_a_run.py").write_text(CODE)
    train(data="sets_of_a_run:data")
    Path("ran").unlink()
    assert main(["evaluate", "run", "--out", "evaluated"]) == 2
    assert (
        "are made by code outside the package. Got sets_of_a_run:data. If you trust it, add" in capsys.readouterr().err
    )
    assert not Path("ran").exists()
    assert main(["evaluate", "run", "--out", "evaluated", "--allow-code"]) == 0
    assert Path("ran").exists()
    sys.modules.pop("sets_of_a_run")


def test_a_folder_that_names_no_data_says_so():
    arrays()
    train()
    head = json.loads(Path("run/settings.json").read_text())
    head["settings"]["data"] = 3
    Path("run/settings.json").write_text(json.dumps(head))
    with pytest.raises(
        InputError, match=r"the data of the run in run cannot be loaded\. Got a run of `train` that names no"
    ):
        Evaluate(model="run", out=Path("evaluated")).run()


@pytest.mark.ci
def test_a_surrogate_is_measured_at_the_points_of_its_function():
    settings = {"smoke": True, "steps": 2, "samples": (8,), "hidden": (4,), "onnx": "never", "doctor": False}
    result = Surrogate(teacher="ishigami", out=Path("run"), **settings).run(Progress(quiet=True))
    evaluated = Evaluate(model="run", out=Path("evaluated")).run()
    assert evaluated["student"]["rmse"] == pytest.approx(result["student"]["rmse"], rel=1e-5)
    inner = data_of_run(Path("run/seed0/n8/values"))
    assert torch.equal(inner.test.y.double(), torch.from_numpy(np.load("run/points-test.npz")["y"]).float().double())
    x = np.random.default_rng(0).random((20, 3), dtype=np.float32)
    np.savez("f.npz", x_train=x, y_train=x[:, :1], x_test=x, y_test=x[:, :1])
    Surrogate(teacher="npz:f.npz", out=Path("file"), methods=("values",), **settings).run(Progress(quiet=True))
    assert data_of_run(Path("file")).fingerprint == datasets.load("npz:f.npz").fingerprint


@pytest.mark.ci
def test_a_transferred_network_is_measured_on_the_other_classes():
    settings = {"methods": ("labels",), "smoke": True, "teacher_steps": 2, "steps": 2, "doctor": False, "seed": 1}
    result = Transfer(out=Path("run"), **settings).run(Progress(quiet=True))
    evaluated = Evaluate(model="run", out=Path("evaluated")).run()
    assert evaluated["data"] == "digits[5,6,7,8,9]"
    assert evaluated["student"]["accuracy"] == result["rows"][0]["accuracy"]["values"][0]
