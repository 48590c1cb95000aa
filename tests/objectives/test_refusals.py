"""What an objective refuses: settings, batches, and students whose derivatives are cut off."""

import copy
import math

import pytest
import torch
from tests.jacobian.faults import Once
from torch import nn

from jacmatch.errors import InputError, UnsupportedError
from jacmatch.jacobian import (
    AntitheticNoise,
    EveryRow,
    LabelClass,
    LabelLogit,
    Logits,
    Loss,
    RandomInputs,
    RandomOutputs,
    TopClass,
    TopLogit,
    unverified,
)
from jacmatch.objectives import AtMixedPairs, AtNoise, Distillation, GradientShare, WeightSchedule
from jacmatch.teachers import BlackBoxTeacher, EnsembleTeacher, ModuleTeacher

from .cases import batch, perceptron, student, teacher

SETTINGS = [
    ({"labels": -1.0}, r"The weight of `labels` must be at least 0 and finite\. Got -1\.0"),
    ({"outputs": math.nan}, r"The weight of `outputs` must be at least 0 and finite\. Got nan"),
    ({"jacobians": math.inf}, r"The weight of `jacobians` must be at least 0 and finite\. Got inf"),
    (
        {"outputs": GradientShare(0.5), "jacobians": GradientShare(0.5)},
        r"The shares of all terms must add up to less than 1\. Got",
    ),
    (
        {"labels": 0, "outputs": 0, "jacobians": 0},
        r"`Distillation` must have at least one term with a weight other than 0\. Got",
    ),
    ({"output_loss": "l2"}, r"`output_loss` of `Distillation` must be a known name\. Got 'l2'\. .*Known: kl, squared"),
    ({"jacobian_loss": "relativ"}, r"`jacobian_loss` of `Distillation` .* Got 'relativ'\. Nearest: relative\."),
    ({"task": "ranking"}, r"`task` of `Distillation` .* Got 'ranking'.* Known: classification, regression"),
    ({"batch_norm": "freeze"}, r"`batch_norm` of `Distillation` .* Got 'freeze'\. .*Known: batch, frozen"),
    ({"every": 0}, r"`every` of `Distillation` must be an integer of at least 1\. Got 0"),
    ({"every": 1.5}, r"`every` of `Distillation` must be an integer of at least 1\. Got 1\.5"),
    ({"measure_every": -1}, r"`measure_every` of `Distillation` must be an integer of at least 1\. Got -1"),
    ({"temperature": 0.0}, r"`temperature` of `Distillation` must be positive and finite\. Got 0\.0"),
    (
        {"probe": "every-row"},
        r"`probe` of `Distillation` must be an object such as RandomOutputs\(1\)\. Got 'every",
    ),
    ({"probe": EveryRow}, r"`probe` of `Distillation` must be an object .* Got the class EveryRow"),
    ({"point": AtNoise}, r"`point` of `Distillation` must be an object such as AtData\(\)\. Got the class AtNoise"),
    ({"readout": Logits}, r"`readout` of `Distillation` must be an object such as Logits\(\)\. Got the class Logits"),
    ({"readout": "logits"}, r"`readout` of `Distillation` must be an object such as Logits\(\)\. Got 'logits'"),
    ({"readout": (Logits(), 3)}, r"`readout` of `Distillation` must be an object such as Logits\(\)\. Got 3"),
    ({"task": "regression", "output_loss": "kl"}, r"`Distillation\(task='regression'\)` must not .* Got kl\. Use"),
    ({"task": "regression", "probe": LabelClass()}, r"must not have settings for classes\. Got LabelClass"),
    (
        {"task": "regression", "readout": (Logits(), TopLogit())},
        r"must not have .* Got TopLogit\. Use readout",
    ),
    ({"chunk_size": 0}, r"`chunk_size` of `Distillation` must be an integer of at least 1, or None\. Got 0"),
    (
        {"chunk_size": 1, "probe": RandomInputs(2)},
        r"`chunk_size` of `Distillation` is for probes on the output side.* Got probe=RandomInputs\(\)",
    ),
    ({"engine": "fast"}, r"`engine` of `Distillation`.*fast"),
    (
        {"engine": "forward"},
        r"`engine` of `Distillation\(probe=RandomOutputs\(\)\)` must be 'auto' or 'reverse'.*RandomInputs",
    ),
    ({"engine": "forward", "probe": AntitheticNoise(sigma=0.1)}, r"must be 'auto' or 'differences'"),
    ({"fraction": 0}, r"`fraction` of `Distillation` must be above 0 and at most 1\. Got 0"),
    ({"fraction": 1.5}, r"`fraction` of `Distillation` must be above 0 and at most 1\. Got 1\.5"),
    ({"fraction": math.nan}, r"`fraction` of `Distillation` must be above 0 and at most 1\. Got nan"),
    ({"point": AtMixedPairs(), "probe": LabelClass()}, r"A mixed pair has no single label.* Use TopClass\(\)"),
    ({"point": AtMixedPairs(), "readout": LabelLogit()}, r"A mixed pair has no single label"),
    ({"point": AtMixedPairs(), "readout": (Logits(), Loss())}, r"A mixed pair has no single label"),
    ({"point": AtMixedPairs(), "task": "regression"}, r"`labels` .* must be 0 at mixed pairs in regression.* Got 1"),
]


@pytest.mark.parametrize(("settings", "match"), SETTINGS, ids=[str(settings) for settings, _ in SETTINGS])
def test_settings(as_users_run, settings, match):
    with pytest.raises(InputError, match=match):
        Distillation(student(), teacher(), **settings)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AtNoise(0.0), r"`sigma` of `AtNoise` must be positive and finite\. Got 0\.0"),
        (lambda: AtNoise(math.inf), r"`sigma` of `AtNoise` must be positive and finite\. Got inf"),
        (
            lambda: WeightSchedule(samples_per_class=0),
            r"`samples_per_class` of `WeightSchedule` must be positive\. Got 0",
        ),
        (lambda: WeightSchedule(halves_at=-1.0), r"`halves_at` of `WeightSchedule` must be positive\. Got -1\.0"),
        (lambda: WeightSchedule(fades_from=1.5), r"`fades_from` of `WeightSchedule` must lie in \[0, 1\]\. Got 1\.5"),
        (lambda: Distillation(student(), torch.sin), r"`teacher` must be a Teacher or an nn\.Module\. Got builtin"),
    ],
)
def test_parts(as_users_run, make, match):
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.parametrize("probe", [None, RandomOutputs(2), EveryRow(), TopClass()])
def test_a_black_box_cannot_answer_for_outputs(probe):
    name = type(probe or RandomOutputs()).__name__
    match = rf"`Distillation\(probe={name}\(\)\)` must answer vᵀJ; BlackBoxTeacher has values only\. Use probe="
    with pytest.raises(UnsupportedError, match=match):
        Distillation(student(), BlackBoxTeacher(teacher()), probe=probe, samples_per_class=5)
    with pytest.raises(UnsupportedError, match=r"EnsembleTeacher\s+has values only"):
        Distillation(student(), EnsembleTeacher([BlackBoxTeacher(teacher())]), probe=probe, samples_per_class=5)
    Distillation(student(), BlackBoxTeacher(teacher()), probe=probe, jacobians=0)


@pytest.mark.parametrize("wrap", [lambda net: net, ModuleTeacher, lambda net: EnsembleTeacher([ModuleTeacher(net)])])
def test_a_student_does_not_share_parameters_with_its_teacher(wrap):
    net = teacher()
    with pytest.raises(InputError, match=r"must not share parameters: the teacher is frozen\. Give the student a copy"):
        Distillation(net, wrap(net))
    both = perceptron(5, seed=1)
    both[1] = net[1]
    with pytest.raises(InputError, match=r"must not share parameters"):
        Distillation(both, wrap(net))


def test_a_refused_student_stays_trainable():
    net = student()
    with pytest.raises(InputError):
        Distillation(net, net)
    assert all(parameter.requires_grad for parameter in net.parameters())
    Distillation(net, copy.deepcopy(net), jacobians=GradientShare(0.3))(**batch())["loss"].backward()
    assert net[1].weight.grad is not None


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [
        ({"y": None}, {}, r"`y` must be given if the weight `labels` is not 0\. Set labels=0 to train without"),
        ({"y": None}, {"labels": 0, "probe": LabelClass()}, r"`labels` of `LabelClass\.directions` must be given"),
        ({"y": None}, {"labels": 0, "readout": LabelLogit()}, r"`LabelLogit` needs `labels` in its context"),
        ({"partner_labels": None}, {"point": AtMixedPairs()}, r"`partner_labels` must be given with `partners`"),
        ({"y": torch.tensor([0, 1])}, {}, r"`y` of `Distillation` must have one entry for each of the 3 samples"),
        ({"ids": torch.tensor([5])}, {"point": AtNoise(0.1)}, r"`ids` of `Distillation` must have one entry for each"),
        ({"ids": torch.arange(3.0)}, {}, r"`ids` of `directions` must be a 1-D tensor of int64\. Got torch\.float32"),
        ({"partners": torch.zeros(1, 2, 3).double()}, {"point": AtMixedPairs()}, r"`partners` .* of shape \(3, 2, 3\)"),
        ({"partner_labels": torch.tensor([1])}, {"point": AtMixedPairs()}, r"`partner_labels` of `Distillation` must"),
        ({"y": torch.zeros(3, 1).double()}, {}, r"`labels` of `cross_entropy` must be integers"),
        (
            {"y": torch.zeros(3, 1).double()},
            {"task": "regression"},
            r"`student` and `teacher` of `squared_error` must have equal",
        ),
    ],
)
def test_batches(as_users_run, change, settings, match):
    with pytest.raises(InputError, match=match):
        Distillation(student(), teacher(), **{"jacobians": GradientShare(0.3), **settings})(**{**batch(), **change})


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Missing(torch.autograd.Function):
    """Its second derivative raises, as that of an operator without one does."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return MissingBackward.apply(gradient)


class MissingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("derivative for missing_backward is not implemented")


def with_layer(function, position):
    layers = list(perceptron(5, seed=1))
    layers.insert(position, Applied(function))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_detached_student(position):
    match = (
        r"`student` of `Distillation` cannot be differentiated as `probe` needs: The values do not depend on `x` .*"
        r"pass probe=AntitheticNoise\(sigma=\.\.\.\); jacmatch\.doctor\(student, x\) names the cause"
    )
    with pytest.raises(UnsupportedError, match=match):
        Distillation(with_layer(torch.Tensor.detach, position), teacher(), jacobians=GradientShare(0.3))(**batch())


def test_a_detached_student_with_directions_on_the_input_side():
    """No engine but differences is left, which need no derivative by the input; of the parameters some lack it too."""
    objective = Distillation(with_layer(torch.Tensor.detach, 0), teacher(), jacobians=1.0, probe=RandomInputs(2))
    truth = Distillation(student(), teacher(), jacobians=1.0, probe=RandomInputs(2))
    torch.testing.assert_close(objective(**batch())["jacobians"], truth(**batch())["jacobians"], rtol=1e-6, atol=1e-9)
    objective = Distillation(with_layer(torch.Tensor.detach, 4), teacher(), labels=0, probe=RandomInputs(2))
    with pytest.raises(UnsupportedError, match=r"as `probe` needs: The values do not depend on `x` .*jacmatch\.doctor"):
        objective(**batch())
    match = r"The term `outputs` has no gradient with respect to the student.*See jacmatch\.doctor"
    with unverified(), pytest.raises(UnsupportedError, match=match):
        objective(**batch())


@pytest.mark.parametrize("position", [0, 2, 4, 5])
def test_a_student_with_a_backward_that_can_be_taken_once(position):
    """At the end nothing in the graph asks for the gradient of that backward: only traced directions betray it."""
    objective = Distillation(with_layer(Once.apply, position), teacher(), jacobians=GradientShare(0.3))
    with pytest.raises(UnsupportedError, match=r"once_differentiable.*jacmatch\.doctor\(student, x\)"):
        objective(**batch())


@pytest.mark.parametrize("position", [0, 2, 5])
def test_such_a_backward_is_seen_where_graphs_are_rebuilt(position):
    objective = Distillation(with_layer(Once.apply, position), teacher(), probe=RandomOutputs(2), chunk_size=1)
    with pytest.raises(UnsupportedError, match=r"cannot be differentiated as `probe` needs: .*once_differentiable"):
        objective(**batch())


def test_a_student_whose_second_derivative_is_missing():
    objective = Distillation(with_layer(lambda x: Missing.apply(x).sin(), 2), teacher(), jacobians=GradientShare(0.3))
    with pytest.raises(UnsupportedError, match=r"derivative for missing_backward is not implemented\."):
        objective(**batch())


def test_other_errors_of_the_student_are_its_own():
    def fail(x):
        raise RuntimeError("out of coffee")

    with pytest.raises(RuntimeError, match="out of coffee"):
        Distillation(with_layer(fail, 2), teacher(), jacobians=GradientShare(0.3))(**batch())


def test_values_alone_need_no_derivatives():
    s = with_layer(Once.apply, 2)
    Distillation(s, teacher(), jacobians=0)(**batch())["loss"].backward()
    assert s[1].weight.grad is not None
