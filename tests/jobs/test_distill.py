"""What the settings of `jacmatch distill` mean: the objective that they make for data of one size or another."""

import pytest
import torch
from torch import nn

from jacmatch.datasets import Data, Split
from jacmatch.errors import InputError
from jacmatch.jobs import Distill
from jacmatch.objectives import AtData, AtMixedPairs, AtNoise


def data(per_class=10, classes=3):
    """A data set of so many samples a class, or a regression."""
    if classes is None:
        split = Split(torch.rand(30, 4), torch.rand(30, 2))
        return Data("regression", split, split, None, 2, (4,), (0.0,) * 4, (1.0,) * 4)
    split = Split(torch.rand(per_class * classes, 4), torch.arange(per_class * classes) % classes)
    return Data("classes", split, split, classes, classes, (4,), (0.0,) * 4, (1.0,) * 4)


def objective(given, method="jacobians", **settings):
    student, teacher = nn.Linear(4, given.outputs), nn.Linear(4, given.outputs)
    return Distill(**settings).objective(method, student, teacher, given.train, given, 0)


@pytest.mark.parametrize(
    ("settings", "per_class", "point"),
    [
        ({}, 30, AtMixedPairs),
        ({}, 31, AtData),
        ({"point": "data"}, 5, AtData),
        ({"point": "noise"}, 5, AtNoise),
        ({"point": "mixed-pairs"}, 500, AtMixedPairs),
        ({"probe": "label-class"}, 5, AtData),
        ({"readout": "label-logit"}, 5, AtData),
        ({"readout": "loss"}, 5, AtData),
        ({"probe": "top-class"}, 5, AtMixedPairs),
    ],
)
def test_scarce_data_are_compared_at_mixed_pairs(settings, per_class, point):
    assert type(objective(data(per_class), **settings).differentiation.point) is point


def test_a_regression_is_compared_at_its_data_by_squared_errors():
    made = objective(data(classes=None))
    assert type(made.differentiation.point) is AtData
    assert made.output_loss == "squared"


def test_every_method_is_compared_at_the_same_points():
    assert {type(objective(data(), method).differentiation.point) for method in ("labels", "outputs", "jacobians")} == {
        AtMixedPairs
    }


@pytest.mark.parametrize(
    ("settings", "loss", "temperature"),
    [
        ({}, "kl", 4.0),
        ({"temperature": 2.0}, "kl", 2.0),
        ({"output_loss": "kl"}, "kl", 1.0),
        ({"output_loss": "kl", "temperature": 3.0}, "kl", 3.0),
        ({"output_loss": "squared"}, "squared", 1.0),
    ],
)
def test_outputs_of_classes_are_compared_by_kl(settings, loss, temperature):
    made = objective(data(), **settings)
    assert (made.output_loss, made.temperature) == (loss, temperature)


def test_temperature_of_log_probabilities_is_one_unless_it_is_given():
    assert objective(data(), readout="log-probabilities").differentiation.readout.temperature == 1
    assert objective(data(), readout="log-probabilities", temperature=3.0).differentiation.readout.temperature == 3
    assert objective(data(), probe="fisher-rows").differentiation.probe.temperature == 1


def test_the_weight_falls_with_the_data_unless_it_is_constant():
    by_data, constant = (objective(data(300), jacobian_schedule=rule).schedule for rule in ("by-data", "constant"))
    assert (by_data(0.0), constant(0.0)) == (0.5, 1.0)
    fading = objective(data(300), jacobian_schedule="constant", jacobian_fades_from=0.5).schedule
    assert [fading(progress) for progress in (0.5, 0.75, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_laws_of_random_directions():
    assert objective(data(), probe_law="orthogonal", probes=2).differentiation.probe.law == "orthogonal"
    assert objective(data(), probe="random-inputs", probe_law="sphere").differentiation.probe.law == "sphere"


def test_rows_can_be_taken_in_chunks():
    assert objective(data(), probes=2, probe_chunk=1).differentiation.chunk_size == 1


def test_more_rows_than_outputs_are_refused():
    with pytest.raises(InputError, match=r"at most 3, all rows\. Got 4"):
        objective(data(), probe="sampled-rows", probes=4)
