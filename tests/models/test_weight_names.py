"""Other names of the same layers: matched where there is one way, refused where there are more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jacmatch.models import ResNet, build, load_weights

from .other_weights import Net, prefixed, refused, saved, trained, written


# Names of other collections for the ResNets of He et al. on CIFAR: HobbitLong/RepDistiller,
# chenyaofo/pytorch-cifar-models and torchvision write `downsample` and `fc`.
class Block(nn.Module):
    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.downsample = None
        if stride > 1 or fan_in != fan_out:
            self.downsample = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Elsewhere(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (fan_in, fan_out) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            parts = [Block(fan_in if i == 0 else fan_out, fan_out, 1 + (i == 0 and stage > 1)) for i in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*parts))
        self.fc = nn.Linear(64, 7)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


IMAGES = torch.rand(2, 3, 8, 8)
SCALING = {"mean": (0.0,), "std": (1.0,)}


@pytest.mark.parametrize("pickled", [False, True])
def test_other_names_of_the_same_resnet_are_matched_by_structure(tmp_path, pickled):
    net, ours = trained(Elsewhere), ResNet(14, 7, (3, 8, 8))
    content = {"epoch": 240, "model": prefixed("module.", net.state_dict())}
    path = saved(tmp_path, content) if pickled else written(tmp_path, net.state_dict())
    with pytest.warns(UserWarning, match=r"matched by structure: layer2\.0\.downsample\.0 → layer2\.0\.shortcut\.0, "):
        load_weights(ours, path, allow_pickle=pickled, **SCALING)
    torch.testing.assert_close(ours.eval()(IMAGES), net(IMAGES))


def test_a_resnet_without_projections_and_one_of_other_depth_are_refused(tmp_path):
    state = {k: v for k, v in trained(Elsewhere).state_dict().items() if "downsample" not in k}
    refused(written(tmp_path, state), "must contain the weights of this ResNet", ResNet(14, 7, (3, 8, 8)), **SCALING)
    deep = trained(lambda: Elsewhere(3)).state_dict()
    refused(written(tmp_path, deep), "must contain the weights of this ResNet", ResNet(14, 7, (3, 8, 8)), **SCALING)


# RepDistiller's Wide ResNets: block1.layer.0.convShortcut
def test_names_of_other_depth_are_matched_by_structure(tmp_path):
    net, ours = build("wrn-16-2", 7, (3, 8, 8)).eval(), build("wrn-16-2", 7, (3, 8, 8))
    renamed = {
        name.replace("layer", "block")
        .replace("shortcut", "convShortcut")
        .replace("linear", "fc")
        .replace(".", ".layer.", 1)
        if name.startswith("layer")
        else name.replace("linear", "fc"): value
        for name, value in net.state_dict().items()
        if name not in ("mean", "std")
    }
    assert "block2.layer.0.convShortcut.weight" in renamed
    with pytest.warns(UserWarning, match="matched by structure"):
        load_weights(ours, written(tmp_path, renamed), **SCALING)
    assert torch.equal(ours.eval()(IMAGES), net(IMAGES))


def layers(*names, features=4):
    return nn.ModuleDict({name: nn.Linear(features, features) for name in names})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")),
        (("conv1", "extra"), ("conv1", "conv2")),
        (("up", "down1"), ("down", "up1")),
    ],
)
def test_layers_that_may_be_either_are_refused(tmp_path, theirs, ours):
    path = written(tmp_path, layers(*theirs).state_dict())
    message = refused(path, "must contain the weights of this ModuleDict", layers(*ours))
    assert "leave open which is which: name the model of the library that wrote them" in message


def test_numbers_that_begin_elsewhere_keep_their_order(tmp_path):
    net, other = layers("fc0", "fc1", "fc2"), layers("fc1", "fc2", "fc3")
    with pytest.warns(UserWarning, match=r"fc0 → fc1, fc1 → fc2, fc2 → fc3"):
        load_weights(other, written(tmp_path, net.state_dict()))
    assert all(torch.equal(net[f"fc{i}"].weight, other[f"fc{i + 1}"].weight) for i in range(3))


def test_stages_of_other_lengths_are_refused(tmp_path):
    def staged(*lengths):
        return nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(length)) for length in lengths)

    def network(name, *lengths):
        return nn.ModuleDict({name: staged(*lengths), "head": nn.Linear(4, 2)})

    path = written(tmp_path, network("stage", 1, 3).state_dict())
    refused(path, "leave open which is which", network("block", 3, 1))
    with pytest.warns(UserWarning, match=r"matched by structure: stage\.0\.0 → block\.0\.0, stage\.1\.0 → block\.1\.0"):
        load_weights(network("block", 1, 3), path)


def test_a_head_of_other_classes_says_how_many(tmp_path):
    net = trained(lambda: Net(1000))
    refused(written(tmp_path, prefixed("module.", net.state_dict())), "have 1000 outputs and the model 3. To fine-tune")
