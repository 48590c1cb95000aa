"""Between rows of metrics nothing in the loop waits for a device: no tensor becomes a number, none is fetched."""

import math
from contextlib import ExitStack

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from jacmatch.errors import InputError
from jacmatch.objectives import Distillation, Terms
from jacmatch.training import Training, calibration, evaluate, fit
from jacmatch.training import state as metrics_module
from jacmatch.training.state import Metrics

from . import cases

OPERATORS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.", "masked_select")
METHODS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")


class Waits(ExitStack):
    """Counts where the host would wait for a GPU: by operators, and by methods that a CPU does without any operator."""

    def __enter__(self):
        super().__enter__()
        self.count, outer = 0, self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                masks = [each for each in (args[1] if "index.Tensor" in str(function) else ()) if each is not None]
                outer.count += any(word in str(function) for word in OPERATORS)
                outer.count += any(mask.dtype == torch.bool for mask in masks)
                return function(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                outer.count += getattr(function, "__name__", "") in METHODS
                return function(*args, **(kwargs or {}))

        self.enter_context(Operators())
        self.enter_context(Methods())
        return self


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.numpy(),
    ],
)
def test_what_waits_is_counted(waits):
    with Waits() as counted:
        (torch.rand(3) + 1).relu().sum()
        assert counted.count == 0
        waits(torch.rand(3))
    assert counted.count > 0


def counts(objective, **settings):
    """Waits up to each step."""
    seen = []
    chosen = {"steps": 19, "batch_size": 8, "optimizer": "sgd", "augment": ("crop", "flip")} | settings
    with Waits() as waits:
        fit(objective, cases.images(), Training(**chosen), seed=0, on_step=lambda *_: seen.append(waits.count))
    return seen


@pytest.mark.parametrize("settings", [{}, {"clip": 1.0, "ema": 0.9, "accumulate": 2, "on_not_finite": "skip"}])
@pytest.mark.parametrize("objective", [lambda: Distillation(cases.network()), cases.distillation])
@pytest.mark.ci
def test_steps_between_rows_wait_for_nothing(settings, objective):
    objective = objective()
    objective.measure_every = 1000  # the shares are measured in the first step
    seen = counts(objective, **settings)
    assert seen[1:9] == [seen[1]] * 8  # rows are logged at steps 10 and 19
    assert seen[10:18] == [seen[10]] * 8
    assert seen[0] < seen[9] < seen[18] or objective.teacher is None


class Curious(cases.Plain):
    """An objective that looks at its loss in each step."""

    def forward(self, x, y, **given):
        terms = super().forward(x, y, **given)
        terms["loss"].item()
        return terms


def test_an_objective_that_waits_is_reported():
    seen = []
    with Waits() as waits:
        fit(Curious(), cases.points(), Training(steps=9), seed=0, on_step=lambda *_: seen.append(waits.count))
    assert seen[8] - seen[1] >= 7


def test_judgements_wait_once_and_not_for_each_batch():
    split, network = cases.images(60), cases.network()
    for judge in (evaluate, calibration):
        with Waits() as few:
            judge(network, split, batch_size=60, device="cpu")
        with Waits() as many:
            judge(network, split, batch_size=4, device="cpu")
        assert few.count == many.count > 0


class Slow:
    """A copy to the host that is under way until it is waited for, or marked as done."""

    def __init__(self):
        self.done, self.waited = False, 0

    def query(self):
        return self.done

    def synchronize(self):
        self.waited += not self.done
        self.done = True


@pytest.fixture
def slow(monkeypatch):
    """Copies to the host that take their time, as those of a GPU."""
    copies = []

    def sent(table):
        copies.append(Slow())
        return table, copies[-1]

    monkeypatch.setattr(metrics_module, "_sent", sent)
    return copies


def test_rows_are_logged_when_they_have_arrived_and_in_their_order(slow):
    metrics = Metrics(torch.device("cuda"))
    for step in (1, 2, 3):
        metrics.add({"loss": torch.tensor(float(step))})
        metrics.send(step, {"lr": 0.1})
    assert metrics.arrived("") == []
    slow[1].done = True  # the second before the first
    assert metrics.arrived("") == []
    slow[0].done = True
    assert metrics.arrived("") == [(1, {"loss": 1.0, "lr": 0.1}), (2, {"loss": 2.0, "lr": 0.1})]
    assert [copy.waited for copy in slow] == [0, 0, 0]
    assert metrics.arrived("", wait=True) == [(3, {"loss": 3.0, "lr": 0.1})]
    assert slow[2].waited == 1
    assert metrics.arrived("", wait=True) == []


def test_the_loop_waits_for_rows_at_checkpoints_only(tmp_path, slow, monkeypatch):
    monkeypatch.setattr("jacmatch.training.state.Metrics", lambda device, ranks: Metrics(torch.device("cuda")))
    settings = Training(steps=100, batch_size=8, checkpoint_every=50)
    seen, run = [], cases.begin(tmp_path)
    fit(
        cases.Plain(),
        cases.points(),
        settings,
        seed=0,
        run=run,
        on_step=lambda step, row: seen.append(len(run.metrics())),
    )
    assert [seen[step - 1] for step in (9, 10, 20, 49, 50, 60, 99, 100)] == [0, 1, 1, 1, 4, 4, 4, 7]
    assert [row["step"] for row in run.metrics()] == [10, 20, 40, 50, 60, 80, 100]


def test_a_loss_that_is_not_finite_is_named_with_its_step_though_the_row_comes_late(tmp_path, slow, monkeypatch):
    class Broken(cases.Plain):
        def forward(self, x, y, **given):
            terms = super().forward(x, y, **given)
            factor = math.nan if len(self.calls) == 13 else 1.0
            return Terms({"loss": terms["loss"] * factor}, terms.student_outputs)

    monkeypatch.setattr("jacmatch.training.state.Metrics", lambda device, ranks: Metrics(torch.device("cuda")))
    settings = Training(steps=100, checkpoint_every=50)
    with pytest.raises(InputError, match=r"`loss` .* Got nan in step 13\. .*The checkpoint of step 10 is kept"):
        fit(Broken(), cases.points(), settings, seed=0, run=cases.begin(tmp_path))
