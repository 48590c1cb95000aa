"""The defaults of distillation: one place for Python and the command line, and nothing is assumed to be scarce."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jacobian import AntitheticNoise, LabelLogit, RandomInputs, TopClass
from jacmatch.jobs.distill import DistillationFields
from jacmatch.objectives import AtData, AtMixedPairs, AtNoise, Distillation, GradientShare, WeightSchedule
from jacmatch.objectives.weights import SCARCE, WORTHWHILE, describe_labels, labels_of, recipe
from jacmatch.teachers import ModuleTeacher


def pair():
    return nn.Linear(4, 3), nn.Linear(4, 3)


@pytest.mark.parametrize("number", [1, SCARCE, SCARCE + 1, 400, 1000, None])
def test_python_and_the_command_line_share_them(number):
    """Data sets of `number` samples for each of 3 classes, or a regression."""
    task = "regression" if number is None else "classification"
    mine = Distillation(*pair(), samples_per_class=number, task=task)
    theirs = DistillationFields().resolved(number)
    assert (mine.output_loss, mine.temperature) == (theirs["output_loss"], theirs["temperature"])
    assert isinstance(mine.differentiation.point, AtMixedPairs) == (theirs["point"] == "mixed-pairs")
    assert mine.loss_weights.weights["jacobians"] == theirs["jacobian_share"]
    assert mine.schedule == DistillationFields().recipe(number).schedule


@pytest.mark.parametrize(
    ("number", "point", "share"), [(5, AtMixedPairs(), 0.3), (30, AtMixedPairs(), 0.3), (31, AtData(), 0.3)]
)
def test_classification_of_few_samples(number, point, share):
    settings = recipe("classification", number)
    assert (settings.output_loss, settings.temperature, settings.point) == ("kl", 4.0, point)
    assert settings.jacobians == GradientShare(share)
    assert settings.schedule(0.0) == pytest.approx(1 / (1 + (number / 300) ** 4))


def test_no_derivative_where_jacobians_do_not_pay():
    assert recipe("classification", WORTHWHILE).jacobians == GradientShare(0.3)
    assert recipe("classification", WORTHWHILE + 1).jacobians == 0
    assert recipe("classification", None).jacobians == 0


def test_regression_has_squared_outputs_and_jacobians_at_the_data():
    settings = recipe("regression")
    assert (settings.output_loss, settings.point, settings.jacobians) == ("squared", AtData(), GradientShare(0.3))
    assert settings.schedule(0.0) == 1


@pytest.mark.parametrize(
    ("given", "loss", "temperature"),
    [
        ({}, "kl", 4.0),
        ({"temperature": 2.0}, "kl", 2.0),
        ({"output_loss": "kl"}, "kl", 1.0),
        ({"output_loss": "kl", "temperature": 3.0}, "kl", 3.0),
        ({"output_loss": "squared"}, "squared", 1.0),
    ],
)
def test_an_explicit_loss_has_temperature_1(given, loss, temperature):
    made = Distillation(*pair(), samples_per_class=10, **given)
    assert (made.output_loss, made.temperature) == (loss, temperature)


def test_what_is_given_stays():
    made = Distillation(*pair(), samples_per_class=10_000, jacobians=GradientShare(0.2), point=AtNoise(0.1))
    assert made.loss_weights.weights["jacobians"] == GradientShare(0.2)
    assert made.schedule(0.0) == 1
    assert made.differentiation.point == AtNoise(0.1)
    schedule = WeightSchedule(fades_from=0.5)
    assert Distillation(*pair(), samples_per_class=10, jacobians=1.0, schedule=schedule).schedule is schedule
    assert Distillation(*pair(), samples_per_class=10, jacobians=0).loss_weights.weights["jacobians"] == 0


@pytest.mark.parametrize(
    "setting",
    [{"probe": RandomInputs(1)}, {"jacobian_loss": "squared"}, {"every": 2}, {"fraction": 0.5}, {"chunk_size": 1}],
)
def test_a_setting_of_the_jacobian_term_enables_it(setting):
    """It would be ignored without a word otherwise."""
    assert Distillation(*pair(), **setting).loss_weights.weights["jacobians"] == GradientShare(0.3)


def test_mixed_pairs_are_not_chosen_where_a_single_label_is_needed():
    assert Distillation(*pair(), samples_per_class=5, readout=LabelLogit()).differentiation.point == AtData()
    assert Distillation(*pair(), samples_per_class=5, probe=TopClass()).differentiation.point == AtMixedPairs()


def test_an_unknown_amount_of_data_is_reported_once_and_nothing_is_assumed():
    with pytest.warns(UserWarning, match=r"`samples_per_class` is not given\. Pass samples_per_class=\.\.\."):
        made = Distillation(*pair())
    assert made.loss_weights.weights["jacobians"] == 0
    assert made.differentiation.point == AtData()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Distillation(nn.Linear(4, 3))
        Distillation(*pair(), jacobians=0)
        Distillation(*pair(), samples_per_class=5000)
        Distillation(*pair(), task="regression")


class RecordingTeacher(ModuleTeacher):
    def __init__(self, module):
        super().__init__(module)
        self.questions = []

    def answer(self, x, question=None):
        self.questions.append(question)
        return super().answer(x, question)


def test_without_a_share_a_step_is_that_of_plain_distillation():
    """One forward pass of the student, no product from the teacher, and the gradient of labels + KL bit for bit."""
    (student, network), passes = pair(), []
    teacher = RecordingTeacher(network)
    student.register_forward_hook(lambda *_: passes.append(1))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    terms = Distillation(student, teacher, samples_per_class=5000)(x, y)
    assert terms.keys() == ["loss", "labels", "outputs"]
    assert len(passes) == 1
    assert [(q.cotangents, q.tangents) for q in teacher.questions] == [(None, None)]
    (gradient,) = torch.autograd.grad(terms["loss"], [student.weight])
    outputs, teacher_outputs = student(x), network(x)
    kl = nn.KLDivLoss(reduction="batchmean")((outputs / 4).log_softmax(1), (teacher_outputs / 4).softmax(1)) * 16
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(outputs, y) + kl, [student.weight])
    torch.testing.assert_close(gradient, expected)


class Images(Dataset):
    """Inputs that must not be loaded."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        raise AssertionError("an input was loaded")


LABELS = torch.arange(12) % 3
SETS = {
    "tensor": LABELS,
    "array": LABELS.numpy(),
    "list": LABELS.tolist(),
    "targets": Images(targets=LABELS.tolist()),
    "labels": Images(labels=LABELS.numpy()),
    "split": Split(torch.rand(12, 4), LABELS),
    "tensors": TensorDataset(torch.rand(12, 4), LABELS),
    "loader": DataLoader(Images(targets=LABELS), batch_size=4),
    "subset": Subset(ConcatDataset([Images(targets=LABELS)] * 2), range(12)),
}


@pytest.mark.parametrize("name", SETS)
def test_labels_are_counted_without_loading_an_input(name):
    assert torch.equal(labels_of(SETS[name]), LABELS)
    made = Distillation.for_dataset(*pair(), SETS[name], seed=3)
    assert made.schedule.samples_per_class == 4
    assert (made.task, made.differentiation.point, made.differentiation.seed) == ("classification", AtMixedPairs(), 3)


def test_numbers_are_a_regression():
    made = Distillation.for_dataset(*pair(), torch.randn(12, 3))
    assert (made.task, made.output_loss) == ("regression", "squared")
    assert describe_labels(torch.tensor([1.5, 2.0])) == ("regression", None)
    assert describe_labels(torch.arange(12), "regression") == ("regression", None)


def test_one_hot_labels_are_named_and_taken_as_classes():
    one_hot = nn.functional.one_hot(LABELS).float()
    with pytest.warns(UserWarning, match="float labels whose rows are one-hot: taken as classes"):
        made = Distillation.for_dataset(*pair(), one_hot)
    assert (made.task, made.schedule.samples_per_class) == ("classification", 4)
    assert describe_labels(one_hot, "classification") == ("classification", 4)
    assert describe_labels(one_hot, "regression") == ("regression", None)


REFUSED = [
    (torch.full((6, 3), 1 / 3), {}, r"rows that sum to 1\. Got float32 of shape \(6, 3\)\. Pass task='classification'"),
    (
        LABELS.float(),
        {},
        r"integers of a floating-point type\. Got float32 of shape \(12,\)\. Convert .*\.long\(\)",
    ),
    (torch.zeros(2, 8, 8, dtype=torch.int64), {}, r"one class for each sample\. Got int64 of shape \(2, 8, 8\)"),
    (torch.zeros(0), {}, r"must be classes \(N,\), or numbers .* Got float32 of shape \(0,\)"),
    (
        torch.randn(5, 2),
        {"task": "classification"},
        r"must be class indices, or probabilities .* Convert class indices",
    ),
    (
        Images(),
        {},
        r"`dataset` of `Distillation\.for_dataset` must have its labels as .* Got Images\. Give samples_per",
    ),
    (np.array(["cat", "dog"]), {}, r"must have its labels as .* Got ndarray"),
    (None, {}, r"`dataset` or `samples_per_class` of `Distillation\.for_dataset` must be given"),
    (None, {"samples_per_class": -1}, r"`samples_per_class` of `Distillation` must be positive\. Got -1"),
    (None, {"samples_per_class": math.nan}, r"`samples_per_class` of `Distillation` must be positive\. Got nan"),
]


@pytest.mark.parametrize(("data", "settings", "match"), REFUSED)
def test_what_labels_do_not_say_is_refused(data, settings, match):
    with pytest.raises(InputError, match=match):
        Distillation.for_dataset(*pair(), data, **settings)


def test_the_number_is_taken_where_it_is_given():
    made = Distillation.for_dataset(*pair(), samples_per_class=7, probe=AntitheticNoise(sigma=0.1))
    assert made.schedule.samples_per_class == 7
