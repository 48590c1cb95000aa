"""A run that was interrupted ends bit for bit where an uninterrupted one ends."""

import errno
import os
import random
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.objectives import Distillation
from jacmatch.training import Training, fit
from jacmatch.training.checkpoints import save

from . import cases

# The same objective and loop run with type checks in test_engine.py.
pytestmark = pytest.mark.usefixtures("all_as_users_run")

ALL = {
    "steps": 24,
    "batch_size": 16,
    "lr": 0.02,
    "schedule": "cosine",
    "warmup": 3,
    "augment": ("crop", "flip"),
    "clip": 2.0,
    "validate_every": 8,
    "checkpoint_every": 6,
}
KINDS = {
    "adam": ALL,
    "average-accumulate": {**ALL, "ema": 0.9, "accumulate": 2, "optimizer": "adamw", "weight_decay": 0.01},
    "sgd-bf16": {**ALL, "optimizer": "sgd", "precision": "bf16", "schedule": "step"},
    "labels": ALL,
}


def _fit(kind, folder, objective=None, on_step=None, **changes):
    if objective is None:
        objective = Distillation(cases.network()) if kind == "labels" else cases.distillation()
    settings = Training(**{**KINDS[kind], **changes})
    run = None if folder is None else cases.begin(folder)
    validation = cases.images(9, seed=5)
    fitted = fit(objective, cases.images(), settings, seed=2, run=run, validation=validation, on_step=on_step)
    return objective, fitted


@pytest.fixture(scope="module")
def whole():
    """Students of uninterrupted runs."""
    torch.manual_seed(0)
    return {kind: _fit(kind, None)[0] for kind in KINDS}


def _assert_same(objective, expected):
    state, wanted = objective.student.state_dict(), expected.student.state_dict()
    assert list(state) == list(wanted)
    assert [name for name in state if not torch.equal(state[name], wanted[name])] == []
    assert torch.equal(objective.get_extra_state(), expected.get_extra_state())


@pytest.mark.parametrize(
    ("kind", "step"), [("adam", 1), ("adam", 7), ("adam", 23), ("average-accumulate", 13), ("sgd-bf16", 5)]
)
@pytest.mark.ci
def test_after_max_steps(tmp_path, whole, kind, step):
    _, first = _fit(kind, tmp_path, max_steps=step)
    assert (first.steps, first.finished) == (step, False)
    objective, second = _fit(kind, tmp_path)
    _assert_same(objective, whole[kind])
    assert (second.steps, second.finished) == (24, True)
    assert second.seconds > first.seconds


class Drawn(torch.nn.Module):
    """A network of a user's that draws from Python and from NumPy."""

    def __init__(self):
        super().__init__()
        self.network = cases.network()

    def forward(self, x):
        return self.network(x) * (1 + 0.1 * random.random() + 0.1 * np.random.standard_normal())


def test_the_random_states_of_python_and_numpy_go_on(tmp_path):
    ended = []
    for folder, stops in ((None, (24,)), (tmp_path, (7, 24))):
        for stop in stops:
            random.seed(stop)  # another process has another state
            np.random.seed(stop)
            if stop == stops[0]:
                random.seed(0)
                np.random.seed(0)
            objective, _ = _fit("labels", folder, Distillation(Drawn()), max_steps=stop, doctor=False)
        ended.append((objective, random.random(), np.random.standard_normal()))
    _assert_same(ended[1][0], ended[0][0])
    assert ended[0][1:] == ended[1][1:]


@pytest.mark.ci
def test_after_max_steps_again_and_again(tmp_path, whole):
    for step in (2, 5, 5, 19, 30):
        objective, fitted = _fit("average-accumulate", tmp_path, max_steps=step)
        assert fitted.steps == min(step, 24)
    _assert_same(objective, whole["average-accumulate"])


def _raising(error, at):
    def on_step(step, _):
        if step == at:
            raise error

    return on_step


@pytest.mark.parametrize("step", [1, 9, 17])
def test_after_an_interrupt_which_saves_a_checkpoint(tmp_path, whole, step):
    with pytest.raises(KeyboardInterrupt):
        _fit("labels", tmp_path, on_step=_raising(KeyboardInterrupt, step))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step
    _assert_same(_fit("labels", tmp_path)[0], whole["labels"])


@pytest.mark.parametrize(("step", "saved_step"), [(3, None), (11, 10), (17, 12)])
def test_after_an_error_from_the_checkpoint_before_it(tmp_path, whole, step, saved_step):
    with pytest.raises(ZeroDivisionError):
        _fit("labels", tmp_path, on_step=_raising(ZeroDivisionError, step))
    if saved_step is None:
        saved_step = 0 if not (tmp_path / "checkpoint.pt").exists() else -1
    else:
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == saved_step
    seen = []
    objective, _ = _fit("labels", tmp_path, on_step=lambda step, _: seen.append(step))
    assert seen[0] == saved_step + 1
    _assert_same(objective, whole["labels"])


class _Pressed(torch.nn.Module):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, at, times, number=signal.SIGINT):
        super().__init__()
        self.objective = Distillation(cases.network())
        self._number, self._at, self._times, self._calls = number, at, times, 0  # no settings of the objective
        self.student = self.objective.student

    def forward(self, *given, **named):
        terms = self.objective(*given, **named)
        self._calls += 1
        if self._calls == self._at:
            for _ in range(self._times):
                signal.raise_signal(self._number)
        return terms


def test_sigterm_in_the_middle_of_a_step_lets_it_finish_and_the_run_goes_on(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        _fit("labels", tmp_path, objective=_Pressed(14, 1, signal.SIGTERM))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 14
    again, _ = _fit("labels", tmp_path, objective=_Pressed(99, 1))
    _assert_same(again.objective, whole["labels"])


def test_another_teacher_is_refused(tmp_path):
    _fit("adam", tmp_path, max_steps=7)
    other = cases.distillation()
    other.teacher.module[0].weight.data[0, 0, 0, 0] += 1e-6
    with pytest.raises(
        InputError, match=r"of this run\. Got one that differs in teacher \(torch.nn.*Sequential \w{16} th"
    ):
        _fit("adam", tmp_path, objective=other)
    with pytest.raises(InputError, match=r"teacher \(torch\..* there, none here\)"):
        _fit("adam", tmp_path, objective=Distillation(cases.network()))
    assert _fit("adam", tmp_path)[1].finished


def test_ctrl_c_in_the_middle_of_a_step_lets_it_finish(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _fit("labels", tmp_path, objective=_Pressed(14, 1))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 14
    again, straight = _Pressed(0, 0), _Pressed(0, 0)
    _fit("labels", tmp_path, objective=again)
    _fit("labels", None, objective=straight)
    _assert_same(again.objective, straight.objective)


def test_ctrl_c_pressed_twice_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _fit("labels", tmp_path, objective=_Pressed(14, 2))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 12
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_only_gives_its_student_back(tmp_path, whole):
    _fit("average-accumulate", tmp_path)
    seen = []
    objective, fitted = _fit("average-accumulate", tmp_path, on_step=lambda step, _: seen.append(step))
    _assert_same(objective, whole["average-accumulate"])
    assert seen == []
    assert fitted.finished
    assert fitted.samples_per_second > 0


def test_no_step_is_logged_twice(tmp_path):
    with pytest.raises(ZeroDivisionError):
        _fit("labels", tmp_path, on_step=_raising(ZeroDivisionError, 23), checkpoint_every=11)
    _fit("labels", tmp_path, checkpoint_every=11)
    rows = cases.begin(tmp_path).metrics()
    assert [row["step"] for row in rows] == [8, 10, 11, 16, 20, 22, 24]
    straight = cases.begin(tmp_path / "straight")
    fit(
        Distillation(cases.network()),
        cases.images(),
        Training(**{**ALL, "checkpoint_every": 11}),
        seed=2,
        run=straight,
        validation=cases.images(9, seed=5),
    )
    assert [row | {"seconds": 0} for row in straight.metrics()] == [row | {"seconds": 0} for row in rows]


def test_a_row_in_which_the_run_was_interrupted_is_the_mean_of_all_its_steps(tmp_path):
    for number, folder in enumerate(("straight", "cut", "cut")):
        stopped = _raising(KeyboardInterrupt, 13) if number == 1 else None
        with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
            _fit("labels", tmp_path / folder, on_step=stopped, checkpoint_every=50)
    straight, cut = (cases.begin(tmp_path / name).metrics() for name in ("straight", "cut"))
    assert [row | {"seconds": 0} for row in straight] == [row | {"seconds": 0} for row in cut]


def test_rows_before_the_first_checkpoint_are_dropped_with_it(tmp_path):
    with pytest.raises(ZeroDivisionError):
        _fit("labels", tmp_path, on_step=_raising(ZeroDivisionError, 9), checkpoint_every=20)
    assert [row["step"] for row in cases.begin(tmp_path).metrics()] == [8]
    _fit("labels", tmp_path, checkpoint_every=20)
    assert [row["step"] for row in cases.begin(tmp_path).metrics()] == [8, 10, 16, 20, 24]


def test_how_often_one_looks_may_change(tmp_path, whole):
    _fit("labels", tmp_path, max_steps=9)
    objective, _ = _fit("labels", tmp_path, validate_every=5, checkpoint_every=100)
    _assert_same(objective, whole["labels"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.03}, r"of this run\. Got one that differs in lr \(0\.02 there, 0\.03 here\)"),
        ({"ema": 0.5}, r"ema \(None there, 0\.5 here\)"),
        ({"steps": 25}, r"steps \(24 there, 25 here\)"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    _fit("labels", tmp_path, max_steps=9)
    with pytest.raises(InputError, match=message):
        _fit("labels", tmp_path, **changes)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 9


def test_another_seed_data_set_or_model_is_refused(tmp_path):
    _fit("labels", tmp_path, max_steps=9)
    run, settings = cases.begin(tmp_path), Training(**ALL)
    with pytest.raises(InputError, match=r"seed \(2 there, 3 here\)"):
        fit(Distillation(cases.network()), cases.images(), settings, seed=3, run=run)
    with pytest.raises(InputError, match=r"samples \(40 there, 41 here\)"):
        fit(Distillation(cases.network()), cases.images(41), settings, seed=2, run=run)
    other = Distillation(cases.network())
    other.student[6] = torch.nn.Linear(16, 4)
    with pytest.raises(
        InputError, match=r"weights of this model\. Got 'student\.6\.weight' of shape \(3, 16\), not of"
    ):
        fit(other, cases.images(), settings, seed=2, run=run)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    _fit("labels", tmp_path, max_steps=9)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"must be a complete checkpoint .* Remove it to start again"):
        _fit("labels", tmp_path)
    save(file, {"step": 3})
    with pytest.raises(InputError, match=r"of a training run\. Got one without \['run', 'student', 'seconds'"):
        _fit("labels", tmp_path)


def test_a_full_disk_shows_at_the_first_checkpoint(tmp_path, monkeypatch, whole):
    seen = []
    run = cases.begin(tmp_path)

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"must be writable\. Got 'No space left on device'\. Free some space"):
        fit(
            Distillation(cases.network()),
            cases.images(),
            Training(**{**ALL, "checkpoint_every": 1000, "doctor": False}),
            seed=2,
            run=run,
            on_step=lambda step, _: seen.append(step),
        )
    assert seen[-1] == 9
    assert not (tmp_path / "checkpoint.pt").exists()
    monkeypatch.undo()
    _assert_same(_fit("labels", tmp_path)[0], whole["labels"])
