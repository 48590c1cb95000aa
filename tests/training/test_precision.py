import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.jacobian import vjp_products
from jacmatch.objectives import Distillation, Robustness
from jacmatch.training import Training, fit
from jacmatch.training.state import scale_derivatives

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
@pytest.mark.ci
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


def faint():
    """Its gradients on the way back are below the smallest number of float16, 6·10⁻⁸."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    module[2].weight.data *= 1e-2
    return module


def test_scaled_products_are_there_where_float16_loses_them():
    module, x, v = faint(), torch.randn(5, 4), 1e-5 * torch.randn(1, 5, 3)
    exact = vjp_products(module, x, v).products
    with torch.autocast("cpu", dtype=torch.float16):
        lost, scaled = (
            vjp_products(module, x, v).products,
            vjp_products(module, x, v, scale=torch.tensor(1024.0)).products,
        )
    assert scaled.dtype == torch.float32
    assert (lost - exact).norm() > 0.3 * exact.norm()
    assert (scaled - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_power_of_two_changes_nothing_in_float32(chunk_size):
    module, x, v = faint(), torch.randn(5, 4), torch.randn(2, 5, 3)
    plain, scaled = (
        vjp_products(module, x, v, chunk_size=chunk_size, scale=scale).products for scale in (None, torch.tensor(256.0))
    )
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize(
    "make", [lambda: Distillation(faint(), nn.Linear(4, 3), jacobians=1.0), lambda: Robustness(faint(), penalty=1.0)]
)
def test_objectives_scale_their_products_by_the_loss_scale_up_to_a_bound(make):
    x, y, losses = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), []
    for scale in (None, 64.0, 2.0**16):
        torch.manual_seed(0)
        objective = make()
        scale_derivatives(objective, None if scale is None else torch.tensor(scale))
        losses.append(objective(x, y)["loss"])
    assert losses[0] == losses[1] == losses[2]
    assert objective.differentiation.scale == 1024


def test_a_product_that_overflows_is_left_out_by_the_scaler_and_fits_later():
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    x, v, steps = torch.randn(5, 4), 1000 * torch.ones(1, 5, 3), []
    for _ in range(12):
        before = module.weight.clone()
        with torch.autocast("cpu", dtype=torch.float16):
            scale = scaler.scale(torch.ones(())).clamp(max=1024)
            loss = vjp_products(module, x, v, scale=scale).products.square().mean() * 1e-6
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(not torch.equal(before, module.weight))
    assert not steps[0]
    assert steps[-1]
    assert module.weight.isfinite().all()
