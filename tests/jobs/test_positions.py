"""Per-position labels, (N, H, W): read from npz; trained, evaluated and compared by the commands; or refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from jacmatch import datasets
from jacmatch.cli import main
from jacmatch.datasets import Split, from_arrays, split_validation
from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.jobs.settings import load
from jacmatch.runs import Run
from jacmatch.teachers import as_teacher
from jacmatch.training import agreement, evaluate

SIZE = (4, 5)


def convolution(outputs, shape):
    """A network that the commands name; its outputs are (B, K, H, W)."""
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, outputs, 1))


def arrays(train=12, test=6):
    """Images whose positions are of the class of their brightness, and some without a label (9)."""
    numbers = np.random.default_rng(0)
    parts = {}
    for name, count in (("train", train), ("test", test)):
        x = numbers.random((count, 1, *SIZE), dtype=np.float32)
        y = (3 * x[:, 0]).astype(np.uint8)
        y[0, 0, :2] = 9
        parts |= {f"x_{name}": x, f"y_{name}": y}
    return {**parts, "ignore_index": np.array(9)}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("scenes.npz", **arrays())
    return "npz:scenes.npz"


def test_ignored_labels_are_no_class(file):
    data = datasets.load(file)
    assert (data.classes, data.outputs, data.positions) == (3, 3, SIZE)
    assert data.train.y[0, 0, :3].tolist() == [-100, -100, int(3 * data.train.x[0, 0, 0, 2])]
    rows = [set(part.tolist()) for part in split_validation(data.train.y, 0.25, seed=0)]
    assert [len(part) for part in rows] == [9, 3]
    assert rows[0] | rows[1] == set(range(12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore_index": np.array([1, 2])}, "`ignore_index` of mine must be one integer. Got int64 of shape"),
        ({"ignore_index": np.array(0.5)}, "must be one integer. Got float64"),
        ({"ignore_index": np.array(7)}, "Store the number of positions without a label as `ignore_index`"),
        ({"y_train": np.full((12, *SIZE), 9)}, "must have labeled positions. Got none"),
        ({"y_train": -np.ones((12, *SIZE), np.int64)}, "class indices must count from 0"),
        ({"j_train": np.zeros((12, 3, 1, *SIZE), np.float32)}, "must have no `j_train` and `j_test` with per-position"),
    ],
)
def test_unusable_labels_are_refused(changes, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        from_arrays("mine", {**arrays(), **changes})


@pytest.mark.ci  # imports torchmetrics
def test_values_and_jacobians_agree_as_the_definitions_say():
    torch.manual_seed(0)
    student, teacher = (convolution(3, (1,)).eval() for _ in range(2))
    x, y = torch.rand(5, 1, *SIZE), torch.randint(3, (5, *SIZE))
    y[0, 0] = -100
    split = Split(x, y)
    tops = [network(x).argmax(1) for network in (student, teacher)]
    known = y != -100
    ious = [
        ((tops[0] == k) & (y == k)).sum() / (((tops[0] == k) | (y == k)) & known).sum().clamp_min(1)
        for k in range(3)
        if (((tops[0] == k) | (y == k)) & known).any()
    ]
    measured = evaluate(student, split, device="cpu")
    assert measured["accuracy"] == pytest.approx(float((tops[0] == y)[known].double().mean()))
    assert measured["miou"] == pytest.approx(float(torch.stack(ious).mean()))
    rows = [
        torch.stack([torch.autograd.functional.jacobian(lambda z, f=f: f(z[None])[0], each).flatten(3) for each in x])
        for f in (student, teacher)
    ]  # (B, K, H, W, input)
    index = tops[1][:, None, ..., None].expand(-1, 1, -1, -1, rows[0].shape[-1])
    cosines = nn.functional.cosine_similarity(*(each.gather(1, index) for each in rows), dim=-1)
    result = agreement(student, as_teacher(teacher), split)
    assert result["top1"] == pytest.approx(float((tops[0] == tops[1]).double().mean()))
    assert result["jacobian_cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert result["jacobian_relative_error"] == pytest.approx(float((rows[0] - rows[1]).norm() / rows[1].norm()), 1e-4)


def test_a_missing_torchmetrics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    split = Split(torch.rand(2, 1, *SIZE), torch.zeros(2, *SIZE, dtype=torch.int64))
    with pytest.raises(InputError, match=r"per-position labels needs the package torchmetrics.*jacmatch\[train\]"):
        evaluate(convolution(3, (1,)), split, device="cpu")


def test_other_jobs_refuse_labels_of_positions(file):
    with pytest.raises(InputError, match=r"must have one label for each sample\. Got labels \(N, 4, 5\)"):
        load(file, 0, False)


def test_a_network_must_have_outputs_of_positions(file):
    data = datasets.load(file)
    with pytest.raises(InputError, match=r"3 outputs for each position of the labels, \(B, 3, 4, 5\).*CALLABLE"):
        networks.Description.of("mlp:4", data).build()


def command(text, code=0):
    assert main(text.split()) == code


MODEL = f"{__name__}:convolution"
STEPS = "--allow-code --steps 6 --batch-size 6 --no-doctor --validation 2"


@pytest.mark.ci
@pytest.mark.usefixtures("all_as_users_run")
def test_the_commands_train_distill_and_compare(file, capsys):
    command(f"train --data {file} --model {MODEL} {STEPS} --out teacher")
    command("evaluate teacher --allow-code --out measured")
    assert "mIoU %: " in capsys.readouterr().out
    teacher = Run.open("teacher").result["student"]
    network, data = networks.load_student("teacher", allow_code=True), datasets.load(file)
    expected = evaluate(network, data.test, device="cpu")
    assert {name: teacher[name] for name in expected} == expected
    assert Run.open("measured").result["student"] == teacher
    command(f"distill --data {file} --teacher teacher --student {MODEL} {STEPS} --methods jacobians --out student")
    assert "mIoU %" in capsys.readouterr().out
    result = Run.open("student").result
    (row,) = result["rows"]
    values = [Run.open(f"student/seed{seed}/jacobians").result["student"]["miou"] for seed in range(3)]
    assert row["miou"]["mean"] == pytest.approx(np.mean(values)) == pytest.approx(result["student"]["miou"])
    assert "mIoU %" in Path("student/report.html").read_text()
    command("compare teacher student --allow-code --samples 3 --out compared")
    worst = Run.open("compared").result["worst"]
    assert all(0 <= each["equal_positions"] <= 1 for each in worst)


@pytest.mark.ci
@pytest.mark.usefixtures("all_as_users_run")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--augment flip", "`--augment` must not be given with per-position labels"),
        (
            "--per-class 2",
            "`labels` of `per_class` must be class indices, one for each sample. Got per-position labels",
        ),
    ],
)
def test_settings_of_samples_are_refused(file, capsys, flags, message):
    command(f"train --data {file} --model {MODEL} {STEPS} {flags}", code=2)
    assert message in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.usefixtures("all_as_users_run")
@pytest.mark.parametrize("flag", ["--probe every-row", "--readout top-logit"])
def test_rows_of_classes_are_refused_before_a_training(file, capsys, flag):
    command(f"distill --data {file} --teacher {MODEL} --student {MODEL} {STEPS} {flag} --out student", code=2)
    assert "must fit per-position outputs, which have no row per class" in capsys.readouterr().err
