"""Shifts of the input against their definitions, one pixel at a time, and the accuracy under them."""

import math

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jacobian import probes
from jacmatch.training import SHIFTS, evaluate, evaluate_under_shifts, evaluation, shifted

IDS = torch.tensor([4, 9, 2])


def images(dtype=torch.float64, count=3):
    return torch.rand(count, 2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def severity_of(name):
    return 0.4 if name == "salt-and-pepper" else 0.7


@pytest.mark.parametrize("name", SHIFTS)
def test_a_sample_is_shifted_by_what_it_is(name):
    """The same wherever it stands, the same for the same seed, and the input is left alone."""
    x = images()
    before = x.clone()
    whole = SHIFTS[name](x, severity_of(name), ids=IDS, seed=3)
    assert torch.equal(x, before)
    assert whole.shape == x.shape
    assert whole.dtype == x.dtype
    assert not torch.equal(whole, x)
    order = torch.tensor([2, 0])
    torch.testing.assert_close(SHIFTS[name](x[order], severity_of(name), ids=IDS[order], seed=3), whole[order])
    other = SHIFTS[name](x, severity_of(name), ids=IDS, seed=4)
    assert torch.equal(other, whole) == (name not in evaluation.RANDOM)


@pytest.mark.parametrize(
    ("name", "nothing"), [("gaussian-noise", 0.0), ("salt-and-pepper", 0.0), ("blur", 0.0), ("contrast", 1.0)]
)
def test_one_severity_changes_nothing(name, nothing):
    torch.testing.assert_close(SHIFTS[name](images(), nothing, ids=IDS), images())


def test_noise_is_that_of_the_numbers_times_its_scale():
    x, scale = images(), (0.5, 2.0)
    seed = 3 + evaluation._SEED
    draws = probes.directions("gaussian", seed=seed, ids=IDS, draw=0, count=1, shape=(2, 5, 6), dtype=x.dtype)[0]
    got = SHIFTS["gaussian-noise"](x, 0.3, ids=IDS, seed=3, scale=scale)
    for n in range(3):
        for c in range(2):
            torch.testing.assert_close(got[n, c], x[n, c] + 0.3 * scale[c] * draws[n, c])
    double = SHIFTS["gaussian-noise"](x, 0.6, ids=IDS, seed=3, scale=scale)
    torch.testing.assert_close(double - x, 2 * (got - x))


def test_noise_has_its_moments():
    """36,000 numbers in each channel: four standard errors of a mean are 2 % of σ, of a standard deviation 1.5 %."""
    x = torch.zeros(3000, 2, 3, 4)
    noise = SHIFTS["gaussian-noise"](x, 0.5, ids=torch.arange(3000), scale=(1.0, 3.0))
    for channel, sigma in ((0, 0.5), (1, 1.5)):
        assert abs(float(noise[:, channel].mean())) < 0.022 * sigma
        assert float(noise[:, channel].std()) == pytest.approx(sigma, rel=0.015)


def test_salt_and_pepper_changes_whole_pixels_to_black_or_white():
    """20,000 pixels: four standard errors of a share of 0.3 are 0.013, of one of 0.15 0.011."""
    x = torch.rand(500, 2, 5, 8) * 0.8 + 0.1
    got = SHIFTS["salt-and-pepper"](x, 0.3, ids=torch.arange(500))
    changed = got != x
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert set(got[changed].tolist()) == {0.0, 1.0}
    assert torch.equal(got[:, 0][changed[:, 0]], got[:, 1][changed[:, 1]])
    assert float(changed[:, 0].float().mean()) == pytest.approx(0.3, abs=0.013)
    for value in (0.0, 1.0):
        assert float((got[:, 0] == value).float().mean()) == pytest.approx(0.15, abs=0.011)


def test_more_salt_and_pepper_keeps_what_is_there():
    x = torch.full((50, 1, 5, 8), 0.5)
    few, many = (SHIFTS["salt-and-pepper"](x, p, ids=torch.arange(50)) for p in (0.2, 0.6))
    there = few != 0.5
    assert torch.equal(many[there], few[there])
    assert bool((many != 0.5).sum() > 2 * there.sum())


def test_of_a_vector_each_element_is_a_pixel():
    x = torch.full((200, 30), 0.5)
    got = SHIFTS["salt-and-pepper"](x, 0.4, ids=torch.arange(200))
    assert float((got != 0.5).float().mean()) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 2.5])
def test_blur_is_the_weighted_sum_of_its_neighbors(sigma):
    x = images()
    got = SHIFTS["blur"](x, sigma, ids=IDS)
    radius = math.ceil(3 * sigma)
    weights = {a: math.exp(-(a**2) / (2 * sigma**2)) for a in range(-radius, radius + 1)}
    total = sum(weights.values())
    for n, c, i, j in ((0, 0, 0, 0), (1, 1, 2, 3), (2, 0, 4, 5), (0, 1, 4, 0)):
        value = 0.0
        for a, across in weights.items():
            for b, down in weights.items():
                row, column = min(max(i + a, 0), 4), min(max(j + b, 0), 5)
                value += across * down / total**2 * float(x[n, c, row, column])
        assert float(got[n, c, i, j]) == pytest.approx(value, rel=1e-12)


def test_contrast_moves_each_channel_towards_its_mean():
    x = images()
    got = SHIFTS["contrast"](x, 0.3, ids=IDS)
    for n in range(3):
        for c in range(2):
            mean = sum(x[n, c].flatten().tolist()) / 30
            torch.testing.assert_close(got[n, c], mean + 0.3 * (x[n, c] - mean))


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gaussian-noise", -0.1, r"severity of the shift gaussian-noise must be at least 0\. Got -0\.1"),
        ("salt-and-pepper", 1.5, r"severity of the shift salt-and-pepper must be in \[0, 1\]\. Got 1\.5"),
        ("blur", math.nan, r"severity of the shift blur must be at least 0\. Got nan"),
        ("contrast", math.inf, r"severity of the shift contrast must be at least 0\. Got inf"),
    ],
)
def test_severities_out_of_range_are_refused(name, severity, message):
    with pytest.raises(InputError, match=message):
        SHIFTS[name](images(), severity, ids=IDS)


def test_a_wrong_scale_is_refused():
    with pytest.raises(InputError, match=r"one for each of the 2 channels\. Got 3 numbers"):
        SHIFTS["gaussian-noise"](images(), 0.1, ids=IDS, scale=(1.0, 2.0, 3.0))


def test_what_is_no_image_is_refused():
    for name in ("blur", "contrast"):
        with pytest.raises(InputError, match=rf"The shift {name} needs images .* Got inputs of shape \(6,\)"):
            SHIFTS[name](torch.rand(3, 6), 0.5, ids=IDS)


# Accuracy ---------------------------------------------------------------------------------------------------------


def split(count=30):
    x = torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Split(x, torch.arange(count) % 3)


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shifted_split_is_the_shift_of_its_inputs(name):
    whole = shifted(split(), name, severity_of(name), seed=2, batch_size=7)
    wanted = SHIFTS[name](split().inputs(), severity_of(name), ids=torch.arange(30), seed=2)
    torch.testing.assert_close(whole.inputs(), wanted)
    assert torch.equal(whole.y, split().y)


def test_accuracy_under_shifts_is_that_of_the_shifted_split():
    net, requested = network(), [("gaussian-noise", 0.5), ("contrast", 0.5), ("salt-and-pepper", 0.3)]
    result = evaluate_under_shifts(net, split(), requested, draws=3, seed=5, scale=2.0, device="cpu")
    assert list(result) == requested
    for name, severity in requested:
        seeds = [5] if name == "contrast" else [5, 6, 7]
        moved = [shifted(split(), name, severity, seed=seed, scale=2.0) for seed in seeds]
        assert result[name, severity] == [evaluate(net, each, device="cpu")["accuracy"] for each in moved]


def test_a_regression_has_rmse_under_shifts():
    x, net = torch.rand(20, 16), nn.Linear(16, 2)
    data = Split(x, torch.rand(20, 2))
    ((value,),) = evaluate_under_shifts(net, data, [("gaussian-noise", 0.1)], draws=1, device="cpu").values()
    moved = SHIFTS["gaussian-noise"](x, 0.1, ids=torch.arange(20))
    assert value == pytest.approx(float((net(moved) - data.y).square().mean().sqrt().detach()), rel=1e-5)


def test_unknown_shifts_and_no_draws_are_refused():
    with pytest.raises(InputError, match=r"A shift of `shifted` must be a known name\. Got 'blurr'\. Nearest: blur"):
        shifted(split(), "blurr", 1.0)
    with pytest.raises(InputError, match=r"`draws` of `evaluate_under_shifts` must be at least 1\. Got 0"):
        evaluate_under_shifts(network(), split(), [], draws=0, device="cpu")
