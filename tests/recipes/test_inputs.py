"""A run goes on with the data and the teacher that it was begun with."""

import numpy as np
import pytest
import torch

from jacmatch.datasets import from_arrays
from jacmatch.errors import InputError
from jacmatch.recipes.inputs import same_inputs
from jacmatch.runs import Run


def data(first=0.5):
    x, y = np.random.default_rng(0).random((12, 4), dtype=np.float32), np.arange(12) % 3
    x[0, 0] = first
    return from_arrays("mine", {"x_train": x, "y_train": y, "x_test": x, "y_test": y})


def test_other_data_and_another_teacher_are_named(tmp_path):
    torch.manual_seed(0)
    teacher = torch.nn.Linear(4, 3)
    same_inputs(Run.create(tmp_path / "run", "distill", {}, "0"), data(), teacher)
    run = Run.create(tmp_path / "run", "distill", {}, "0")
    same_inputs(run, data(), teacher)
    with pytest.raises(
        InputError, match=r"the data and the teacher .* Got others: data \('\w{64}' there, '\w{64}' here\)\."
    ):
        same_inputs(run, data(0.25), teacher)
    teacher.weight.data[0, 0] += 1e-6
    with pytest.raises(
        InputError, match=r"Got others: teacher \('torch\.nn\..*Linear \w{16}' there, .*Bring them back, or"
    ):
        same_inputs(run, data(), teacher)
