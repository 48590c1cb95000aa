"""The task of timm: the loss that its parts add up to, state, moving average, and two processes."""

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.processes import both
from torch import nn
from torch.utils.checkpoint import checkpoint

from jacmatch import AtData, Distillation, GradientShare, RandomOutputs

from .cases import difference

timm = pytest.importorskip("timm", exc_type=ImportError)
JacobianDistillationTask = importlib.import_module("jacmatch.integrations.timm").JacobianDistillationTask

pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings("default"),  # of frameworks; errors are still errors
    pytest.mark.usefixtures("all_as_users_run"),
]


class Model(nn.Module):
    """What timm's tasks need to know of a model, around two layers."""

    num_classes, in_chans = 4, 3

    def __init__(self, width, mean):
        super().__init__()
        self.pretrained_cfg = {"mean": mean, "std": (0.5, 0.25, 0.2)}
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, width), nn.Tanh(), nn.Linear(width, 4))
        self.checkpointed = False

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False) if self.checkpointed else self.layers(x)


def networks():
    torch.manual_seed(0)
    return Model(6, (0.5, 0.5, 0.5)), Model(12, (0.1, 0.2, 0.3))


def batch(samples=6):
    torch.manual_seed(1)
    return torch.randn(samples, 3, 4, 4), torch.arange(samples) % 4


SETTINGS = {"task_loss_weight": 0.4, "temperature": 2.0, "verbose": False, "loss_type": "kl"}


def task(student, teacher, criterion=None, **settings):
    """As timm's training script makes it."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1) if criterion is None else criterion
    settings = {"jacobians": 0.7, "probe": RandomOutputs(1), **SETTINGS, **settings}
    settings = {"student_model": student, "teacher_model": teacher, "criterion": criterion, **settings}
    return JacobianDistillationTask(device=torch.device("cpu"), dtype=None, distill_loss_weight=None, **settings)


def gradients(student, loss):
    return torch.autograd.grad(loss, list(student.parameters()))


@pytest.mark.parametrize("way", ["float32", "bf16", "checkpointed"])
def test_the_loss_is_that_of_a_plain_loop(way):
    """The teacher sees the image by its own mean and standard deviation; its derivative is by the student's input."""
    student, teacher = networks()
    x, y = batch()
    student.checkpointed = way == "checkpointed"
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
        returned = task(student, teacher).train()(x, y)

    def of_teacher(x):
        mean, std = (torch.tensor(student.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        means, stds = (torch.tensor(teacher.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        return teacher((x * std + mean - means) / stds)

    class Teacher(nn.Module):
        def forward(self, x):
            return of_teacher(x)

    plain = Distillation(
        student, Teacher(), labels=0, outputs=0.6, output_loss="kl", temperature=2.0, jacobians=0.7, point=AtData()
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
        terms = plain(x, y)
        outputs = terms.student_outputs
        loss = terms.loss + 0.4 * nn.functional.cross_entropy(outputs, y, label_smoothing=0.1)
    result = gradients(student, returned["loss"])
    for one, other in zip(result, gradients(student, loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    parts = {"kd_loss": terms["outputs"], "jacobian_loss": terms["jacobians"], "output": outputs.detach()}
    for name, value in parts.items():
        torch.testing.assert_close(returned[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_soft_targets_of_mixup_go_to_the_criterion():
    student, teacher = networks()
    x, y = batch()
    soft = nn.functional.one_hot(y, 4) * 0.7 + 0.3 / 4
    returned = task(student, teacher, importlib.import_module("timm.loss").SoftTargetCrossEntropy()).train()(x, soft)
    expected = -(soft * student(x).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(returned["task_loss"], expected.detach())


def test_a_checkpoint_has_the_student_and_the_state_of_the_objective():
    student, teacher = networks()
    settings = {"jacobians": GradientShare(0.3)}
    trained = task(student, teacher, **settings).train()
    trained(*batch())["loss"].backward()
    state = trained.get_checkpoint_state()
    assert set(state["state_dict"]) == set(student.state_dict())
    other = task(Model(6, (0.5, 0.5, 0.5)), teacher, **settings).train()
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert other.objective.calls == 1
    torch.testing.assert_close(other(*batch())["loss"], trained(*batch())["loss"], rtol=0, atol=0)
    assert other.get_eval_model() is other.objective.student
    assert {id(p) for p in other.get_clip_parameters()} == {id(p) for p in other.objective.student.parameters()}


def test_the_moving_average_is_that_of_the_student():
    student, teacher = networks()
    trained = task(student, teacher)
    average = trained.setup_ema(decay=0.5)
    before = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    trained.update_ema(step=10)  # timm copies the weights in its first updates
    for now, start in zip(average.module.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(now, start + 0.5)
    assert set(trained.get_checkpoint_state(ema=True)) == {"state_dict_ema"}
    assert set(trained.get_checkpoint_state(ema=True)["state_dict_ema"]) == set(student.state_dict())


def train_in_two(settings):
    student, teacher = networks()
    trained = task(student, teacher, **settings).train()
    trained.prepare_distributed()
    rank = torch.distributed.get_rank()
    x, y = batch(8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        with trained.no_sync():
            (trained(x[rank:4:2], y[rank:4:2])["loss"] / 2).backward()
        (trained(x[4 + rank :: 2], y[4 + rank :: 2])["loss"] / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student, trained.objective.loss_weights.shares


def test_two_processes_train_as_one_with_all_samples():
    settings = {"jacobians": GradientShare(0.3), "objective_settings": {"measure_every": 2}}
    student, teacher = networks()
    plain = task(student, teacher, **settings).train()
    x, y = batch(8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        for part in (slice(0, 4), slice(4, 8)):
            (plain(x[part], y[part])["loss"] / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for trained, shares in both(train_in_two, settings):
        assert difference(trained, student) < 1e-6
        assert shares == pytest.approx(plain.objective.loss_weights.shares)


def test_compiled_steps_train_as_eager_ones():
    """In a process without the type checks of this suite, which a compiler cannot follow."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.integrations.compiled", "timm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fallback"] is None
    assert result["steps"] >= 4  # and those that measure the shares
    assert result["moved"] > 0.01
    assert max(result["difference"], result["evaluation"]) < 1e-6


def test_compile_compiles_the_steps_and_the_student_for_evaluation():
    student, teacher = networks()
    trained = task(student, teacher)
    compiled = trained.compile(backend="eager")
    assert trained.objective.compiled is not None
    assert trained.get_eval_model() is compiled
    assert set(trained.get_checkpoint_state()["state_dict"]) == set(student.state_dict())
