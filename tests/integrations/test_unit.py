"""The unit that frameworks wrap: the objective as it is in one process, and its parts of a batch in several."""

import subprocess
import sys

import pytest
import torch
from tests.training.processes import both
from torch.nn.parallel import DistributedDataParallel

from jacmatch import Distillation, EveryRow, GradientShare, InputError, UnsupportedError, integrations
from jacmatch.integrations import TrainingUnit, require

from .cases import X, Y, difference, networks, objective, plain_loop, steps


def test_in_one_process_it_returns_what_the_objective_does():
    student, teacher = networks()
    torch.manual_seed(0)
    terms = objective(student, teacher)(X[:4], Y[:4])
    returned = TrainingUnit(objective(student, teacher))(X[:4], Y[:4])
    assert list(returned) == ["loss", "student_outputs", "labels", "outputs", "jacobians"]
    torch.testing.assert_close(returned["loss"], terms.loss, rtol=0, atol=0)
    assert [name for name, value in returned.items() if value.requires_grad] == ["loss"]


def test_a_loss_of_the_outputs_is_returned_with_its_graph():
    unit = TrainingUnit(objective(*networks()))
    returned = unit(X[:4], Y[:4], with_outputs=lambda outputs: outputs.square().sum())
    assert returned["of_outputs"].requires_grad


def train_in_two(settings):
    student, teacher = networks()
    unit = DistributedDataParallel(TrainingUnit(objective(student, teacher, **settings)))
    rank = torch.distributed.get_rank()
    unit.train()
    optimizer = torch.optim.SGD(unit.parameters(), lr=0.1)
    for i in range(0, 18, 6):
        optimizer.zero_grad()
        unit(X[i + rank : i + 6 : 2], Y[i + rank : i + 6 : 2])["loss"].backward()
        optimizer.step()
    return student, unit.module.shares


@pytest.mark.ci
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    "settings",
    [
        {"jacobians": GradientShare(0.3), "measure_every": 2},
        {"fraction": 0.5},  # 3 of 6 samples: two in the first process, one in the second
        {"labels": 0.0, "outputs": 0.0, "jacobians": 1.0, "probe": EveryRow()},  # no gradient for the last bias
        {"jacobian_loss": "relative", "jacobians": GradientShare(0.3)},
    ],
    ids=["shares", "fraction", "jacobians-alone", "relative"],
)
def test_two_processes_train_as_one_with_all_samples(settings):
    student, teacher = networks()
    reference = objective(student, teacher, **settings)
    plain_loop(reference, steps(18, 6))
    for trained, shares in both(train_in_two, settings):
        assert difference(trained, student) < 1e-6
        assert shares == pytest.approx(reference.loss_weights.shares)


@pytest.mark.usefixtures("as_users_run")
def test_what_is_no_objective_is_refused():
    with pytest.raises(
        InputError, match=r"`objective` of `TrainingUnit` must be an objective\. Got Images\. Pass Dist"
    ):
        TrainingUnit(networks()[0])


def test_fp16_is_refused_where_derivatives_are_taken():
    student, teacher = networks()
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(
            UnsupportedError, match=r"`Distillation` cannot take derivatives under autocast in fp16.*bf16"
        ):
            TrainingUnit(objective(student, teacher))(X[:4], Y[:4])
        assert TrainingUnit(Distillation(student, teacher, jacobians=0.0))(X[:4], Y[:4])["loss"].isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert TrainingUnit(objective(student, teacher))(X[:4], Y[:4])["loss"].isfinite()


def test_without_a_framework_the_error_says_what_to_install():
    with pytest.raises(UnsupportedError, match=r"needs the package no_such_framework.*pip install 'jacmatch\[hf\]'"):
        require("no_such_framework", "hf")


def test_unknown_names_are_errors_and_known_ones_are_listed():
    assert set(integrations.__all__) <= set(dir(integrations))
    with pytest.raises(AttributeError, match="has no attribute 'Keras'"):
        _ = integrations.Keras


def test_importing_the_package_imports_no_framework():
    code = "import sys, jacmatch.integrations; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "accelerate", "lightning", "timm"} & set(modules)
