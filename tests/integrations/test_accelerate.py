"""accelerate needs no adapter: what it prepares is the objective, or the unit around it for several processes."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.processes import both
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset

from jacmatch import GradientShare
from jacmatch.integrations import TrainingUnit

from .cases import X, Y, difference, networks, objective, plain_loop, steps

accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings("default"),  # of frameworks; errors are still errors
    pytest.mark.usefixtures("all_as_users_run"),
]

SHARES = {"jacobians": GradientShare(0.3), "measure_every": 2}


def train(unit, samples=24, size=4, accumulate=1, epochs=1, resume=None, save=None, **settings):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(X[:samples], Y[:samples]), batch_size=size, shuffle=False)
    unit, optimizer, loader = accelerator.prepare(unit, optimizer, loader)
    if resume is not None:
        accelerator.load_state(resume)
    unit.train()
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(unit):
                accelerator.backward(unit(x, y)["loss"])
                optimizer.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return unit


@pytest.fixture(autouse=True)
def _new_state():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("wrap", [lambda objective: objective, TrainingUnit])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_trains_as_a_plain_loop(wrap, accumulate):
    student, teacher = networks()
    plain = copy.deepcopy(student)
    train(wrap(objective(student, teacher, **SHARES)), accumulate=accumulate)
    plain_loop(objective(plain, teacher, **SHARES), steps(24, 4, accumulate))
    assert difference(student, plain) < 1e-6


def test_bf16_is_autocast_around_the_objective():
    student, teacher = networks()
    plain = copy.deepcopy(student)
    train(objective(student, teacher), mixed_precision="bf16")
    plain_loop(objective(plain, teacher), steps(24, 4), cast=torch.bfloat16)
    assert difference(student, plain) < 1e-6


def test_activation_checkpointing_changes_nothing():
    student, teacher = networks()
    plain, student.checkpointed = copy.deepcopy(student), True
    train(objective(student, teacher))
    plain_loop(objective(plain, teacher), steps(24, 4))
    assert difference(student, plain) < 1e-6


def test_compiled_steps_train_as_eager_ones():
    """In a process without the type checks of this suite, which a compiler cannot follow."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.integrations.compiled", "accelerate"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fallback"] is None
    assert result["steps"] > 0
    assert result["difference"] < 1e-6


def test_a_saved_state_goes_on_as_a_run_without_a_break(tmp_path):
    student, teacher = networks()
    train(objective(student, teacher, **SHARES), epochs=2)
    first, _ = networks()
    train(objective(first, teacher, **SHARES), save=tmp_path)
    other, _ = networks()
    resumed = train(objective(other, teacher, **SHARES), resume=tmp_path)
    assert difference(student, other) == 0
    assert resumed.calls == 12


def train_in_two(accumulate):
    rank = str(distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    student, teacher = networks()
    unit = train(TrainingUnit(objective(student, teacher, **SHARES)), size=3, accumulate=accumulate)
    return student, type(unit).__name__


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one_with_all_samples(accumulate):
    student, teacher = networks()
    order = torch.arange(24).view(-1, 2, 3).transpose(1, 2).flatten()  # sample i of process r is number 2 i + r
    plain_loop(objective(student, teacher, **SHARES), steps(24, 6, accumulate, X[order], Y[order]))
    for trained, kind in both(train_in_two, accumulate):
        assert kind == "DistributedDataParallel"
        assert difference(trained, student) < 1e-6
