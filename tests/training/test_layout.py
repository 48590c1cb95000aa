import pytest
import torch
from torch import nn

from jacmatch.training import Training, fit
from jacmatch.training.state import channels_last

from . import cases

SETTINGS = {"steps": 12, "batch_size": 16, "lr": 0.01, "optimizer": "sgd"}


def wide(seed):
    """With a convolution of several channels: of one, both layouts are the same."""
    torch.manual_seed(seed)
    return nn.Sequential(
        cases.network(seed)[0], nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(216, 3)
    )


class Seen(nn.Module):
    """Notes how the weights of a layer lie while it runs."""

    def __init__(self, network):
        super().__init__()
        self.network, self.layouts = network, set()

    def forward(self, x):
        self.layouts.add(self.network[3].weight.is_contiguous(memory_format=torch.channels_last))
        return self.network(x)


@pytest.mark.ci
def test_channels_last_is_the_same_training_in_another_layout():
    trained = {}
    for layout in (False, True):
        objective = cases.distillation()
        objective.student = Seen(wide(1))
        fit(objective, cases.images(), Training(channels_last=layout, **SETTINGS), seed=0)
        assert objective.student.layouts == {layout}
        trained[layout] = objective.student.network
    assert trained[True][3].weight.is_contiguous()
    moved = (trained[False][3].weight - wide(1)[3].weight).norm()
    assert (trained[True][3].weight - trained[False][3].weight).norm() < 1e-4 * moved


def test_the_whole_network_is_laid_out():
    network = channels_last(wide(0))
    assert network[3].weight.stride() == (36, 1, 12, 4)
