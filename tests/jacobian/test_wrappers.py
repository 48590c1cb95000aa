"""A wrapper for several processes around the student is results; around the objective it is right."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from jacmatch.errors import UnsupportedError
from jacmatch.jacobian.modules import check_wrapping, wraps_apart
from jacmatch.objectives import Distillation


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")
def test_where_the_wrapper_stands(group, monkeypatch):
    student, x = nn.Linear(3, 2), torch.randn(4, 3)
    objective = Distillation(student, nn.Linear(3, 2), labels=0, jacobians=0.3)
    monkeypatch.setattr(distributed, "get_world_size", lambda *_: 2)
    check_wrapping(objective, student, derived=True)
    monkeypatch.undo()
    apart = DistributedDataParallel(student)
    assert wraps_apart(objective, student)
    monkeypatch.setattr(distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(UnsupportedError, match=r"must not be wrapped in DistributedDataParallel.*Wrap the objective"):
        objective(x)
    monkeypatch.undo()
    whole = DistributedDataParallel(objective)
    del apart
    assert not wraps_apart(objective, student)
    whole(x)["loss"].backward()
