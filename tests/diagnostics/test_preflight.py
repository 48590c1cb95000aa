"""The pre-flight check names planted silent faults with their remedy, before the first step."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tests.jacobian.faults import Applied, Counts, Once, WithoutTangent, cut_square, linear, side_by_side, square
from tests.training import cases
from torch import nn
from torch.nn import functional

from jacmatch.diagnostics import preflight_check, raise_for_faults
from jacmatch.errors import UnsupportedError
from jacmatch.jacobian import RandomInputs
from jacmatch.objectives import CompiledSteps, Distillation, GradientShare, Terms
from jacmatch.teachers import Answer, ModuleTeacher
from jacmatch.training import Training, fit
from jacmatch.training.data import Batch


def batch(count=12):
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(7))
    return Batch(x, torch.arange(count) % 4, torch.arange(count), 0)


def distilled(make, **settings) -> Callable[[], nn.Module]:
    """Distillation of a sound teacher into what `make` makes."""
    return lambda: Distillation(make(), nn.Linear(5, 4), **{"jacobians": GradientShare(0.3), **settings})


def of_layers(function, layers=2):
    return lambda: Applied(function, *(linear(4 if number else 5) for number in range(layers)))


class NeverCompiled(CompiledSteps):
    def __call__(self, *_):
        return None


def never_compiled():
    objective = Distillation(linear(), nn.Linear(5, 4), jacobians=1.0)
    objective.compiled = NeverCompiled()
    return objective


class Remembers(nn.Module):
    """Keeps what it computed first: a result, or a weight."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.scale, self.what, self.cached = linear(), nn.Parameter(torch.ones(1)), what, None

    def forward(self, x):
        if self.cached is None:
            new = self.layer(x) if self.what == "result" else self.scale * self.layer.weight
            self.cached = new.detach() if self.what == "detached weight" else new
        if self.what == "result":
            return self.cached[: len(x)].repeat(-(-len(x) // len(self.cached)), 1) + self.scale
        return functional.linear(x, self.cached.to(x.dtype), self.layer.bias)


class MadeOnce(nn.Module):
    """Its weight is a function of a parameter, computed when it was built."""

    def __init__(self):
        super().__init__()
        self.layer = linear()
        self.weight = 2 * self.layer.weight

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype), self.layer.bias)


class Unregistered(nn.Module):
    def __init__(self, tensor):
        super().__init__()
        self.layer, self.more = linear(), torch.randn(4, requires_grad=True) if tensor else [linear(4)]

    def forward(self, x):
        y = self.layer(x)
        return y * self.more.to(y.dtype) if isinstance(self.more, torch.Tensor) else self.more[0](y)


class HalfDetachedNorm(nn.Module):
    """BatchNorm that takes its statistics for constants."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        y = self.layer(x)
        return (y - y.mean(0).detach()) / (y.var(0, unbiased=False) + 1e-5).sqrt().detach()


class HookedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = linear(), linear(4)

    def forward(self, x):
        hidden = self.first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: 0.5 * gradient)
        return self.second(hidden)


class AsIs:
    """A teacher that runs its network as it is."""

    answers_vjp = False

    def __init__(self, network, tracked=False):
        self.network, self.tracked = network, tracked

    def answer(self, x, question):
        with torch.set_grad_enabled(self.tracked):
            y = self.network(x)
        return Answer(y, y)


def distilled_from(network, tracked=False):
    return lambda: Distillation(linear(), AsIs(network().train(), tracked), jacobians=0.0)


class Own(nn.Module):
    """An objective of somebody's own: cross-entropy and the norm of the gradient, combined by `terms`."""

    needs_partners = False

    def __init__(self, terms, create_graph=True):
        super().__init__()
        self.student, self.terms, self.create_graph = nn.Sequential(linear(), nn.Tanh(), linear(4)), terms, create_graph

    def forward(self, x, y, *, ids, draw=None, partners=None, partner_labels=None, progress=0.0):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            outputs = self.student(x)
            gradient = torch.autograd.grad(
                outputs.square().sum(), x, create_graph=self.create_graph, retain_graph=True
            )[0]
        return Terms(self.terms(functional.cross_entropy(outputs, y, reduction="none"), gradient), outputs)


def summed(labels, gradient):
    return {"loss": labels + gradient, "labels": labels, "gradient": gradient}


@dataclass(frozen=True)
class Wrong:
    """An objective with a silent fault, the code of the finding, and words of its remedy."""

    build: Callable[[], nn.Module]
    code: str
    remedy: str


GRADIENT = ("wrong-gradient", "detached results")
WRONGS = {
    "student detached, labels alone": Wrong(
        distilled(of_layers(lambda x, a, b: b(a(x)).detach()), jacobians=0.0), "no gradient", "jacmatch.doctor"
    ),
    "student detached, Jacobians": Wrong(
        distilled(of_layers(lambda x, a, b: b(a(x)).detach())), "detaches", "jacmatch.doctor"
    ),
    "features detached": Wrong(distilled(of_layers(lambda x, a, b: b(a(x).detach())), jacobians=0.0), *GRADIENT),
    "a factor detached": Wrong(
        distilled(of_layers(lambda x, a, b: b(a(x)) * (1 + a(x).detach().square())), jacobians=0.0), *GRADIENT
    ),
    "a weight detached": Wrong(
        distilled(of_layers(lambda x, a, b: functional.linear(a(x), b.weight.detach())), jacobians=0.0), *GRADIENT
    ),
    "input detached, Jacobians": Wrong(
        distilled(side_by_side(lambda x, a, b: a(x) * b(x.detach()).sigmoid())),
        "partly-detached",
        "what cuts the graph",
    ),
    "a part by numpy": Wrong(
        distilled(side_by_side(lambda x, a, b: a(x) + torch.from_numpy(b(x).detach().numpy())), jacobians=0.0),
        *GRADIENT,
    ),
    "a part without grad": Wrong(
        distilled(side_by_side(lambda x, a, b: a(x) + torch.no_grad()(b)(x)), jacobians=0.0), *GRADIENT
    ),
    "statistics detached": Wrong(distilled(HalfDetachedNorm, jacobians=0.0), *GRADIENT),
    "gradient changed by a hook": Wrong(distilled(HookedLinear, jacobians=0.0), *GRADIENT),
    "custom_op with a cut backward": Wrong(
        distilled(of_layers(lambda x, a, b: b(cut_square(a(x))))), "wrong-gradient", "custom backward"
    ),
    "once differentiable": Wrong(
        distilled(of_layers(lambda x, a, b: b(Once.apply(a(x))))), "once_differentiable", "in torch operations"
    ),
    "a jvp of zero, on one branch": Wrong(
        distilled(
            side_by_side(lambda x, a, b: a(x) + WithoutTangent.apply(b(x))), probe=RandomInputs(1), engine="forward"
        ),
        "forward-incomplete",
        "an engine that is correct",
    ),
    "custom_op without a jvp": Wrong(
        distilled(of_layers(lambda x, a, b: b(square(a(x)))), probe=RandomInputs(1), engine="forward"),
        "jacmatch_tests.square",
        "engine=",
    ),
    "counts its calls": Wrong(distilled(lambda: Counts(as_buffer=False)), "non-deterministic", "Remove the state"),
    "counts in a buffer": Wrong(distilled(lambda: Counts(as_buffer=True)), "writes-in-evaluation", "self.training"),
    "another generator": Wrong(
        distilled(of_layers(lambda x, a, b: b(a(x)) * random.random())), "non-deterministic", "draw with torch"
    ),
    "dropout in evaluation": Wrong(
        distilled(of_layers(lambda x, a, b: b(functional.dropout(a(x), 0.5)))), "random-in-evaluation", "nn.Dropout"
    ),
    "result kept": Wrong(distilled(lambda: Remembers("result"), jacobians=0.0), "keeps-results", "anew"),
    "weight kept": Wrong(distilled(lambda: Remembers("weight"), jacobians=0.0), "keeps-results", "anew"),
    "weight kept, detached": Wrong(
        distilled(lambda: Remembers("detached weight"), jacobians=0.0), "keeps-results", "anew"
    ),
    "weight computed at the beginning": Wrong(distilled(MadeOnce, jacobians=0.0), "wrong-gradient", "earlier call"),
    "modules in a list": Wrong(distilled(lambda: Unregistered(tensor=False)), "unregistered", "nn.ModuleList"),
    "a tensor for a parameter": Wrong(distilled(lambda: Unregistered(tensor=True)), "unregistered", "nn.Parameter"),
    "student compiled by itself": Wrong(
        distilled(lambda: torch.compile(linear(), backend="eager")), "compiled-student", "compile=True"
    ),
    "compiled steps that never run": Wrong(never_compiled, "not-compiled", "report()"),
    "teacher with dropout on": Wrong(
        distilled_from(lambda: nn.Sequential(linear(), nn.Dropout(0.5))), "teacher-changes", "evaluation mode"
    ),
    "teacher's BatchNorm in training": Wrong(
        distilled_from(lambda: nn.Sequential(linear(), nn.BatchNorm1d(4))), "teacher-couples", "running statistics"
    ),
    "teacher with a graph": Wrong(distilled_from(linear, tracked=True), "teacher-with-gradient", "Detach"),
    "sum for mean": Wrong(lambda: Own(lambda c, s: summed(c.mean(), s.square().sum())), "not-a-mean", "take the mean"),
    "norm over the batch": Wrong(
        lambda: Own(lambda c, s: summed(c.mean(), s.square().sum().sqrt())), "not-a-mean", "take the mean"
    ),
    "a term left out of the loss": Wrong(
        lambda: Own(lambda c, s: summed(c.mean(), s.square().sum(1).mean()) | {"loss": c.mean()}),
        "not-a-sum",
        "weighted terms in `values`",
    ),
    "gradient without create_graph": Wrong(
        lambda: Own(lambda c, s: summed(c.mean(), s.square().sum(1).mean()), create_graph=False), *GRADIENT
    ),
}


@pytest.mark.parametrize("name", WRONGS)
def test_a_silent_wrong_is_caught(as_users_run, name):
    torch.manual_seed(3)
    wrong = WRONGS[name]
    objective = wrong.build()
    with pytest.raises(UnsupportedError) as caught:
        raise_for_faults(preflight_check(objective, batch()), objective, batch())
    message = str(caught.value)
    assert wrong.code in message, message
    assert wrong.remedy in message, message


@pytest.mark.parametrize(
    "terms", [lambda c, s: summed(c.mean(), s.square().sum(1).mean()), lambda c, s: {"loss": c.mean()}]
)
def test_a_right_objective_of_ones_own_passes(terms):
    report = preflight_check(Own(terms), batch())
    assert report.findings == ()
    assert max(report.errors.values()) < 1e-3


@pytest.mark.parametrize("make", [cases.distillation, lambda: Distillation(cases.network(), cases.network(9), every=3)])
def test_the_check_changes_no_result(as_users_run, tmp_path, make):
    results = []
    for doctor in (True, False):
        objective = make()
        run = cases.begin(tmp_path / str(doctor))
        fit(objective, cases.images(), Training(steps=4, batch_size=16, doctor=doctor), seed=0, run=run)
        results.append(objective.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]) if isinstance(value, torch.Tensor) else value == results[1][name]
    assert json.loads((tmp_path / "True" / "doctor.json").read_text())["ok"]
    assert not (tmp_path / "False" / "doctor.json").exists()


def test_a_training_with_a_fault_does_not_begin_without_no_doctor():
    def fitted(doctor):
        objective = distilled(of_layers(lambda x, a, b: b(a(x).detach())), jacobians=0.0)()
        split = cases.Split(batch().x, batch().y)
        return fit(objective, split, Training(steps=2, doctor=doctor), seed=0)

    with pytest.raises(UnsupportedError, match=r"Before the first step: \[wrong-gradient\].*--no-doctor"):
        fitted(doctor=True)
    assert fitted(doctor=False).finished


def test_a_module_with_float32_inside_is_no_false_alarm():
    student = Applied(lambda x, a, b: b(a(x).tanh().float().to(x.dtype)), linear(), linear(4))
    assert (
        preflight_check(Distillation(student, ModuleTeacher(linear()), jacobians=GradientShare(0.3)), batch()).findings
        == ()
    )
