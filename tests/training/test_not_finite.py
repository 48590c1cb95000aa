"""A run whose loss or weights are no longer finite stops, says so, and keeps the last good checkpoint."""

import math

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.objectives import Terms
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
@pytest.mark.parametrize(("step", "kept"), [(13, 10), (10, None), (3, None), (47, 45)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value, step, kept):
    settings = Training(steps=60, batch_size=8, checkpoint_every=15)
    left = "There is no checkpoint" if kept is None else f"The checkpoint of step {kept} is kept"
    with pytest.raises(InputError, match=rf"term `jacobians` .* Got {value} in step {step}\. Lower `lr`.*{left}"):
        fit(Broken(step, value), cases.points(), settings, seed=0, run=cases.begin(tmp_path))
    assert (tmp_path / "checkpoint.pt").exists() == (kept is not None)
    if kept is not None:
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert saved["step"] == kept
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
        fit(Alone(), cases.points(), Training(steps=2), seed=0)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_weights_that_are_not_finite_stop_the_run(tmp_path, ema):
    class Root(cases.Plain):
        """A finite loss whose gradient is not: √0."""

        def forward(self, x, y, **given):
            terms = super().forward(x, y, **given)
            root = (0 * self.student.weight.sum()).sqrt() if len(self.calls) == 12 else 0.0
            return Terms({"loss": terms["loss"] + root}, terms.student_outputs)

    with pytest.raises(
        InputError, match=r"must stay finite .* 'student\.weight'\. .*The checkpoint of step 10 is kept"
    ):
        fit(Root(), cases.points(), Training(steps=12, ema=ema), seed=0, run=cases.begin(tmp_path))
