"""Processes whose gradients differ are found after the first backward pass."""

from types import SimpleNamespace

import pytest
import torch

from jacmatch.errors import UnsupportedError
from jacmatch.training import Training
from jacmatch.training.checks import check_after_backward

from . import cases


def _one_of_two(rank, file, apart, messages):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    objective = cases.Plain()
    objective.student.weight.grad = torch.full_like(objective.student.weight, 1.0 + apart * rank)
    state = SimpleNamespace(settings=Training(doctor=True), step=0, objective=objective)
    try:
        check_after_backward(state)
    except UnsupportedError as error:
        messages.put(str(error))
    else:
        messages.put("agreed")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("apart", "says"), [(0.0, "agreed"), (0.01, "[ranks-differ]")])
def test_processes_that_differ_are_reported(tmp_path, apart, says):
    context = torch.multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    torch.multiprocessing.spawn(_one_of_two, (tmp_path / "store", apart, messages), nprocs=2)
    assert all(says in messages.get() for _ in range(2))
