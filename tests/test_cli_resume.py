"""Runs that are stopped and go on: SIGTERM, and `--resume`."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from jacmatch.cli import main
from jacmatch.jobs.study import Progress

TRAIN = "train --data npz:data.npz --model mlp:4 --steps 20 --batch-size 8 --validation 0.2"
MESSAGES = {
    "--resume run --steps 7 --lr 0.5": r"other settings: lr (0.001 there, 0.5 here), steps (20 there, 7 here)",
    "--resume none": "none must be a run folder. Got no folder of that name. Give the --out of an earlier job.",
    "--resume run --config run": "`--resume` uses the settings of its folder. Got --config run too.",
    "--resume run --out other": "`--out` must be omitted with `--resume`, or name the same folder. Got other.",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = np.random.default_rng(0).random((30, 4), dtype=np.float32), np.arange(30) % 3
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=1 - x[:12], y_test=y[:12])
    return tmp_path


def run(words, capsys):
    """The exit code and what is printed on stderr."""
    code = main(words.split())
    return code, capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.ci
def test_a_run_goes_on_with_the_settings_of_its_folder_and_with_no_others(capsys):
    assert run(f"{TRAIN} --out whole", capsys)[0] == 0
    assert run(f"{TRAIN} --out run --max-steps 3", capsys)[0] == 0
    for words, message in MESSAGES.items():
        code, err = run(f"train {words}", capsys)
        assert (code, message in err) == (2, True), err
    code, err = run("distill --resume run", capsys)
    assert (code, "`--resume run` must be for `distill`. Got the settings of `train`." in err) == (2, True), err
    assert run("train --resume run", capsys)[0] == 0
    assert Path("run/student.safetensors").read_bytes() == Path("whole/student.safetensors").read_bytes()
    code, err = run("train --resume run", capsys)
    assert (code, "Got a finished run of `train`." in err) == (2, True), err
    assert sorted(path.name for path in Path("run").iterdir()) == sorted(path.name for path in Path("whole").iterdir())


@pytest.mark.usefixtures("here")
@pytest.mark.ci
def test_sigterm_saves_and_the_same_command_goes_on(capsys, monkeypatch):
    shown, steps = Progress.training, []

    def training(self, name, total):
        on_step = shown(self, name, total)

        def terminated(step, metrics):
            on_step(step, metrics)
            steps.append(step)
            if step == 7 and len(steps) == 7:
                signal.raise_signal(signal.SIGTERM)

        return terminated

    monkeypatch.setattr(Progress, "training", training)
    code, err = run(f"{TRAIN} --out run", capsys)
    assert code == 130
    assert err == "jacmatch train: interrupted. Finished work is kept in run: run the same command again to resume.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(f"{TRAIN} --out run", capsys)[0] == 0
    assert steps == list(range(1, 21))


@pytest.mark.ci
def test_a_run_goes_on_with_the_same_data_only(capsys, here):
    assert run(f"{TRAIN} --out run --max-steps 3", capsys)[0] == 0
    arrays = dict(np.load(here / "data.npz"))
    arrays["x_train"][0, 0] += 0.25
    np.savez(here / "data.npz", **arrays)
    code, err = run(f"{TRAIN} --out run", capsys)
    assert code == 2
    assert "The run in run must be resumed with the data that it was started with. Got changes in x_train (" in err
    assert "result.json" not in json.dumps([path.name for path in Path("run").iterdir()])
