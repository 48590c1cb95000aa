import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.objectives import Terms
from jacmatch.training import Training, fit
from jacmatch.training import engine as engine_module

from . import cases


class Watching(cases.Plain):
    """Notes in which type it is run."""

    def forward(self, x, y, **given):
        terms = super().forward(x, y, **given)
        self.seen = (x, y, terms.student_outputs.dtype, torch.is_autocast_enabled("cpu"))
        terms.teacher_outputs, terms.shares = terms.student_outputs.detach(), {"fit": 1.0}
        return terms


def test_autocast_leaves_batch_weights_and_terms_whole():
    objective, terms = Watching(), []
    split = cases.points()
    plain = engine_module._train_step

    def train_step(state, batches):
        model = state.model
        state.model = lambda *a, **k: terms.append(model(*a, **k)) or terms[-1]
        return plain(state, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_train_step", train_step)
        fit(objective, split, Training(steps=1, batch_size=8, precision="bf16"), seed=0)
    x, y, dtype, autocast = objective.seen
    assert autocast
    assert dtype == torch.bfloat16
    rows = objective.calls[-1]["ids"]
    assert torch.equal(x, split.x[rows])
    assert torch.equal(y, split.y[rows])
    assert isinstance(terms[0], Terms)
    assert terms[0].keys() == ["loss", "fit"]
    assert terms[0].student_outputs.dtype == terms[0].teacher_outputs.dtype == torch.float32
    assert terms[0].student_outputs.requires_grad
    assert terms[0].shares == {"fit": 1.0}
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
