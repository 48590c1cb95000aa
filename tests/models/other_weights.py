"""Files of weights as others write them, for the tests of what is read from them."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from jacmatch.errors import InputError
from jacmatch.models import load_weights


class Net(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, outputs)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))


def trained(make=Net):
    """A network whose statistics are not those it begins with, in evaluation mode."""
    torch.manual_seed(0)
    net = make()
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return net.eval()


X = torch.rand(3, 1, 4, 4)


def written(folder, tensors, name="w.safetensors"):
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def saved(folder, content, name="w.pth", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def loads(net, path, other=None, x=X, **options):
    """The file loads, and gives the outputs of the network that it came from."""
    other = Net() if other is None else other
    load_weights(other, path, allow_pickle=True, **options)
    assert torch.equal(other.eval()(x), net(x))


def refused(path, match, other=None, **options):
    """The file is refused with one line, and the module keeps its weights."""
    other = Net() if other is None else other
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(InputError, match=match) as caught:
        load_weights(other, path, **{"allow_pickle": True, **options})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    return str(caught.value)


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}
