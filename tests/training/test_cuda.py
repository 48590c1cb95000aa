"""The loop on a GPU. Run by hand where there is one: `pytest -m slow tests/training/test_cuda.py`."""

import pytest
import torch
from torch import nn

from jacmatch.objectives import AtMixedPairs, Distillation, GradientShare
from jacmatch.teachers import BlackBoxTeacher, ModuleTeacher
from jacmatch.training import Training, agreement, evaluate, find_device, fit

from . import cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS", "ignore:Synchronization debug mode is a prototype"),
]


def _network(seed):
    """Matrix products and dropout only: their results do not depend on the order in which a GPU works."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 3))


def _objective(**given):
    return Distillation(
        _network(1), _network(2).eval(), seed=3, measure_every=1000, **{"jacobians": GradientShare(0.3), **given}
    )


def _fit(objective, settings, device="cuda", **given):
    fitted = fit(objective, cases.images(64), settings, seed=2, device=device, **given)
    return {name: value.cpu() for name, value in objective.student.state_dict().items()}, fitted


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_steps_between_rows_do_not_wait_for_the_gpu(precision, optimizer):
    settings = Training(
        steps=60, batch_size=16, optimizer=optimizer, clip=1.0, ema=0.9, accumulate=2, augment=("crop", "flip"),
        precision=precision,
    )  # fmt: skip

    def on_step(step, _):
        torch.cuda.set_sync_debug_mode("default" if step + 1 in (10, 60, 61) else "error")

    try:
        _fit(_objective(point=AtMixedPairs()), settings, validation=cases.images(9), on_step=on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_are_those_of_the_cpu_though_no_step_waits_for_them(tmp_path):
    rows = []
    for device in ("cuda", "cpu"):
        objective = Distillation(_network(1).eval(), seed=3)
        _fit(objective, Training(steps=60, batch_size=16, optimizer="sgd"), device, run=cases.begin(tmp_path / device))
        rows.append(cases.begin(tmp_path / device).metrics())
    assert [row["step"] for row in rows[0]] == [10, 20, 40, 60]
    for one, other in zip(*rows, strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-3, abs=1e-4)


def test_the_gpu_does_what_the_cpu_does():
    settings = Training(steps=20, batch_size=16, lr=1e-3, optimizer="sgd", augment=("crop", "flip"), ema=0.5)
    students = []
    for device in ("cuda", "cpu"):
        objective = Distillation(_network(1).eval(), _network(2).eval(), seed=3, point=AtMixedPairs())
        objective.student[3].p = 0.0
        students.append(_fit(objective, settings, device)[0])
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["32", "bf16", "fp16"])
@pytest.mark.parametrize("step", [7, 23])
def test_resumed_runs_end_where_others_do(tmp_path, precision, step):
    settings = {"steps": 40, "batch_size": 16, "precision": precision, "clip": 1.0, "ema": 0.9, "augment": ("crop",)}
    whole, fitted = _fit(_objective(), Training(**settings), run=cases.begin(tmp_path / "whole"))
    _fit(_objective(), Training(**settings, max_steps=step), run=cases.begin(tmp_path / "parts"))
    parts, _ = _fit(_objective(), Training(**settings), run=cases.begin(tmp_path / "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert fitted.peak_memory_bytes > 0
    saved = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert ("scale" in saved["precision"]) == (precision == "fp16")


def test_float16_learns():
    settings = Training(steps=200, batch_size=64, precision="fp16", lr=0.01)
    before = evaluate(_network(1), cases.images(64), device="cuda")["accuracy"]
    objective = _objective()
    _fit(objective, settings)
    assert evaluate(objective.student, cases.images(64), device="cuda")["accuracy"] > max(0.8, before)


def test_a_split_in_host_memory_gives_the_same_batches(monkeypatch):
    settings = Training(steps=12, batch_size=16, augment=("crop", "flip"))
    inside, _ = _fit(_objective(point=AtMixedPairs()), settings)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**9))
    outside, _ = _fit(_objective(point=AtMixedPairs()), settings)
    for name, value in inside.items():  # a byte divided by 255 may differ in its last digit
        torch.testing.assert_close(value, outside[name], rtol=1e-4, atol=1e-5)


def test_the_random_state_of_the_gpu_is_put_back():
    objective, before = _objective(), torch.cuda.get_rng_state()
    _fit(objective, Training(steps=3))
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_judgements_are_those_of_the_cpu():
    split, student, teacher = cases.images(64), _network(1), _network(2)
    here = [evaluate(student, split, device="cpu"), agreement(student, ModuleTeacher(teacher), split)]
    here.append(agreement(student, BlackBoxTeacher(teacher), split))
    there = [evaluate(student, split, device="cuda"), agreement(student, ModuleTeacher(teacher), split)]
    there.append(agreement(student, BlackBoxTeacher(teacher.cuda()), split))
    for one, other in zip(here, there, strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-3)


def test_a_regression_runs_on_any_name_of_the_gpu():
    for name in ("cuda", "cuda:0", "auto", torch.device("cuda", 0)):
        objective = cases.Plain()
        fit(objective, cases.points(), Training(steps=2), seed=0, device=name, validation=cases.points(5))
        assert objective.student.weight.device == find_device("cuda")
