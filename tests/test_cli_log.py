"""What a terminal or a log shows: tables, the progress of a job, and that the numbers of a smoke run mean nothing."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from jacmatch.cli import main, summary
from jacmatch.datasets import load
from jacmatch.jobs import Train, settings
from jacmatch.jobs import study as module
from jacmatch.jobs.study import Progress

HEAD = ("method", "accuracy on the test part %", "cosine of Jacobians", "noise 0.1", "noise 0.2", "salt-and-pepper")
ROWS = (("labels + outputs + Jacobians", *["97.12 ± 0.34"] * 5), ("labels", *["8.0"] * 5))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# Tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 200])
def test_headings_and_cells_are_whole_at_any_width(width, capsys):
    summary.print_table(Console(width=width, highlight=False), HEAD, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(lines)
    assert "…" not in text
    assert {word for heading in HEAD for word in heading.split()} <= set(text.split())
    assert text.count("97.12 ± 0.34") == 5
    blocks = sum("labels + outputs + Jacobians" in line for line in lines)
    assert (blocks == 1) == (width == 200)


def test_a_table_without_rows(capsys):
    summary.print_table(Console(width=80), ("method", "accuracy"), ())
    assert capsys.readouterr().out.split()[:2] == ["method", "accuracy"]


# Progress ---------------------------------------------------------------------------------------------------------


def lines_of(monkeypatch, capsys, seconds_per_step, steps=100):
    """What a log holds after a training whose steps take so long, on a clock of its own."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    shown = Progress()
    on_step = shown.training("cnn3 from labels", steps)
    for step in range(1, steps + 1):
        now[0] += seconds_per_step
        on_step(step, {"validation_accuracy": 0.5} if step == 50 else {})
    return capsys.readouterr().err.splitlines()


def test_a_log_has_a_line_at_each_tenth(monkeypatch, capsys):
    lines = lines_of(monkeypatch, capsys, seconds_per_step=1.0)
    assert len(lines) == 10
    assert lines[0] == "cnn3 from labels: 10/100, 10 s"
    assert lines[-1] == "cnn3 from labels: 100/100, accuracy 0.500, 100 s"


def test_short_trainings_do_not_fill_a_log(monkeypatch, capsys):
    assert not lines_of(monkeypatch, capsys, seconds_per_step=0.01)
    assert len(lines_of(monkeypatch, capsys, seconds_per_step=0.05)) == 2


def test_a_log_has_a_line_after_a_long_silence(monkeypatch, capsys):
    monkeypatch.setattr(module, "LONGEST_SILENCE", 0.02)
    with Progress() as shown:
        shown.stage("Comparing outputs and 4 Jacobians")
        shown._end.wait(0.15)
    assert capsys.readouterr().err.startswith("Comparing outputs and 4 Jacobians (running)\n")


def test_quiet_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr(module, "LONGEST_SILENCE", 0.01)
    with Progress(quiet=True) as shown:
        shown.stage("Comparing")
        shown.training("network", 1)(1, {})
        shown._end.wait(0.05)
    assert capsys.readouterr().err == ""


# Smoke runs -------------------------------------------------------------------------------------------------------


def test_a_smoke_run_is_small_whatever_the_settings():
    job = Train(smoke=True, steps=5000, batch_size=512, warmup=100, accumulate=4, per_class=100, validation=500.0)
    training = job.training()
    assert (training.steps, training.batch_size, training.warmup, training.accumulate) == (2, 2, 0, 1)
    whole = load("digits", 0)
    train, validation = job.parts(whole, 100, 0)
    assert train.y.bincount().tolist() == [settings.SMOKE_TRAIN - 2] * 10
    assert len(train) + len(validation) <= 10 * settings.SMOKE_TRAIN
    assert settings.load("digits", 0, smoke=True).test.y.bincount().tolist() == [settings.SMOKE_TEST] * 10
    assert torch.equal(settings.load("digits", 0, smoke=True).train.y, whole.train.y), (
        "its fingerprint must be that of all"
    )


@pytest.mark.ci
def test_a_smoke_run_says_that_its_numbers_mean_nothing(as_users_run, capsys):
    words = ["train", "--model", "mlp:3", "--no-doctor"]
    assert main([*words, "--smoke", "--out", "run"]) == 0
    out, err = capsys.readouterr()
    assert "\nSmoke run: the numbers mean nothing.\n" in out
    assert "smoke" not in err
    assert main(["train", "--config", "run", "--out", "again"]) == 0
    out, err = capsys.readouterr()
    assert "jacmatch train: run sets smoke: the numbers will mean nothing. Add --no-smoke for a full run.\n" in err
    assert "Smoke run" in out
    with open("run/result.json") as file:
        assert json.load(file)["settings"]["smoke"] is True
    assert main(["train", "--config", "run", "--no-smoke", "--steps", "2", "--out", "full"]) == 0
    assert not re.search("smoke|mean nothing", "".join(capsys.readouterr()), re.IGNORECASE)


# Warnings ---------------------------------------------------------------------------------------------------------


def test_a_warning_is_one_line_without_the_code_that_gives_it():
    x, y = np.random.default_rng(0).random((40, 3)), np.arange(40) % 2
    np.savez("d.npz", x_train=x[:30], y_train=y[:30], x_test=x[:10], y_test=y[:10])
    command = [sys.executable, "-m", "jacmatch", "train", "--smoke", "--data", "npz:d.npz", "--model", "mlp:2"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    text = "10 of the 10 test inputs of npz:d.npz are training inputs too: they measure no generalization."
    assert [line for line in lines if "test inputs" in line] == [f"jacmatch train: warning: {text}"]
    assert not [line for line in lines if "load(" in line]
