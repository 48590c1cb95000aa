"""A run whose loss or weights are no longer finite stops, says so, and keeps the last good checkpoint."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.objectives import Distillation, GradientShare, LossWeights, Terms
from jacmatch.training import Training, fit

from . import cases


class Broken(cases.Plain):
    """The loss of a step is not finite because a term is not."""

    def __init__(self, step, value):
        super().__init__()
        self.at, self.value = step, value

    def forward(self, x, y, **given):
        terms = super().forward(x, y, **given)
        bad = terms["loss"] * (self.value if len(self.calls) == self.at else 1.0)
        return Terms({"loss": terms["loss"] + bad, "outputs": terms["loss"], "jacobians": bad}, terms.student_outputs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("step", "saved_step"), [(13, 10), (10, None), (3, None), (47, 45)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value, step, saved_step):
    settings = Training(steps=60, batch_size=8, checkpoint_every=15, doctor=False)
    left = "There is no checkpoint" if saved_step is None else f"The checkpoint of step {saved_step} is kept"
    with pytest.raises(InputError, match=rf"term `jacobians` .* Got {value} in step {step}\. .*Lower `lr`.*{left}"):
        fit(Broken(step, value), cases.points(), settings, seed=0, run=cases.begin(tmp_path))
    assert (tmp_path / "checkpoint.pt").exists() == (saved_step is not None)
    if saved_step is not None:
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert saved["step"] == saved_step
        assert saved["objective"]["student.weight"].isfinite().all()


def test_ctrl_c_saves_no_loss_that_is_not_finite(tmp_path):
    def on_step(step, _):
        if step == 14:
            raise KeyboardInterrupt

    with pytest.raises(InputError, match=r"Got nan in step 13\. .*The checkpoint of step 10 is kept"):
        fit(
            Broken(13, math.nan), cases.points(), Training(steps=60), seed=0, run=cases.begin(tmp_path), on_step=on_step
        )
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 10


def test_a_loss_without_terms_is_named_itself():
    class Alone(cases.Plain):
        def forward(self, x, y, **given):
            terms = super().forward(x, y, **given)
            return Terms({"loss": terms["loss"] * math.nan}, terms.student_outputs)

    with pytest.raises(InputError, match=r"The term `loss` of the loss .* Got nan in step 1\."):
        fit(Alone(), cases.points(), Training(steps=2, doctor=False), seed=0)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, ema):
    class Root(cases.Plain):
        """A finite loss whose gradient is not: √0."""

        def forward(self, x, y, **given):
            terms = super().forward(x, y, **given)
            root = (0 * self.student.weight.sum()).sqrt() if len(self.calls) == 12 else 0.0
            return Terms({"loss": terms["loss"] + root}, terms.student_outputs)

    with pytest.raises(
        InputError, match=r"The gradient must be finite .* Got nan in step 12\. .*The checkpoint of step 10 is kept"
    ):
        fit(Root(), cases.points(), Training(steps=12, ema=ema), seed=0, run=cases.begin(tmp_path))


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    objective = cases.Plain()
    objective.register_buffer("mean", torch.zeros(1))

    def on_step(step, _):
        objective.mean.fill_(math.nan if step >= 12 else 0.0)

    with pytest.raises(InputError, match=r"must stay finite .* 'mean'\. .*The checkpoint of step 10 is kept"):
        fit(objective, cases.points(), Training(steps=15), seed=0, run=cases.begin(tmp_path), on_step=on_step)


def reported(tmp_path):
    return json.loads((tmp_path / "not_finite.json").read_text())


def test_data_that_are_not_finite_are_named_by_their_rows(tmp_path):
    split = cases.points()
    split.x[[5, 17], 2] = torch.tensor([math.nan, math.inf])
    with pytest.raises(InputError, match=r"in step 1\. Not finite: the data of samples 5, 17\. Clean the data"):
        fit(cases.Plain(), split, Training(steps=2, batch_size=24), seed=0, run=cases.begin(tmp_path))
    assert [sorted(each["samples"]["the data"]) for each in reported(tmp_path)] == [[5, 17]]


class Broken7(nn.Module):
    """A teacher, or a student, that is not finite where the first input is 7; with `derivatives`, only its Jacobian."""

    def __init__(self, derivatives=False):
        super().__init__()
        self.layer, self.derivatives = nn.Linear(4, 3), derivatives

    def forward(self, x):
        bad = (x[:, :1] - 7).square()
        return self.layer(x) + (0.0 * bad.sqrt() if self.derivatives else 0.0 / bad)


def with_seven():
    split = Split(cases.points().x, torch.arange(24) % 3)
    split.x[11, 0] = 7.0
    return split


@pytest.mark.parametrize(("derivatives", "term"), [(False, "outputs"), (True, "jacobians")])
@pytest.mark.ci
def test_samples_that_the_teacher_answers_with_nan_are_named(tmp_path, derivatives, term):
    objective = Distillation(nn.Linear(4, 3), Broken7(derivatives), jacobians=GradientShare(0.3))
    with pytest.raises(
        InputError, match=rf"`{term}` .* Got nan in step 1\. Not finite: the teacher's answer of sample 11"
    ):
        fit(objective, with_seven(), Training(steps=2, batch_size=24), seed=0, run=cases.begin(tmp_path))
    assert reported(tmp_path)[0]["samples"] == {"the teacher's answer": [11]}


@pytest.mark.ci
def test_samples_whose_term_or_gradient_is_nan_are_named():
    settings = Training(steps=2, batch_size=24, accumulate=2, on_not_finite="skip", skip_at_most=0)
    teacher = nn.Linear(4, 3)
    with pytest.raises(InputError, match=r"Not finite: the term `labels` of samples? 11"):
        fit(Distillation(Broken7(), teacher, jacobians=0.0), with_seven(), settings, seed=0)

    class Root(cases.Plain):
        def forward(self, x, y, **given):
            terms = super().forward(x, y, **given)
            loss = terms["loss"] + (0 * self.student.weight.sum() + (x[:, 0] - 7).abs().min()).sqrt()
            return Terms({"loss": loss}, terms.student_outputs)

    split = cases.points()
    split.x[11, 0] = 7.0
    with pytest.raises(InputError, match=r"The gradient must .* in step 1\. Not finite: the gradient of samples? 11"):
        fit(Root(), split, settings, seed=0)


class At(cases.Plain):
    """One step has a NaN, in the loss or in the gradient only."""

    def __init__(self, step, where):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        self.at, self.where = step, where

    def forward(self, x, y, **given):
        bad = len(self.calls) + 1 == self.at and self.training
        terms = super().forward(x * math.nan if bad and self.where == "loss" else x, y, **given)
        weight = self.student[0].weight
        root = (0 * weight.sum()).sqrt() if bad else 0.0
        return Terms({"loss": terms["loss"] + root}, terms.student_outputs)


def skipped(at, where, steps, **settings):
    objective = At(at, where)
    chosen = Training(steps=steps, batch_size=24, schedule="constant", on_not_finite="skip", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(objective, cases.points(), chosen, seed=0)
    assert [str(each.message).startswith(f"Step {at} is skipped") for each in caught] == [True] * (at > 0)
    return objective.student.state_dict()


@pytest.mark.parametrize(
    "settings", [{"optimizer": "sgd"}, {"ema": 0.9, "accumulate": 1}], ids=["sgd", "adam, average"]
)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_step_leaves_everything_as_it_was(where, settings):
    after, before = skipped(7, where, 7, **settings), skipped(0, where, 6, **settings)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    if "ema" not in settings:  # whose decay goes by the number of the step
        first, clean = skipped(1, where, 4, **settings), skipped(0, where, 3, **settings)
        for name, value in clean.items():  # the batch is the same each time, in another order
            assert torch.allclose(first[name].float(), value.float(), atol=1e-6), name


def test_rows_and_checkpoints_count_what_is_skipped(tmp_path):
    run = cases.begin(tmp_path)
    settings = Training(steps=12, on_not_finite="skip", skip_at_most=1)
    with pytest.warns(
        UserWarning, match=r"Step 7 is skipped: the term `loss` of the loss is nan\. With the current weights"
    ):
        fit(At(7, "loss"), cases.points(), settings, seed=0, run=run)
    assert [row.get("skipped", 0) for row in run.metrics()] == [1, 0]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["skipped"] == 1


def test_more_skipped_steps_than_allowed_stop_the_run(tmp_path):
    class Always(cases.Plain):
        def forward(self, x, y, **given):
            terms = super().forward(x, y, **given)
            factor = math.nan if len(self.calls) > 12 else 1.0
            return Terms({"loss": terms["loss"] * factor}, terms.student_outputs)

    settings = Training(steps=60, on_not_finite="skip", skip_at_most=2)
    with (
        pytest.warns(UserWarning, match="Step 1[34] is skipped"),
        pytest.raises(
            InputError, match=r"in step 15\. .*More than `skip_at_most` = 2 .*The checkpoint of step 10 is kept"
        ),
    ):
        fit(Always(), cases.points(), settings, seed=0, run=cases.begin(tmp_path))


def test_shares_measured_on_a_bad_batch_are_not_taken_over():
    weight = nn.Parameter(torch.ones(2))
    balance = LossWeights({"labels": 1.0, "jacobians": GradientShare(0.3)})
    balance.measure({"labels": weight.sum(), "jacobians": 2 * weight.sum()}, [weight])
    factors, shares = dict(balance.factors), dict(balance.shares)
    balance.measure({"labels": weight.sum(), "jacobians": math.inf * weight.sum()}, [weight])
    assert (balance.factors, balance.shares) == (factors, shares)


@pytest.mark.parametrize(
    ("settings", "message"), [({"on_not_finite": "go on"}, "`on_not_finite`"), ({"skip_at_most": -1}, "`skip_at_most`")]
)
def test_wrong_settings_are_refused(as_users_run, settings, message):
    with pytest.raises(InputError, match=message):
        Training(**settings)
