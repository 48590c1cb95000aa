"""A pretrained teacher that is made one of the target: probe, last block, features in a small basis."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jobs import adaptation
from jacmatch.jobs.networks import Description
from jacmatch.jobs.teachers import Pretrained
from jacmatch.models import Resized, build
from jacmatch.teachers import MemoizedTeacher, ModuleTeacher, Question
from jacmatch.training import Training

SHAPE = (1, 8, 8)


def pretrained(spec="cnn3", outputs=4):
    torch.manual_seed(0)
    network = build(spec, outputs=outputs, shape=SHAPE, mean=(0.0,), std=(1.0,)).eval()
    return Pretrained(network, Description(spec, outputs, SHAPE, (0.0,), (1.0,)), SHAPE)


def split(classes, each=6):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(classes).repeat(each)
    x = torch.rand(len(y), *SHAPE, generator=generator)
    x[:, 0, 0] += y[:, None] / 3
    return Split(x, y)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_probe_is_a_logistic_regression_on_the_features(classes, monkeypatch):
    monkeypatch.setattr(adaptation, "PENALTIES", (0.1,))
    teacher, train = pretrained(), split(classes)
    network = adaptation.probed(teacher, train, classes, seed=0)
    with torch.no_grad():
        z = teacher.network.features(train.x).mean((2, 3)).double()
        rows = ((z - z.mean(0)) / z.std(0).clamp_min(1e-6)).numpy()
        model = LogisticRegression(C=0.1, max_iter=1000).fit(rows, train.y.numpy())
        probabilities = network(train.x).softmax(1).double()
    torch.testing.assert_close(probabilities, torch.from_numpy(model.predict_proba(rows)), atol=1e-4, rtol=1e-3)
    before, after = teacher.network.state_dict(), network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("classifier"))


def test_a_class_without_an_image():
    with pytest.raises(InputError, match=r"labeled images of the target must cover every class\. Got a class without"):
        adaptation.probed(pretrained(), split(3), 4, seed=0)


def test_one_image_for_each_class_is_enough():
    network = adaptation.probed(pretrained(), split(3, each=1), 3, seed=0)
    assert network(split(3).x).shape == (18, 3)


def test_the_head_and_the_layer_before_it():
    network = pretrained().network
    head, layer = adaptation.head_of(network, split(2))
    assert head is network.classifier
    assert layer == "features"
    resized = Resized(build("resnet8", outputs=3, shape=(1, 12, 12)).eval(), SHAPE, 12)
    head, layer = adaptation.head_of(resized, split(2))
    assert head.out_features == 3
    assert layer.startswith("network.")
    with pytest.raises(InputError, match=r"must end in a linear layer to be adapted"):
        adaptation.head_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU()), split(2))


def test_the_last_block_has_at_most_half_of_the_parameters():
    network = nn.Sequential(
        nn.Linear(64, 2), nn.Sequential(nn.Linear(2, 30), nn.Linear(30, 30), nn.Linear(30, 4)), nn.Linear(4, 2)
    )
    assert adaptation.last_block(network, network[2]) is network[1][2]
    small = nn.Sequential(nn.Linear(64, 20), nn.Sequential(nn.Linear(20, 3)), nn.Linear(3, 2))
    assert adaptation.last_block(small, small[2]) is small[1]


def test_fine_tuning_moves_the_last_block_alone():
    train = split(3)
    network = adaptation.probed(pretrained(), train, 3, seed=0)
    before = {name: value.clone() for name, value in network.named_parameters()}
    adaptation.finetuned(network, train, Training(steps=2, lr=0.1, doctor=False), seed=0, device="cpu")
    moved = {name for name, value in network.named_parameters() if not torch.equal(before[name], value)}
    assert "classifier.weight" in moved
    head, _ = adaptation.head_of(network, train)
    block = {id(p) for p in adaptation.last_block(network, head).parameters()} | {id(p) for p in head.parameters()}
    assert moved <= {name for name, value in network.named_parameters() if id(value) in block}
    assert not any(value.requires_grad for value in network.parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_statistics_of_blocks_that_are_not_trained_do_not_move(whole):
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 3),
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    adaptation.finetuned(network, split(3), Training(steps=2, lr=0.1, doctor=False), seed=0, device="cpu", whole=whole)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(before[name], value)}
    assert {"1.1.running_mean", "1.1.weight"} <= moved
    assert any(name.startswith("0.") for name in moved) == whole
    network.train()
    assert all(module.training for module in network.modules())


def test_features_in_the_basis_of_their_principal_components():
    teacher, images = pretrained(), split(3)
    network = adaptation.basis_of(teacher, images, None, 2, whiten=True)
    values = network(images.x)
    torch.testing.assert_close(torch.cov(values.mT), torch.eye(2), atol=1e-4, rtol=0)
    with torch.no_grad():
        z = teacher.network.features(images.x).mean((2, 3))
        z = z - z.mean(0)
        fitted = values @ torch.linalg.lstsq(values, z).solution
        _, s, _ = torch.linalg.svd(z)
    assert float((z - fitted).square().sum()) == pytest.approx(float(s[2:].square().sum()), rel=1e-3)
    named = adaptation.basis_of(teacher, images, "features.conv1", 2, whiten=False)
    assert named.readout.layer == "features.conv1"
    with pytest.raises(InputError, match=r"The layer of a readout must be a known name\. Got 'features\.conv9'"):
        adaptation.basis_of(teacher, images, "features.conv9", 2, whiten=False)


def test_teachers_that_share_a_memory_query_the_network_once():
    teacher, images = pretrained(), split(3)
    memory = MemoizedTeacher(ModuleTeacher(teacher.network), draws=True)
    basis = adaptation.basis_of(teacher, images, None, 2, whiten=False)
    probe = adaptation.probed(teacher, images, 3, seed=0)
    teachers = {
        "own": (teacher.network, adaptation.HeadTeacher.of_last_layer(teacher.network, memory, images)),
        "probe": (probe, adaptation.HeadTeacher.of_last_layer(probe, memory, images)),
        "features": (basis, adaptation.HeadTeacher(basis, memory, "features", basis.readout)),
    }
    for draw in (0, 1):
        x, ids = images.x + draw, torch.arange(len(images))
        for network, made in teachers.values():
            answer = made.answer(x, Question(ids=ids, draw=draw, random=True))
            torch.testing.assert_close(answer.outputs, network(x).detach(), atol=1e-5, rtol=1e-4)
    assert memory.queried <= 3 * len(images)  # one of them is the comparison of a memory
    for network, made in teachers.values():
        v = torch.randn(1, *images.x.shape)
        products = made.answer(images.x, Question(tangents=v)).products
        expected = ModuleTeacher(network).answer(images.x, Question(tangents=v)).products
        torch.testing.assert_close(products, expected)


def test_a_teacher_without_such_a_layer_has_a_memory_of_its_own():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU())
    memory = MemoizedTeacher(ModuleTeacher(network))
    assert isinstance(adaptation.HeadTeacher.of_last_layer(network, memory, split(3)), MemoizedTeacher)
