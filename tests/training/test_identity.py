"""`fit(run=)` goes on with the data, the teacher, the student and the objective that it was begun with."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jacobian import RandomInputs, RandomOutputs
from jacmatch.objectives import Distillation, GradientShare, Regression, Robustness, Terms
from jacmatch.teachers import AnalyticTeacher, BlackBoxTeacher, EnsembleTeacher, MemoizedTeacher, ModuleTeacher
from jacmatch.training import Training, fit
from jacmatch.training.identity import as_before, identity, named, outputs_of, student_identity

from . import cases

STEPS = Training(steps=4, batch_size=8, doctor=False)


def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def goes_on(folder, objective, train=None, **changes):
    """One step in a run folder; the next call makes another one, if it is the same training."""
    train = cases.points() if train is None else train
    run = cases.begin(folder)
    done = 0 if not (folder / "checkpoint.pt").exists() else torch.load(folder / "checkpoint.pt")["step"]
    settings = dataclasses.replace(STEPS, max_steps=done + 1, **changes)
    return fit(objective, train, settings, seed=0, run=run).steps


def taught(teacher=None, **settings):
    teacher = AnalyticTeacher(function, jacobian) if teacher is None else teacher
    return Regression(student(), teacher, jacobians=GradientShare(0.3), **settings)


def function(x):
    return torch.stack((x.sum(1).sin(), x[:, 0] * x[:, 1]), 1)


def jacobian(x):
    rows = torch.zeros(len(x), 2, 4)
    rows[:, 0] = x.sum(1).cos()[:, None]
    rows[:, 1, 0], rows[:, 1, 1] = x[:, 1], x[:, 0]
    return rows


def test_what_is_the_same_goes_on(tmp_path):
    assert [goes_on(tmp_path, taught()) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda split: split.x[20].add_(1e-3), "data x"),
        (lambda split: split.y[20].add_(1e-3), "data y"),
    ],
)
def test_other_data_are_refused_also_in_the_same_object(tmp_path, change, name):
    split = cases.points()
    goes_on(tmp_path, taught(), split)
    change(split)
    with pytest.raises(
        InputError, match=rf"differs in {name} \(\w{{12}} there, \w{{12}} here\)\. Restore the original inputs"
    ):
        goes_on(tmp_path, taught(), split)
    assert goes_on(tmp_path, taught(), cases.points()) == 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"probe": RandomOutputs(2)}, r"objective\.probe \(RandomOutputs\(count=1.*RandomOutputs\(count=2"),
        ({"jacobian_loss": "normalized"}, r"objective\.jacobian_loss \('squared' there"),
        ({"values": 0.5}, r"objective\.loss_weights"),
        ({"inputs": torch.full((4,), 2.0)}, r"objective\.input_scale"),
        ({"seed": 1}, r"objective\.seed"),
    ],
)
def test_other_settings_of_the_objective_are_named(tmp_path, settings, name):
    goes_on(tmp_path, taught(probe=RandomOutputs(1)))
    with pytest.raises(InputError, match=f"differs in {name}"):
        goes_on(tmp_path, taught(**{"probe": RandomOutputs(1), **settings}))


def test_what_the_objective_has_measured_is_no_setting(tmp_path):
    goes_on(tmp_path, taught())
    used = taught()
    split = cases.points()
    used(split.x, split.y)
    assert goes_on(tmp_path, used) == 2


def other_function(x):
    return torch.stack((x.sum(1).sin(), 1.01 * x[:, 0] * x[:, 1]), 1)


SCALE = 1.0


def scaled(x):
    return SCALE * function(x)


def test_another_function_is_refused_by_its_source_or_by_its_values(tmp_path, monkeypatch):
    probe = {"probe": RandomInputs(1)}
    goes_on(tmp_path / "source", taught(BlackBoxTeacher(function), **probe))
    with pytest.raises(InputError, match=r"differs in teacher \(BlackBoxTeacher \w{16} there.*, teacher outputs"):
        goes_on(tmp_path / "source", taught(BlackBoxTeacher(other_function), **probe))
    goes_on(tmp_path / "values", taught(BlackBoxTeacher(scaled), **probe))
    monkeypatch.setitem(globals(), "SCALE", 1.01)
    with pytest.raises(InputError, match=r"differs in teacher outputs \(off by 1\.0% of the largest\)"):
        goes_on(tmp_path / "values", taught(BlackBoxTeacher(scaled), **probe))


def test_another_jacobian_of_a_function_is_another_teacher():
    def twice(x):
        return 2 * jacobian(x)

    one, two = (AnalyticTeacher(function, each) for each in (jacobian, twice))
    assert named(one) == named(MemoizedTeacher(AnalyticTeacher(function, jacobian))) != named(two)
    assert named(EnsembleTeacher([one, two])).startswith("EnsembleTeacher of 2 ")
    assert named(EnsembleTeacher([one, two])) != named(EnsembleTeacher([one, one]))


class Scaled(nn.Module):
    """Nothing that it prints and none of its weights says by how much."""

    def __init__(self, factor):
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 2), factor

    def forward(self, x):
        return self.factor * self.linear(x)


def test_another_student_of_the_same_weights_is_refused(tmp_path):
    goes_on(tmp_path, Regression(Scaled(1.0), jacobians=0.0))
    with pytest.raises(InputError, match=r"differs in student outputs \(off by 50\.0% of the largest\)"):
        goes_on(tmp_path, Regression(Scaled(2.0), jacobians=0.0))
    relu, elu = (nn.Sequential(nn.Linear(4, 2), activation()) for activation in (nn.ReLU, nn.ELU))
    goes_on(tmp_path / "other", Regression(relu, jacobians=0.0))
    with pytest.raises(InputError, match=r"differs in student \(\w{12} there, \w{12} here\)"):
        goes_on(tmp_path / "other", Regression(elu, jacobians=0.0))


class Drawing(nn.Module):
    """Draws from every generator, counts in a buffer, also in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.linear(x) + 0 * (torch.rand(()) + np.random.rand())


def test_a_probe_changes_nothing():
    network = Drawing()
    network.linear.eval()
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2).tolist(), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    outputs = outputs_of(network, torch.ones(2, 4))
    assert outputs["values"] == pytest.approx(network.linear(torch.ones(2, 4)).flatten().tolist())
    assert (torch.rand(2).tolist(), np.random.rand()) == expected
    assert network.count == 0
    assert (network.training, network.linear.training) == (True, False)


def test_networks_in_16_bits_are_known_again_less_exactly():
    x = torch.ones(2, 4)
    assert outputs_of(nn.Linear(4, 2), x)["tolerance"] == 1e-4
    assert outputs_of(ModuleTeacher(nn.Linear(4, 2), torch.bfloat16), x)["tolerance"] == 2e-2


def test_what_cannot_be_probed_is_reported():
    assert outputs_of(BlackBoxTeacher(lambda x: torch.randn(len(x), 2)), torch.ones(2, 4)) == "another at each call"
    assert outputs_of(nn.Linear(3, 2), torch.ones(2, 4)) == "not probed"
    assert student_identity(nn.Linear(4, 2), torch.ones(2, 4), probed=False)["student outputs"] == "not probed"


class Own(nn.Module):
    """An objective of the user's, with a setting, memory and a loss module."""

    def __init__(self, factor=1.0, smoothing=0.0):
        super().__init__()
        self.student, self.factor, self._seen = student(), factor, []
        self.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, x, y, **keywords):
        self._seen.append(len(x))
        outputs = self.student(x)
        loss = self.factor * self.loss(outputs, y)
        return Terms({"loss": loss, "labels": loss}, outputs)


def test_settings_of_an_objective_of_ones_own_are_its_public_attributes(tmp_path):
    train = Split(cases.points().x, torch.arange(24) % 2)
    goes_on(tmp_path, Own(), train)
    for other, name in (
        (Own(factor=0.5), r"objective\.factor"),
        (Own(smoothing=0.1), r"objective\.loss\.label_smooth"),
    ):
        with pytest.raises(InputError, match=rf"differs in {name}"):
            goes_on(tmp_path, other, train)
    assert goes_on(tmp_path, Own(), train) == 2


def test_a_teacher_that_is_part_of_the_objective_is_compared_too():
    objective, split = Own(), cases.points()
    objective.teacher = nn.Linear(4, 2)
    before = identity(objective, split, 0)
    assert before["teacher"].startswith("Linear ")
    assert all(parameter.requires_grad for parameter in objective.teacher.parameters()), "nothing is changed"
    objective.teacher.weight.data[0, 0] += 1e-3
    assert identity(objective, split, 0)["teacher"] != before["teacher"]


def test_the_distillation_of_a_network_is_known_again_in_another_process():
    """No address of an object and no order of a set is in what is compared."""
    identities = [
        {
            **identity(
                Distillation(student(), ModuleTeacher(nn.Linear(4, 2).eval()), jacobians=GradientShare(0.3)),
                cases.points(),
                0,
            ),
            "teacher": "",
        }
        for _ in range(2)
    ]
    for one in identities:
        del one["teacher outputs"]
        assert " at 0x" not in str(one)
    assert identities[0] == identities[1]


def test_a_checkpoint_of_version_0_1_is_of_the_same_run():
    """That version wrote the settings of the derivatives as `Slopes`, or as the objective's own."""
    schedule = "WeightSchedule(samples_per_class=None, halves_at=300.0, fades_from=1.0)"
    common = {"objective.output": "None", "objective.every": "1", "objective.measure_every": "100"}
    settings = (
        "Slopes(probe=RandomOutputs(count=2, law='gaussian'), readout=Logits(layers=()), "
        "teacher_readout=Logits(layers=()), point=AtData(), batch_norm='frozen', engine='auto', seed=0, "
        "chunk_size=None)"
    )
    distillation = {
        **common,
        "objective": "Distillation",
        "objective.balance": "Balance(weights={labels: 1.0, outputs: 1.0, jacobians: Share(0.3)})",
        "objective.schedule": schedule,
        "objective.slopes": settings,
        "objective.output_loss": "'kl'",
        "objective.temperature": "4.0",
        "objective.jacobian_loss": "'bounded'",
        "objective.fraction": "1.0",
        "objective.task": "'classification'",
        "objective.class_dim": "None",
    }
    robustness = {
        **common,
        "objective": "Robustness",
        "objective.balance": "Balance(weights={labels: 1.0, penalty: 0.5})",
        "objective.schedule": schedule,
        "objective.form": "'hoffman'",
        "objective.noise": "0.0",
        "objective.batch_norm": "'frozen'",
        "objective.probe": "RandomOutputs(count=1, law='sphere')",
        "objective.task": "'classification'",
        "objective.seed": "0",
    }
    made = Distillation(student(), nn.Linear(4, 2), probe=RandomOutputs(2), jacobians=GradientShare(0.3))
    for objective, saved in ((made, distillation), (Robustness(student(), penalty=0.5), robustness)):
        now = as_before(identity(objective, cases.points(), 0), saved)
        here = {name: value for name, value in now.items() if name.startswith("objective") and name in saved}
        assert here == saved
        assert {name for name in now if name.startswith("objective")} - set(saved) <= {"objective.scale"}
    other = as_before(identity(Robustness(student(), penalty=0.4), cases.points(), 0), robustness)
    assert other["objective.balance"] != robustness["objective.balance"]
