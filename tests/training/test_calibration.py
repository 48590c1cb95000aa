"""The expected calibration error against a loop from its definition."""

import math

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.training import calibration

from . import cases, reference


def _logits(scale, count=200, classes=4):
    generator = torch.Generator().manual_seed(5)
    x = scale * torch.randn(count, classes, generator=generator)
    return Split(x, torch.randint(0, classes, (count,), generator=generator))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_follows_its_definition(scale, bins):
    split = _logits(scale)
    expected = reference.calibration(split.x, split.y, bins)
    assert expected > 0.03
    assert calibration(nn.Identity(), split, bins=bins, device="cpu") == pytest.approx(expected, rel=1e-12)


def test_batches_do_not_matter():
    split = _logits(2.0)
    whole = calibration(nn.Identity(), split, device="cpu")
    assert calibration(nn.Identity(), split, batch_size=7, device="cpu") == pytest.approx(whole, rel=1e-12)


def test_samples_that_are_certain_share_a_bin_with_those_that_are_nearly_so():
    """p = 1 wrong and p = 0.99 right: one bin with mean 0.995 of which half is right."""
    split = Split(torch.tensor([[800.0, 0.0], [math.log(99), 0.0]]), torch.tensor([1, 0]))
    assert calibration(nn.Identity(), split, device="cpu") == pytest.approx(0.495, rel=1e-6)


def test_a_network_that_knows_what_it_knows_has_no_error():
    """Three of four are right where it says 0.75, and it is one bin that decides."""
    x = torch.tensor([math.log(3), 0.0]).expand(8, 2).clone()
    assert calibration(nn.Identity(), Split(x, torch.arange(8) % 4 // 3), device="cpu") == pytest.approx(0, abs=1e-7)


def test_errors_of_both_signs_cancel_within_a_bin_only():
    x = torch.tensor([[math.log(3), 0.0], [math.log(9), 0.0]])
    split = Split(x, torch.tensor([0, 1]))  # 0.75 and right, 0.9 and wrong
    assert calibration(nn.Identity(), split, bins=1, device="cpu") == pytest.approx(abs(0.5 - 0.825), rel=1e-6)
    assert calibration(nn.Identity(), split, bins=15, device="cpu") == pytest.approx((0.25 + 0.9) / 2, rel=1e-6)


def test_a_network_in_evaluation_mode_and_then_as_before():
    network, split = cases.network().train(), cases.images(17)
    got = calibration(network, split, batch_size=5, device="cpu")
    assert network.training
    with torch.no_grad():
        outputs = network.eval()(split.inputs(torch.arange(17)))
    assert got == pytest.approx(reference.calibration(outputs, split.y, 15), rel=1e-6)


def test_calibration_refuses_what_has_none():
    split, empty = _logits(1.0, 3), Split(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match=r"`bins` of `calibration` must be at least 1\. Got 0"):
        calibration(nn.Identity(), split, bins=0, device="cpu")
    with pytest.raises(InputError, match=r"must have samples with classes\. Got an empty split"):
        calibration(nn.Identity(), empty, device="cpu")
    with pytest.raises(InputError, match=r"must have samples with classes\. Got the targets of a regression"):
        calibration(nn.Identity(), cases.points(4), device="cpu")
    with pytest.raises(InputError, match=r"must have finite outputs\. Got nan or inf"):
        calibration(nn.Identity(), Split(split.x.log(), split.y), device="cpu")
