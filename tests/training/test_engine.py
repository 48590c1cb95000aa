import copy
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.objectives import Distillation, Terms
from jacmatch.runs import CHECKPOINT, Run
from jacmatch.training import Training, checkpoints, evaluate, fit

from . import cases, reference


@pytest.mark.parametrize(
    "settings",
    [
        Training(steps=30, batch_size=7, lr=0.05, optimizer="sgd", weight_decay=0.1, schedule="cosine", warmup=5),
        Training(steps=30, batch_size=7, lr=0.05, optimizer="adam", weight_decay=0.1, schedule="constant"),
        Training(steps=30, batch_size=7, lr=0.05, optimizer="adamw", weight_decay=0.1, schedule="step"),
        Training(steps=12, batch_size=5, lr=0.1, optimizer="sgd", momentum=0.0, accumulate=3, clip=0.3),
        Training(steps=12, batch_size=5, lr=0.05, optimizer="sgd", accumulate=2),
        Training(steps=30, batch_size=100, lr=0.05, optimizer="sgd", ema=0.8, clip=100.0),
    ],
    ids=["sgd-cosine", "adam-constant", "adamw-step", "accumulate-clip", "accumulate", "average"],
)
def test_the_loop_does_what_its_settings_say(settings):
    split, objective = cases.points(), cases.Plain()
    weight, bias = objective.student.weight.detach().clone(), objective.student.bias.detach().clone()
    trained, average = reference.train_linear(weight, bias, split, settings, seed=4)
    fitted = fit(objective, split, settings, seed=4)
    expected = average if settings.ema else trained
    torch.testing.assert_close(objective.student.weight.double(), expected[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(objective.student.bias.double(), expected[:, -1], rtol=1e-4, atol=1e-5)
    assert (fitted.steps, fitted.finished) == (settings.steps, True)


def _trained(seed=0, outer=0, settings=Training(steps=12, batch_size=16, augment=("crop",)), **given):  # noqa: B008
    objective = cases.distillation()
    torch.manual_seed(outer)
    fit(objective, cases.images(), settings, seed=seed, **given)
    return objective.student.state_dict()


@pytest.mark.ci
def test_the_seed_decides_every_bit_and_nothing_else_does():
    first, again, other = _trained(), _trained(outer=1), _trained(seed=1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.ci
def test_looking_at_the_run_does_not_change_it(tmp_path):
    often = Training(steps=12, batch_size=16, augment=("crop",), validate_every=1, checkpoint_every=1)
    seen = _trained(settings=often, run=cases.begin(tmp_path), validation=cases.images(9), on_step=lambda *_: None)
    assert all(torch.equal(value, seen[name]) for name, value in _trained().items())


def test_the_random_state_of_the_caller_is_put_back():
    objective, before = cases.Plain(), torch.get_rng_state()
    fit(objective, cases.points(), Training(steps=2), seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_average_follows_weights_and_copies_statistics():
    objective = Distillation(cases.network())
    plain = copy.deepcopy(objective)
    settings = Training(steps=15, batch_size=10, lr=0.05)
    fit(plain, cases.images(), settings, seed=0)
    fit(objective, cases.images(), Training(steps=15, batch_size=10, lr=0.05, ema=0.9), seed=0)
    trained, average = plain.student.state_dict(), objective.student.state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(trained[name], average[name])
    assert not torch.equal(trained["0.weight"], average["0.weight"])
    assert all(parameter.requires_grad for parameter in objective.student.parameters())


def test_objectives_are_given_rows_progress_and_partners():
    split, objective = cases.points(20), cases.Plain()
    objective.needs_partners = True
    fit(objective, split, Training(steps=5, batch_size=8, accumulate=2), seed=0)
    assert [call["at"] for call in objective.calls] == [step / 5 for step in range(5) for _ in range(2)]
    for call in objective.calls:
        assert torch.equal(call["x"], split.x[call["ids"]])
        assert torch.equal(call["y"], split.y[call["ids"]])
        assert not (call["partners"] == call["x"]).all(1).any()
        assert call["labels"].shape == (8, 2)


def test_batchnorm_never_sees_a_single_sample():
    objective = Distillation(cases.network())
    assert fit(objective, cases.images(17), Training(steps=4, batch_size=16), seed=0).steps == 4


class JacobianTerm(nn.Module):
    """A Jacobian term alone: biases of a linear network get no gradient at all, not zero."""

    def __init__(self):
        super().__init__()
        self.student = nn.Linear(4, 2)

    def forward(self, x, y, **_):
        loss = self.student.weight.square().sum()
        return Terms({"loss": loss, "jacobians": loss}, self.student(x))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_parameters_without_gradient_are_left_alone(optimizer):
    objective = JacobianTerm()
    bias, weight = objective.student.bias.detach().clone(), objective.student.weight.detach().clone()
    settings = Training(steps=3, optimizer=optimizer, weight_decay=0.1, clip=1.0)
    fit(objective, cases.points(), settings, seed=0)
    assert torch.equal(objective.student.bias, bias)
    assert not torch.equal(objective.student.weight, weight)


def test_frozen_parameters_are_not_trained_or_decayed():
    objective = cases.Plain()
    objective.student.bias.requires_grad_(False)
    before = objective.student.bias.clone()
    fit(objective, cases.points(), Training(steps=3, weight_decay=0.5), seed=0)
    assert torch.equal(objective.student.bias, before)


def test_objectives_without_anything_to_train_are_refused():
    objective = cases.Plain()
    objective.student.requires_grad_(False)
    with pytest.raises(InputError, match=r"must have a `student` with parameters .* Got Plain\. Do not freeze"):
        fit(objective, cases.points(), Training(steps=1), seed=0)
    with pytest.raises(InputError, match=r"must have a `student` .* Got Linear"):
        fit(nn.Linear(4, 2), cases.points(), Training(steps=1), seed=0)


def test_the_teacher_is_neither_trained_nor_saved(tmp_path):
    objective = cases.distillation()
    before = {name: value.clone() for name, value in objective.teacher.module.state_dict().items()}
    fit(objective, cases.images(), Training(steps=10), seed=0, run=cases.begin(tmp_path))
    after = objective.teacher.module.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(saved["objective"]) == {"_extra_state", *(f"student.{name}" for name in objective.student.state_dict())}


@pytest.mark.ci
def test_metrics_add_up_and_say_where_they_are(tmp_path):
    settings = Training(steps=45, batch_size=16, validate_every=15, schedule="step", milestones=(0.5,), lr=0.01)
    run, objective = cases.begin(tmp_path), cases.distillation()
    fit(objective, cases.images(), settings, seed=0, run=run, validation=cases.images(9, seed=5))
    rows = run.metrics()
    assert [row["step"] for row in rows] == [10, 15, 20, 30, 40, 45]
    assert [row["step"] for row in rows if "validation_accuracy" in row] == [15, 30, 45]
    for row in rows:
        assert row["loss"] == pytest.approx(row["labels"] + row["outputs"] + row["jacobians"], rel=1e-5)
        assert row["share_labels"] + row["share_outputs"] + row["share_jacobians"] == pytest.approx(1)
        assert row["lr"] == pytest.approx(0.01 if row["step"] <= 23 else 0.001)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert (
        rows[-1]["validation_accuracy"]
        == evaluate(objective.student, cases.images(9, seed=5), device="cpu")["accuracy"]
    )


def test_metrics_are_means_over_the_steps_since_the_last_row(tmp_path):
    class Counting(cases.Plain):
        def forward(self, x, y, **given):
            terms = super().forward(x, y, **given)
            number = len(self.calls)
            terms.values = {"loss": 0 * terms["loss"] + number}
            if number % 2:
                terms.values["odd"] = torch.tensor(float(number))
            return terms

    run = cases.begin(tmp_path)
    fit(Counting(), cases.points(), Training(steps=30, doctor=False), seed=0, run=run, validation=cases.points(9))
    rows = run.metrics()
    assert [row["loss"] for row in rows] == [5.5, 15.5, 25.5]
    assert [row["odd"] for row in rows] == [2.5, 7.5, 12.5]
    assert rows[-1]["validation_rmse"] > 0
    assert "validation_rmse" not in rows[0]


def test_on_step_is_called_after_each_step_with_the_last_row():
    seen = []
    fit(cases.Plain(), cases.points(), Training(steps=25), seed=0, on_step=lambda step, row: seen.append((step, row)))
    assert [step for step, _ in seen] == list(range(1, 26))
    logged = [row.get("seconds", 0.0) for _, row in seen]
    assert [sum(value == other for other in logged) for value in logged] == [9] * 9 + [10] * 10 + [5] * 5 + [1]
    assert logged == sorted(logged)
    assert list(seen[-1][1]) == ["loss", "fit", "lr", "seconds"]


def test_max_steps_stops_early():
    seen = []
    fitted = fit(
        cases.Plain(),
        cases.points(),
        Training(steps=50, max_steps=7),
        seed=0,
        on_step=lambda step, _: seen.append(step),
    )
    assert seen[-1] == fitted.steps == 7
    assert not fitted.finished


def test_an_unknown_device_is_refused_before_anything_happens(tmp_path):
    with pytest.raises(InputError, match="`device` must be"):
        fit(cases.Plain(), cases.points(), Training(steps=1), seed=0, device="tpu", run=cases.begin(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_throughput_leaves_validation_out(monkeypatch):
    def slow(*_, **__):
        time.sleep(0.5)
        return {"rmse": 1.0}

    monkeypatch.setattr(checkpoints, "evaluate", slow)
    fitted = fit(
        cases.Plain(),
        cases.points(),
        Training(steps=20, batch_size=8, doctor=False),
        seed=0,
        validation=cases.points(9),
    )
    assert fitted.seconds > 0.5
    assert 20 * 8 / fitted.samples_per_second == pytest.approx(fitted.seconds - 0.5, abs=0.05)
    assert fitted.peak_memory_bytes > 10**7


def test_a_split_without_samples_is_refused():
    empty = Split(torch.zeros(0, 4), torch.zeros(0, 2))
    with pytest.raises(InputError, match="`train` of `fit` must have samples"):
        fit(cases.Plain(), empty, Training(steps=1), seed=0)


@pytest.mark.ci
def test_fabric_is_imported_without_torchmetrics():
    """It asks for the version alone; the empty module that stands for the package is gone afterwards."""
    script = (
        "import sys\n"
        "from jacmatch.training.state import lightning_fabric\n"
        "lightning_fabric()\n"
        "print('torchmetrics' in sys.modules, 'scipy' in sys.modules)\n"
        "from lightning_fabric.utilities import imports\n"
        "import torchmetrics\n"
        "print(imports._TORCHMETRICS_GREATER_EQUAL_1_0_0, bool(torchmetrics.__version__))\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.stdout.split() == ["False", "False", "True", "True"], process.stderr


@pytest.mark.parametrize(("smoke", "max_steps", "saved"), [(True, None, False), (True, 1, True), (False, None, True)])
def test_a_smoke_run_saves_a_checkpoint_only_where_it_stops_early(smoke, max_steps, saved, tmp_path):
    run = Run.create(tmp_path / "run", "train", {"smoke": smoke}, "0")
    split = Split(torch.rand(6, 3), torch.arange(6) % 2)
    settings = Training(steps=2, batch_size=3, max_steps=max_steps, doctor=False)
    fit(Distillation(nn.Linear(3, 2)), split, settings, seed=0, run=run)
    assert (run.path / CHECKPOINT).is_file() == saved
