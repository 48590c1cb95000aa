"""The pre-flight check looks at the teacher's derivatives too, by the side that is used, and asks it again later."""

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.diagnostics import preflight_check
from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import RandomInputs, RandomOutputs
from jacmatch.objectives import Distillation
from jacmatch.teachers import AnalyticTeacher, BlackBoxTeacher, EnsembleTeacher, MemoizedTeacher, ModuleTeacher
from jacmatch.training import Training, fit
from jacmatch.training.data import Batch

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Detached(nn.Module):
    """A factor of the outputs is cut off from the input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        z = self.layer(x)
        return z * z.detach().square().sum(1, keepdim=True)


def codes(teacher, probe):
    objective = Distillation(nn.Linear(4, 4), teacher, labels=0, jacobians=0.3, probe=probe)
    return [
        each.code for each in preflight_check(objective, Batch(X, torch.arange(8) % 4, torch.arange(8), 0)).findings
    ]


@pytest.mark.parametrize("wrap", [ModuleTeacher, lambda m: EnsembleTeacher([ModuleTeacher(m)])], ids=["one", "several"])
def test_wrong_rows_of_a_teacher_are_reported(wrap):
    assert "teacher-derivatives" in codes(wrap(Detached()), RandomOutputs(1))
    assert "teacher-derivatives" in codes(MemoizedTeacher(wrap(Detached())), RandomOutputs(1))


def test_a_teacher_with_an_engine_that_is_right_is_not_refused():
    assert codes(ModuleTeacher(Detached()), RandomInputs(1)) == []  # Jv by differences
    assert codes(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)), RandomOutputs(1)) == []


@pytest.mark.parametrize("probe", [RandomOutputs(1), RandomInputs(1)], ids=["rows", "Jv"])
@pytest.mark.parametrize(("factor", "expected"), [(1.0, []), (2.0, ["teacher-derivatives"])])
def test_a_jacobian_that_somebody_wrote_is_compared_with_differences(factor, expected, probe):
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))

    def jacobian(x):
        return factor * (1 - (x @ weight.T).tanh() ** 2)[:, :, None] * weight

    assert codes(AnalyticTeacher(lambda x: (x @ weight.T).tanh(), jacobian), probe) == expected


class Drifts:
    """A function that says something else from its 20th call on."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x[:, :4] + 5.0 * (self.calls > 20)


def test_a_teacher_that_changes_later_is_reported():
    split = Split(X, torch.arange(8) % 4)
    objective = Distillation(nn.Linear(4, 4), BlackBoxTeacher(Drifts()), jacobians=0)
    settings = Training(steps=40, batch_size=8, doctor=True)
    with pytest.raises(UnsupportedError, match=r"After 2\d steps: \[teacher-changes\]"):
        fit(objective, split, settings, seed=0)
