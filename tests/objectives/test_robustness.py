"""The penalty without a teacher: unbiased, reproducible, and with the right gradient."""

import math

import pytest
import torch
from torch import nn

from jacmatch.errors import InputError
from jacmatch.objectives import jacobian_norm_penalty

from .cases import OUTPUTS, along, batch, direction_of, directional_difference, perceptron, student


def half_squared_norms(network, x):
    """½‖J‖² of each sample."""
    rows = [torch.autograd.functional.jacobian(lambda z: network(z[None])[0], one) for one in x]
    return torch.stack([0.5 * j.square().sum() for j in rows])


@pytest.mark.parametrize("probes", [1, 3, 6])
@pytest.mark.parametrize("outputs", [2, OUTPUTS])
def test_it_is_unbiased(probes, outputs):
    """3000 directions for each sample, within four standard errors; the variance is that of the law of the sphere."""
    network, x = perceptron(5, seed=1, outputs=outputs), batch()["x"]
    for sample in x:
        ids = torch.arange(3000)
        y, mean = jacobian_norm_penalty(network, sample.expand(3000, 2, 3), probes=probes, seed=0, ids=ids)
        exact = half_squared_norms(network, sample[None])[0]
        j = torch.autograd.functional.jacobian(lambda z: network(z[None])[0], sample).flatten(1)
        a = j @ j.T
        k = outputs
        variance = float(k / (2 * (k + 2)) * (a.square().sum() - a.trace() ** 2 / k)) / probes
        assert abs(float(mean.detach() - exact)) < 4 * math.sqrt(variance / 3000)
        torch.testing.assert_close(y[0], network(sample[None])[0])


def test_outputs_without_a_dimension_of_their_own():
    x = batch()["x"]
    y, penalty = jacobian_norm_penalty(lambda x: x.square().flatten(1).sum(1), x)
    assert y.shape == (len(x),)
    torch.testing.assert_close(penalty, 2 * x.square().flatten(1).sum(1).mean())


def test_it_is_exact_with_one_output():
    network, x = perceptron(5, seed=1, outputs=1), batch()["x"]
    y, penalty = jacobian_norm_penalty(network, x)
    torch.testing.assert_close(penalty, half_squared_norms(network, x).mean())
    torch.testing.assert_close(y, network(x))


@pytest.mark.parametrize("probes", [1, 3])
def test_its_gradient_equals_differences(probes):
    network, x = student(), batch()["x"]
    parameters = list(network.parameters())
    direction = direction_of(parameters)

    def penalty():
        return jacobian_norm_penalty(network, x, probes=probes, seed=5)[1]

    whole = along(penalty(), parameters, direction)
    assert whole == pytest.approx(directional_difference(penalty, parameters, direction), rel=1e-6)
    assert abs(whole) > 1e-3


def test_it_goes_with_a_loss():
    network, given = student(), batch()
    y, penalty = jacobian_norm_penalty(network, given["x"])
    (nn.functional.cross_entropy(y, given["y"]) + 0.01 * penalty).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_same_seed_gives_the_same_and_none_a_new_one():
    network, x = student(), batch()["x"]

    def penalty(**settings):
        return float(jacobian_norm_penalty(network, x, **settings)[1].detach())

    assert penalty(seed=3) == penalty(seed=3) != penalty(seed=4)
    assert penalty() != penalty()
    torch.manual_seed(8)
    first = [penalty() for _ in range(3)]
    torch.manual_seed(8)
    assert [penalty() for _ in range(3)] == first


def test_a_sample_gets_the_same_wherever_it_stands():
    network, given = student(), batch(count=5)
    whole = jacobian_norm_penalty(network, given["x"], seed=1, ids=given["ids"])[1]
    single = [jacobian_norm_penalty(network, given["x"][[n]], seed=1, ids=given["ids"][[n]])[1] for n in range(5)]
    torch.testing.assert_close(torch.stack(single).mean(), whole)


def test_it_has_the_type_of_the_network_or_float32():
    x = batch()["x"]
    assert jacobian_norm_penalty(student(), x)[1].dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        y, penalty = jacobian_norm_penalty(student().to(dtype), x.to(dtype), seed=0)
        assert y.dtype == dtype
        assert penalty.dtype == torch.float32


@pytest.mark.parametrize("probes", [0, -1])
def test_no_direction_is_refused(probes):
    with pytest.raises(InputError, match=rf"`probes` of `jacobian_norm_penalty` must be at least 1\. Got {probes}"):
        jacobian_norm_penalty(student(), batch()["x"], probes=probes)
