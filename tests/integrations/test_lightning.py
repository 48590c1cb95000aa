"""Lightning's Trainer on objectives: equal to a plain loop, and what it logs and stores."""

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.training.processes import both

from jacmatch import Distillation, GradientShare, InputError

from .cases import X, Y, difference, networks, objective, plain_loop, steps
from .lightning_cases import fit

lightning = pytest.importorskip("lightning.pytorch")
DistillationModule = importlib.import_module("jacmatch.integrations.lightning").DistillationModule

pytestmark = [
    pytest.mark.ci,
    pytest.mark.filterwarnings("default"),  # of frameworks; errors are still errors
    pytest.mark.usefixtures("all_as_users_run"),
]

SHARES = {"jacobians": GradientShare(0.3), "measure_every": 2}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_trains_as_a_plain_loop(accumulate):
    student, teacher = networks()
    plain = copy.deepcopy(student)
    _, trainer = fit(objective(student, teacher, **SHARES), X[:32], Y[:32], accumulate_grad_batches=accumulate)
    reference = objective(plain, teacher, **SHARES)
    means = plain_loop(reference, steps(32, 4, accumulate))
    assert difference(student, plain) < 1e-6
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    shares = reference.loss_weights.shares
    assert {name: logged[f"share_{name}"] for name in shares} == pytest.approx(shares)
    if accumulate == 1:
        assert {name: logged[f"train_{name}"] for name in means[-1]} == pytest.approx(means[-1], rel=1e-5)


def test_bf16_is_autocast_around_the_objective():
    student, teacher = networks()
    plain = copy.deepcopy(student)
    fit(objective(student, teacher), X[:20], Y[:20], precision="bf16-mixed")
    plain_loop(objective(plain, teacher), steps(20, 4), cast=torch.bfloat16)
    assert difference(student, plain) < 1e-6


def test_activation_checkpointing_changes_nothing():
    student, teacher = networks()
    plain, student.checkpointed = copy.deepcopy(student), True
    fit(objective(student, teacher), X[:20], Y[:20])
    plain_loop(objective(plain, teacher), steps(20, 4))
    assert difference(student, plain) < 1e-6


def test_compiled_steps_train_as_eager_ones():
    """In a process without the type checks of this suite, which a compiler cannot follow."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.integrations.compiled", "lightning"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fallback"] is None
    assert result["steps"] > 0
    assert result["difference"] < 1e-6


def test_a_resumed_run_ends_as_one_without_a_break(tmp_path):
    student, teacher = networks()
    saved = lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    fit(objective(student, teacher, **SHARES), X[:20], Y[:20], max_epochs=2, callbacks=[saved])
    other, _ = networks()
    resumed = objective(other, teacher, **SHARES)
    fit(resumed, X[:20], Y[:20], max_epochs=2, checkpoint=tmp_path / "epoch=0.ckpt")
    assert difference(student, other) == 0
    assert resumed.calls == 10


def test_a_checkpoint_has_the_student_and_one_tensor_of_state_without_the_teacher(tmp_path):
    student, teacher = networks()
    saved = lightning.callbacks.ModelCheckpoint(tmp_path, filename="last")
    fit(objective(student, teacher), X[:8], Y[:8], callbacks=[saved])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    names = {f"unit.objective.student.{name}" for name in student.state_dict()}
    assert set(stored) == names | {"unit.objective._extra_state"}
    assert isinstance(stored["unit.objective._extra_state"], torch.Tensor)


def train_in_two(accumulate):
    student, teacher = networks()
    rank = torch.distributed.get_rank()
    own = torch.arange(24).view(-1, 2, 3)[:, rank].flatten()  # without Lightning's sampler, so that the order is known
    module = objective(student, teacher, **SHARES)
    environment = importlib.import_module("lightning.fabric.plugins.environments").LightningEnvironment()
    environment.set_global_rank(rank)
    environment.set_world_size(2)
    strategy = lightning.strategies.DDPStrategy(process_group_backend="gloo", cluster_environment=environment)
    settings = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    fit(module, X[own], Y[own], batch_size=3, accumulate_grad_batches=accumulate, **settings)
    return student


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one_with_all_samples(monkeypatch, accumulate):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    student, teacher = networks()
    order = torch.arange(24).view(-1, 2, 3).transpose(1, 2).flatten()  # sample i of process r is number 2 i + r
    plain_loop(objective(student, teacher, **SHARES), steps(24, 6, accumulate, X[order], Y[order]))
    for trained in both(train_in_two, accumulate):
        assert difference(trained, student) < 1e-6


def test_validation_logs_the_terms():
    module = DistillationModule(objective(*networks()))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:8], Y[:8]), batch_size=4)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (result,) = trainer.validate(module, loader, verbose=False)
    with torch.no_grad():
        terms = module.unit.objective.eval()
        expected = [float(terms(X[i : i + 4], Y[i : i + 4]).loss) for i in (0, 4)]
    assert result["val_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert module(X[:2]).shape == (2, 10)


def test_a_batch_may_have_a_context():
    """The third entry of a batch reaches both networks, in training and validation."""

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x, scale):
            return self.layer(x) * scale[:, None]

    taught = Distillation(Scaled(), Scaled(), samples_per_class=100, jacobians=1.0)
    module = DistillationModule(taught)
    x, y, scale = torch.randn(8, 3), torch.arange(8) % 2, torch.rand(8)
    batches = [(x[i : i + 4], y[i : i + 4], {"scale": scale[i : i + 4]}) for i in (0, 4)]
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (result,) = trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        expected = [float(taught.eval()(*batch[:2], context=batch[2]).loss) for batch in batches]
    assert result["val_loss"] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_student_without_an_objective_is_refused():
    with pytest.raises(InputError, match=r"`objective` of `TrainingUnit` must be an objective\. Got Images"):
        DistillationModule(networks()[0])
