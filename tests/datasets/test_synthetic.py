"""The known function: Jacobian against differences, exact files, parameters."""

import math

import pytest
import torch

from jacmatch import datasets
from jacmatch.datasets import files, synthetic
from jacmatch.errors import InputError


def slow_value(x, k, inputs):
    """f_k at one point, from the formula, k and i from 1."""
    scale = math.sqrt(2 / inputs)
    wave = sum(scale * math.cos(k * i) * x[i - 1] for i in range(1, inputs + 1))
    bowl = sum(scale * math.sin((k + 1) * i) * x[i - 1] for i in range(1, inputs + 1))
    return math.sin(2 * wave) + bowl**2 / 2


def test_values_and_jacobian_follow_the_formula():
    x = torch.rand(3, 5, dtype=torch.float64) * 2 - 1
    step = 1e-5
    values, jacobian = synthetic.values(x, 4), synthetic.jacobian(x, 4)
    for row in range(3):
        for k in range(4):
            assert float(values[row, k]) == pytest.approx(slow_value(x[row].tolist(), k + 1, 5), rel=1e-12)
            for i in range(5):
                plus, minus = x[row].tolist(), x[row].tolist()
                plus[i] += step
                minus[i] -= step
                difference = (slow_value(plus, k + 1, 5) - slow_value(minus, k + 1, 5)) / (2 * step)
                assert float(jacobian[row, k, i]) == pytest.approx(difference, rel=1e-6, abs=1e-8)


def test_jacobian_is_what_autograd_gives_and_its_rows_are_independent():
    x = torch.rand(1, 6, dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda z: synthetic.values(z[None], 3)[0], x[0])
    torch.testing.assert_close(synthetic.jacobian(x, 3)[0], rows, rtol=1e-12, atol=1e-12)
    assert int(torch.linalg.matrix_rank(rows)) == 3


def test_load_gives_exact_jacobians_of_both_parts():
    data = datasets.load("synthetic:D=3,K=2,N=20,T=7", seed=4)
    assert (data.name, data.classes, data.outputs, data.shape) == ("synthetic:D=3,K=2,N=20,T=7", None, 2, (3,))
    for split, rows in ((data.train, 20), (data.test, 7)):
        assert len(split) == rows
        assert float(split.x.abs().max()) <= 1
        torch.testing.assert_close(split.y, synthetic.values(split.x, 2), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(split.jacobians, synthetic.jacobian(split.x, 2), rtol=1e-5, atol=1e-6)


def test_points_depend_on_the_seed_and_the_part_but_the_function_does_not():
    first, again, other = (datasets.load("synthetic:N=10,T=10", seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not torch.equal(first.train.x, first.test.x)


def test_points_fill_the_cube():
    x = datasets.load("synthetic:D=2,N=4000").train.x
    # The mean of 8,000 uniform numbers has deviation 0.0065, that of the squares 0.0034.
    assert abs(float(x.mean())) < 0.04
    assert abs(float(x.square().mean()) - 1 / 3) < 0.02


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("D=0", r"D of `--data synthetic` must be an integer, at least 1\. Got '0'"),
        ("N=-5", "N of `--data synthetic` must be an integer.*Got '-5'"),
        ("K=2.5", "Got '2.5'"),
        ("K", r"Got ''\. Write for example synthetic:K=3"),
        ("D=" + "9" * 5000, "D of `--data synthetic` must be an integer"),
        ("d=3", r"Each number of `--data synthetic` must be a known name\. Got 'd'"),
        ("D=3,D=4", "D of `--data synthetic` must be given once"),
        ("D=3,", r"must be a known name\. Got ''"),
        (
            "D=100000,N=10000000",
            r"The Jacobians of `--data synthetic` must fit into memory\. Got .* GiB on a machine with",
        ),
    ],
)
def test_bad_parameters_are_refused(argument, message, monkeypatch):
    monkeypatch.setattr(files, "_physical_memory", lambda: 2**34)
    with pytest.raises(InputError, match=message):
        datasets.load(f"synthetic:{argument}")
