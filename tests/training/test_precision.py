import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.training import Training, fit

from . import cases


class Watching(cases.Plain):
    """Notes in which type it is run."""

    def forward(self, x, y, **given):
        terms = super().forward(x, y, **given)
        self.seen = (x, y, terms.student_outputs.dtype, torch.is_autocast_enabled("cpu"))
        return terms


def test_autocast_leaves_batch_and_weights_whole():
    objective, split = Watching(), cases.points()
    fit(objective, split, Training(steps=1, batch_size=8, precision="bf16"), seed=0)
    x, y, dtype, autocast = objective.seen
    assert autocast
    assert dtype == torch.bfloat16
    rows = objective.calls[-1]["ids"]
    assert torch.equal(x, split.x[rows])
    assert torch.equal(y, split.y[rows])
    assert all(parameter.dtype == torch.float32 for parameter in objective.parameters())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_bfloat16_trains_like_float32_only_less_exactly(ema):
    half, whole = cases.distillation(), cases.distillation()
    settings = {"steps": 10, "batch_size": 16, "lr": 0.01, "optimizer": "sgd", "ema": ema}
    fit(half, cases.images(), Training(precision="bf16", **settings), seed=0)
    fit(whole, cases.images(), Training(**settings), seed=0)
    start = cases.network(1)[6].weight
    difference = (half.student[6].weight - whole.student[6].weight).norm()
    assert 0 < difference < 0.1 * (whole.student[6].weight - start).norm()


def test_float16_needs_a_gpu():
    with pytest.raises(InputError, match=r"`precision='fp16'` .* Got device 'cpu'\. Use precision='bf16' or '32'"):
        fit(cases.Plain(), cases.points(), Training(steps=1, precision="fp16"), seed=0)
