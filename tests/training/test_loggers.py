"""Loggers: the rows of a run's metrics, in the files of Fabric's loggers and in calls of wandb and mlflow; images of
Jacobians at each evaluation, whose colors are those of the weights of linear networks."""

import csv
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError, UnsupportedError
from jacmatch.objectives import Distillation
from jacmatch.runs import Run
from jacmatch.training import Training, fit

STEPS = [10, 20, 40]  # of the first checkpoint, and every twentieth
SPLIT = Split(torch.rand(20, 3), torch.arange(20) % 2)


def train(folder, logger, steps=40, stop=None, seed=0):
    """Forty steps, of which every twentieth is logged."""
    torch.manual_seed(0)
    run = Run.create(folder, "train", {"lr": 0.1, "steps": steps}, "0.1.0")
    settings = Training(steps=steps, batch_size=10, logger=logger, max_steps=stop, doctor=False)
    fit(Distillation(nn.Linear(3, 2)), SPLIT, settings, seed=seed, run=run)
    return run


def rows_of(run):
    return [{key: value for key, value in row.items() if key != "step"} for row in run.metrics()]


@pytest.mark.ci
def test_csv_has_the_rows_of_the_run(tmp_path):
    run = train(tmp_path / "run", "csv")
    with (run.path / "logs" / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == run.metrics()
    assert [row["step"] for row in rows] == STEPS
    assert {"loss", "labels", "share_labels", "lr"} <= set(rows[0])


@pytest.mark.ci
def test_a_resumed_run_goes_on_in_a_new_file_and_ends_as_one_without_a_logger(tmp_path):
    plain = train(tmp_path / "plain", None)
    run = train(tmp_path / "run", "csv", stop=20)
    run = train(tmp_path / "run", "csv")
    files = sorted((run.path / "logs" / "csv").glob("*/metrics.csv"))
    assert [file.parent.name for file in files] == ["version_0", "version_1"]
    assert not (plain.path / "logs").exists()
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in plain.metrics()]


class Calls(types.ModuleType):
    """A module that stands for a tool, and records the calls of it."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def recorded(self, name, result=None):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return result

        return call


@pytest.mark.ci
def test_wandb_gets_each_row_with_its_step_and_the_settings(tmp_path, monkeypatch):
    tool = Calls("wandb")
    tool.init = tool.recorded("init", types.SimpleNamespace(log=tool.recorded("log"), finish=tool.recorded("finish")))
    monkeypatch.setitem(sys.modules, "wandb", tool)
    run = train(tmp_path / "run", "wandb")
    (_, _, began), *logged, (last, _, _) = tool.calls
    assert began["config"] == {"lr": 0.1, "steps": 40}
    assert (began["project"], began["resume"]) == ("jacmatch", "allow")
    assert [(args[0], kwargs["step"]) for _, args, kwargs in logged] == [
        (row, step) for row, step in zip(rows_of(run), STEPS, strict=True)
    ]
    assert last == "finish"


@pytest.mark.ci
def test_mlflow_gets_each_row_with_its_step_and_the_settings(tmp_path, monkeypatch):
    tool = Calls("mlflow")
    tool.set_experiment = tool.recorded("experiment", types.SimpleNamespace(experiment_id="7"))
    made = types.SimpleNamespace(info=types.SimpleNamespace(run_id="9"))
    client = {"create_run": tool.recorded("run", made)}
    client |= {name: tool.recorded(name) for name in ("log_param", "log_batch", "set_terminated")}
    tool.MlflowClient = lambda: types.SimpleNamespace(**client)
    tool.entities = types.SimpleNamespace(Metric=lambda key, value, time, step: (key, value, step))
    monkeypatch.setitem(sys.modules, "mlflow", tool)
    run = train(tmp_path / "run", "mlflow")
    given = {args[1]: args[2] for name, args, _ in tool.calls if name == "log_param"}
    assert given == {"lr": 0.1, "steps": 40}
    metrics = [kwargs["metrics"] for name, _, kwargs in tool.calls if name == "log_batch"]
    expected = [
        [(key, value, step) for key, value in row.items()] for row, step in zip(rows_of(run), STEPS, strict=True)
    ]
    assert metrics == expected
    assert tool.calls[-1][:2] == ("set_terminated", ("9",))


@pytest.mark.ci
@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_tool_is_named(tmp_path, monkeypatch, name):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr("lightning_fabric.loggers.TensorBoardLogger", missing)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=rf"The logger {name} needs the package {name}.*pip install {name}"):
        train(tmp_path / "run", name)


@pytest.mark.ci
def test_the_log_is_closed_where_a_training_stops(tmp_path, monkeypatch):
    tool = Calls("wandb")
    tool.init = tool.recorded("init", types.SimpleNamespace(log=tool.recorded("log"), finish=tool.recorded("finish")))
    monkeypatch.setitem(sys.modules, "wandb", tool)
    run = Run.create(tmp_path / "run", "train", {}, "0.1.0")

    def interrupt(step, row):
        raise KeyboardInterrupt

    settings = Training(steps=5, batch_size=10, logger="wandb", doctor=False)
    with pytest.raises(KeyboardInterrupt):
        fit(Distillation(nn.Linear(3, 2)), SPLIT, settings, seed=0, run=run, on_step=interrupt)
    assert tool.calls[-1][0] == "finish"


@pytest.mark.usefixtures("as_users_run")
def test_an_unknown_logger_is_refused():
    with pytest.raises(InputError, match="`logger` of `Training` must be a known name"):
        Training(logger="paper")


PICTURES = Split(torch.rand(12, 1, 4, 5), torch.arange(12) % 3)


class Tool:
    """Stands for TensorBoard's logger, and stores the images."""

    shown: list = []  # noqa: RUF012 - one for each test

    def __init__(self, *args, **kwargs):
        self.experiment = self

    def log_metrics(self, metrics, step):
        pass

    def add_image(self, name, pixels, step, dataformats):
        Tool.shown.append((name, step, pixels, dataformats))

    def finalize(self, status):
        pass


def linear(seed=0, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, outputs))


def images_of(folder, monkeypatch, objective, **settings):
    """The images of ten steps, of which every fifth is evaluated."""
    monkeypatch.setattr(Tool, "shown", [])
    monkeypatch.setattr("lightning_fabric.loggers.TensorBoardLogger", Tool)
    run = Run.create(folder, "train", {}, "0.1.0")
    chosen = {"steps": 10, "batch_size": 6, "validate_every": 5, "logger": "tensorboard", "doctor": False, **settings}
    fit(objective, PICTURES, Training(**chosen), seed=0, run=run, validation=PICTURES)
    return Tool.shown


def colors(row):
    """Red for positive, blue for negative, of a row of a Jacobian (H, W)."""
    share = row / np.abs(row).max()
    return np.stack([1 - np.maximum(-share, 0), 1 - np.abs(share), 1 - np.maximum(share, 0)], -1)


@pytest.mark.ci
@pytest.mark.parametrize("classes", [3, 4])
def test_images_show_inputs_and_rows_of_the_top_outputs(tmp_path, monkeypatch, classes):
    student, teacher = linear(), linear(1, classes)
    settings = {"outputs": 0.0, "jacobians": 0.0}  # a teacher of other outputs is only shown
    (_, _, _, _), (name, step, pixels, form) = images_of(
        tmp_path / "run", monkeypatch, Distillation(student, teacher, **settings)
    )
    assert (name, step, form, pixels.dtype, pixels.ndim) == ("jacobian_images", 10, "HWC", np.uint8, 3)
    times, gap = -(-64 // 5), 2
    height, width = 4 * times + gap, 5 * times + gap
    assert pixels.shape == (3 * height - gap, 3 * width - gap, 3)  # input, teacher, student of three classes
    for column in range(3):
        x = PICTURES.x[column]
        tops = [int(network(x[None]).argmax()) for network in (teacher, student)]
        tops[1] = tops[0] if classes == 3 else tops[1]
        rows = [
            network[1].weight[top].detach().view(4, 5).numpy()
            for network, top in zip((teacher, student), tops, strict=True)
        ]
        expected = [np.repeat(x[0, :, :, None].numpy(), 3, 2), *map(colors, rows)]
        for line, each in enumerate(expected):
            tile = pixels[line * height :, column * width :][: 4 * times, : 5 * times]
            assert np.abs(tile[::times, ::times] / 255 - each).max() < 0.01


@pytest.mark.ci
def test_images_need_no_teacher_and_change_no_result(tmp_path, monkeypatch):
    student, other = linear(), linear()
    images = images_of(tmp_path / "run", monkeypatch, Distillation(student))
    assert [step for _, step, _, _ in images] == [5, 10]
    assert images[0][2].shape[0] == 2 * (4 * 13 + 2) - 2  # input and student
    images_of(tmp_path / "other", monkeypatch, Distillation(other), logger=None)
    assert Tool.shown == []
    assert all(torch.equal(*pair) for pair in zip(student.parameters(), other.parameters(), strict=True))


@pytest.mark.ci
def test_vectors_have_no_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Tool, "shown", [])
    monkeypatch.setattr("lightning_fabric.loggers.TensorBoardLogger", Tool)
    train(tmp_path / "run", "tensorboard")
    assert Tool.shown == []


def of_wandb():
    tool = Calls("wandb")
    tool.init = tool.recorded("init", types.SimpleNamespace(log=tool.recorded("log"), finish=tool.recorded("finish")))
    tool.Image = lambda pixels, caption: (pixels.shape, caption)
    return tool, lambda: [
        (args[0].get("jacobian_images"), kwargs["step"]) for name, args, kwargs in tool.calls if name == "log"
    ]


def of_mlflow():
    tool = Calls("mlflow")
    tool.set_experiment = tool.recorded("experiment", types.SimpleNamespace(experiment_id="7"))
    made = types.SimpleNamespace(info=types.SimpleNamespace(run_id="9"))
    client = {"create_run": tool.recorded("run", made)}
    client |= {name: tool.recorded(name) for name in ("log_param", "log_batch", "log_image", "set_terminated")}
    tool.MlflowClient = lambda: types.SimpleNamespace(**client)
    tool.entities = types.SimpleNamespace(Metric=lambda key, value, time, step: (key, value, step))
    return tool, lambda: [
        ((args[1].shape, kwargs["key"]), kwargs["step"]) for name, args, kwargs in tool.calls if name == "log_image"
    ]


@pytest.mark.ci
@pytest.mark.parametrize(("make", "name"), [(of_wandb, "input, teacher, student"), (of_mlflow, "jacobian_images")])
def test_wandb_and_mlflow_get_images_with_their_step(tmp_path, monkeypatch, make, name):
    tool, images = make()
    monkeypatch.setitem(sys.modules, tool.__name__, tool)
    images_of(tmp_path / "run", monkeypatch, Distillation(linear()), logger=tool.__name__)
    size = (2 * 54 - 2, 3 * 67 - 2, 3)
    assert [each for each in images() if each[0] is not None] == [((size, name), 5), ((size, name), 10)]
    assert "jacobian_images" not in {key for row in Run.open(tmp_path / "run", finished=False).metrics() for key in row}
