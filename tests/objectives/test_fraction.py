"""Derivatives of a part of the batch: the terms, and how often each network runs."""

import copy

import pytest
import torch
from torch import nn

from jacmatch.jacobian import EveryRow, RandomInputs, RandomOutputs, unverified
from jacmatch.objectives import AtMixedPairs, Distillation

from .cases import OUTPUTS, batch, student, teacher


def with_batch_norm():
    torch.manual_seed(5)
    layers = [nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, OUTPUTS)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("probe", [EveryRow(), RandomOutputs(2), RandomInputs(2)])
@pytest.mark.parametrize(("fraction", "count"), [(0.25, 2), (0.3, 3), (0.01, 1), (1.0, 8)])
def test_derivatives_are_those_of_the_first_samples_and_values_those_of_all(probe, fraction, count):
    network, given = student(), batch(8)
    settings = {"labels": 0.3, "outputs": 0.2, "jacobians": 0.5, "probe": probe, "point": AtMixedPairs()}
    terms = Distillation(network, teacher(), fraction=fraction, **settings)(**given)
    whole = Distillation(network, teacher(), **settings)(**given)
    first = Distillation(network, teacher(), **settings)(**{name: value[:count] for name, value in given.items()})
    for name in ("labels", "outputs"):
        torch.testing.assert_close(terms[name], whole[name])
    torch.testing.assert_close(terms["jacobians"], first["jacobians"])
    torch.testing.assert_close(terms.student_outputs, whole.student_outputs)
    torch.testing.assert_close(terms.teacher_outputs, whole.teacher_outputs)


def test_each_sample_runs_once():
    network, seen = student(), []
    network.register_forward_pre_hook(lambda layer, given: seen.append(len(given[0])))
    with unverified():  # the check of an engine before its first use has passes of its own
        Distillation(network, teacher(), fraction=0.5)(**batch(8))
    assert seen == [4, 4]


def test_statistics_of_a_batch_are_those_of_all_its_samples():
    network, given = with_batch_norm(), batch(8)
    plain = copy.deepcopy(network)
    terms = Distillation(network, teacher(), fraction=0.5)(**given)
    torch.testing.assert_close(terms.student_outputs, plain(given["x"]))
    for name, buffer in plain.named_buffers():  # counted once
        torch.testing.assert_close(network.get_buffer(name), buffer)
    assert terms["jacobians"] > 0


def test_a_step_without_derivatives_has_no_fraction():
    objective = Distillation(student(), teacher(), fraction=0.5, every=2)
    assert "jacobians" in objective(**batch(8))
    assert "jacobians" not in objective(**batch(8))


@pytest.mark.parametrize("engine", ["forward", "reverse", "differences"])
def test_every_engine_gives_the_same_term(engine):
    given = batch(8)
    expected = Distillation(student(), teacher(), probe=RandomInputs(2))(**given)["jacobians"]
    result = Distillation(student(), teacher(), probe=RandomInputs(2), engine=engine)(**given)["jacobians"]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
