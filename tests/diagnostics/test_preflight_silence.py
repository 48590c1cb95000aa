"""The pre-flight check passes sound networks: all of the catalog, and families of timm and torchvision."""

import importlib.util
import time

import pytest
import torch
from tests.jacobian.sound import SOUND
from torch import nn

from jacmatch.diagnostics import preflight_check
from jacmatch.models import CATALOG, build
from jacmatch.objectives import Distillation, GradientShare
from jacmatch.training.data import Batch

TORCHVISION = (
    *("mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1", "mobilenet_v2", "regnet_x_400mf"),
    *("regnet_y_400mf", "resnet18", "densenet121", "efficientnet_b0", "vgg11_bn", "convnext_tiny"),
)
TIMM = (
    *("lcnet_050", "mobilenetv3_small_050", "tinynet_e", "resnet10t", "ghostnet_050", "semnasnet_075", "fbnetc_100"),
    *("mobilenetv4_conv_small_050", "efficientnet_lite0", "hardcorenas_a", "regnetz_005", "dla46_c", "convnext_atto"),
    *("convnextv2_atto", "edgenext_xx_small", "repvgg_a0", "mobileone_s0", "seresnet18", "resnetv2_18", "starnet_s1"),
)


def passes(student, shape, outputs, samples=8, sharp=True):
    """Check labels, outputs and Jacobians of a teacher, as `distill` uses them."""
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), outputs))
    batch = Batch(torch.rand(samples, *shape), torch.arange(samples) % outputs, torch.arange(samples), 0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    report = preflight_check(Distillation(student, teacher, output_loss="kl", jacobians=GradientShare(0.3)), batch)
    print(f"{report.seconds:6.1f} s, float64 {report.exact}, errors {report.errors}")
    assert report.findings == ()
    if sharp:
        assert all(error is not None and error < 0.02 for error in report.errors.values())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name


FEW = ("conv and BatchNorm", "dropout", "lstm")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow])
        for name in SOUND
        if name not in ("frozen", "float32 inside")
    ],
)
def test_sound_constructions_pass(as_users_run, name):
    torch.manual_seed(0)
    make, shape = SOUND[name]
    student = make()
    passes(student, torch.Size(shape[1:]), student(torch.randn(shape)).shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_our_models_pass(as_users_run, name):
    torch.manual_seed(0)
    side = 32 if name == "vgg9" else 8
    passes(
        build(name, 4, (3, side, side), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), torch.Size((3, side, side)), 4, samples=4
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM)])
def test_models_of_others_pass(as_users_run, name):
    family = name.partition(":")[0]
    if importlib.util.find_spec(family) is None:
        pytest.skip(f"{family} is not installed")
    torch.manual_seed(0)
    passes(
        build(name, 4, (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        torch.Size((3, 32, 32)),
        4,
        samples=4,
        sharp=False,
    )


@pytest.mark.ci
def test_the_check_of_a_large_network_takes_seconds(as_users_run):
    """VGG-9 from VGG-9 on CIFAR's images: 2 s of processor time on an idle core, of which a busy one takes twice."""
    student, teacher = (build("vgg9", 10, (3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)) for _ in range(2))
    batch = Batch(torch.rand(64, 3, 32, 32), torch.arange(64) % 10, torch.arange(64), 0)
    objective = Distillation(student, teacher, jacobians=GradientShare(0.3))
    objective(batch.x[:2], batch.y[:2])  # what torch imports for its first derivative does not count
    start = time.process_time()
    report = preflight_check(objective, batch)
    assert time.process_time() - start < 5
    assert report.ok, str(report)
    assert report.exact
    assert max(report.errors.values()) < 1e-3
