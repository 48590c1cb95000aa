"""The benchmark of engines: it takes the faster one, reports why others cannot, and leaves nothing behind."""

import inspect

import torch
from torch import nn
from torch.autograd import Function

from jacmatch.datasets import Split
from jacmatch.diagnostics import benchmark_engines
from jacmatch.jacobian import RandomInputs
from jacmatch.objectives import Distillation
from jacmatch.training import Batches


class Slow(Function):
    """The identity, which takes a second by the test's clock in the mode `slow`."""

    generate_vmap_rule = True
    slow, clock = "", 0.0

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        if Slow.slow == "reverse":
            Slow.clock += 1
        return gradient * 1

    @staticmethod
    def jvp(ctx, tangent):
        if Slow.slow == "forward":
            Slow.clock += 1
        return tangent * 1


class NoForwardMode(Function):
    """The identity without a rule for forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def benchmarked(function, monkeypatch, slow=""):
    monkeypatch.setattr(Slow, "slow", slow)
    monkeypatch.setattr(inspect.getmodule(benchmark_engines).time, "perf_counter", lambda: Slow.clock)
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), Layer(function), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)
    )
    objective = Distillation(student, nn.Linear(4, 3), probe=RandomInputs(1), every=3)
    objective.calls = 7
    split = Split(torch.rand(16, 4), torch.arange(16) % 3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state, numbers = objective.get_extra_state(), torch.get_rng_state()
    result = benchmark_engines(objective, Batches(split, 8, seed=0)(0), rounds=3)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(objective.get_extra_state(), state)
    assert (objective.every, objective.measure_every, objective.differentiation.engine) == (3, 100, "auto")
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in student.parameters())
    return result


def test_the_faster_engine_is_taken(monkeypatch):
    assert benchmarked(Slow, monkeypatch, "forward").engine == "reverse"
    result = benchmarked(Slow, monkeypatch, "reverse")
    assert result.engine == "forward"
    assert result.seconds["forward"] < result.seconds["reverse"]


def test_an_engine_that_cannot_is_no_contestant(monkeypatch):
    result = benchmarked(NoForwardMode, monkeypatch)
    assert result.engine == "reverse"
    assert set(result.seconds) == {"reverse"}
    assert "forward" in result.refused["forward"]


def test_differences_are_left_where_no_other_engine_can(monkeypatch):
    class Once(NoForwardMode):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 1

    result = benchmarked(Once, monkeypatch)
    assert result.engine == "differences"
    assert set(result.refused) == {"forward", "reverse"}
