"""The doctor is silent about sound modules."""

import pytest
import torch
from tests.jacobian.sound import SOUND
from torch import nn

from jacmatch.diagnostics import doctor
from jacmatch.models import CATALOG, build

NOTES = {"batch-norm-couples", "dropout", "differences-inaccurate", "rounding"}
"""The notes that a sound module may have."""


def is_sound(diagnosis):
    assert diagnosis.ok, str(diagnosis)
    assert diagnosis.engine == "reverse"
    assert diagnosis.engines["forward"] == "right", str(diagnosis)
    assert {finding.code for finding in diagnosis.findings} <= NOTES, str(diagnosis)


@pytest.mark.ci
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.ci)], ids=["train", "eval"])
@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name, training):
    make, shape = SOUND[name]
    diagnosis = doctor(make().train(training), torch.randn(shape))
    is_sound(diagnosis)
    codes = {finding.code for finding in diagnosis.findings}
    assert ("batch-norm-couples" in codes) == (training and "BatchNorm" in name)
    drops = "dropout" in name or name == "encoder layer"
    assert ("dropout" in codes) == (training and drops)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_false_alarm_in_other_types(dtype):
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    assert doctor(module, torch.randn(6, 5).to(dtype)).ok
    assert doctor(lambda x: x.tanh().cumsum(1), torch.randn(6, 5).to(dtype)).ok


DEEP = {"vgg9", "resnet32", "resnet56", "resnet110", "resnet32x4", "wrn-40-1", "wrn-40-2"}
"""More of the layers that the smaller ones of the same family have."""
LARGE = {*DEEP, "resnet8x4", "vit-tiny"}
"""Checked in one mode only, for time."""
QUICK = {"cnn3", "resnet8", "vgg4"}
"""One of each family."""


def _marks(name, training):
    return [pytest.mark.slow] if name in DEEP else [] if name in QUICK and training else [pytest.mark.ci]


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param(name, training, marks=_marks(name, training))
        for name in CATALOG
        for training in (True, False)
        if training or name not in LARGE
    ],
)
@pytest.mark.ci
def test_no_false_alarm_for_our_models(as_users_run, name, training):
    # without the type checks of the suite, for time
    torch.manual_seed(0)
    side = 17 if name == "vgg9" else 8
    model = build(name, 4, (3, side, side), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)).train(training)
    diagnosis = doctor(model, torch.rand(2 if name in LARGE else 3, 3, side, side))
    is_sound(diagnosis)
    # BatchNorm over two values amplifies the rounding of float32 from layer to layer.
    assert training or "rounding" not in {finding.code for finding in diagnosis.findings}
