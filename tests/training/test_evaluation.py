import math

import pytest
import torch
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jacobian import jacobian
from jacmatch.objectives import Distillation
from jacmatch.teachers import AnalyticTeacher, BlackBoxTeacher, ModuleTeacher
from jacmatch.training import Training, agreement, evaluate, find_device, fit

from . import cases, reference


def _smooth(seed, inputs=5, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs))


def _split(count=20, inputs=5, outputs=None):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, inputs, generator=generator)
    y = torch.randint(0, 3, (count,), generator=generator) if outputs is None else torch.randn(count, outputs)
    return Split(x, y)


def test_accuracy_counts_the_right_ones():
    split, network = cases.images(17), cases.network().eval()
    right = sum(int(network(split.inputs(torch.tensor([i]))).argmax()) == int(split.y[i]) for i in range(17))
    assert evaluate(network, split, device="cpu") == {"accuracy": right / 17}


def test_rmse_is_over_samples_and_outputs():
    split, network = _split(outputs=3), _smooth(0)
    total = sum(float((network(split.x[i]) - split.y[i]).detach().double().square().sum()) for i in range(20))
    assert evaluate(network, split, device="cpu")["rmse"] == pytest.approx(math.sqrt(total / 60), rel=1e-6)


@pytest.mark.parametrize("split", [cases.images(17), cases.points(17)], ids=["classes", "targets"])
def test_batches_do_not_matter(split):
    network = cases.network() if split.x.ndim == 4 else _smooth(0, 4, 2)
    whole = evaluate(network, split, device="cpu")
    assert evaluate(network, split, batch_size=5, device="cpu") == pytest.approx(whole, rel=1e-6)


def test_evaluation_leaves_the_network_as_it_was():
    teacher, network = ModuleTeacher(cases.network(1)), cases.network().train()
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(network, cases.images(9), device="cpu")
    agreement(network, teacher, cases.images(9))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [part.training for part in network] == [True, False, True, True, True, True, True]


def test_modes_are_restored_when_the_network_fails():
    network = cases.network().train()
    with pytest.raises(RuntimeError, match="channels"):
        evaluate(network, Split(torch.rand(2, 3, 8, 8), torch.tensor([0, 1])), device="cpu")
    assert all(part.training for part in network.modules())


def test_a_network_may_return_a_dictionary():
    class Wrapped(nn.Module):
        def forward(self, x):
            return {"logits": x}

    assert evaluate(Wrapped(), Split(torch.eye(3), torch.arange(3)), device="cpu") == {"accuracy": 1.0}


def test_wrong_splits_are_refused():
    with pytest.raises(InputError, match=r"`split` of `evaluate` must have samples"):
        evaluate(_smooth(0), Split(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)), device="cpu")
    with pytest.raises(InputError, match=r"shape of the targets, \(20, 2\)\. Got \(20, 3\)"):
        evaluate(_smooth(0), _split(outputs=2), device="cpu")


@pytest.mark.parametrize("name", ["cpu", "auto", torch.device("cpu")])
def test_devices_without_a_gpu(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(name) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "number"), [("cuda", 1), ("cuda:0", 0), ("auto", 1), (torch.device("cuda", 1), 1), ("cuda:1", 1)]
)
def test_devices_with_two_gpus(monkeypatch, name, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert find_device(name) == torch.device("cuda", number)
    with pytest.raises(InputError, match=r"must be one that this machine has\. Got 'cuda:2', and 2 GPUs .* Use 'auto'"):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_missing_gpu_is_an_error(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=rf"must be one that this machine has\. Got '{name}', and no GPUs"):
        find_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:-1", "mps", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match=r"`device` must be 'cpu', 'cuda', 'cuda:N' or 'auto'"):
        find_device(name)


def test_agreement_follows_its_definition():
    split, student, teacher = _split(), _smooth(1), _smooth(2)
    cosines, difference, norm, same = [], 0.0, 0.0, 0
    for i in range(20):
        ours, theirs = (torch.autograd.functional.jacobian(n, split.x[i]).double() for n in (student, teacher))
        top = int(teacher(split.x[i]).argmax())
        same += int(student(split.x[i]).argmax()) == top
        cosines.append(reference.cosine(ours[top], theirs[top]))
        difference += float((ours - theirs).square().sum())
        norm += float(theirs.square().sum())
    got = agreement(student, ModuleTeacher(teacher), split)
    assert got["top1"] == same / 20
    assert got["jacobian_cosine"] == pytest.approx(sum(cosines) / 20, rel=1e-5)
    assert got["jacobian_relative_error"] == pytest.approx(math.sqrt(difference / norm), rel=1e-5)


def test_regression_compares_every_row():
    split, student, teacher = _split(outputs=3), _smooth(1), _smooth(2)
    cosines = []
    for i in range(20):
        ours, theirs = (torch.autograd.functional.jacobian(n, split.x[i]).double() for n in (student, teacher))
        cosines += [reference.cosine(a, b) for a, b in zip(ours, theirs, strict=True)]
    got = agreement(student, ModuleTeacher(teacher), split)
    assert got["top1"] is None
    assert got["jacobian_cosine"] == pytest.approx(sum(cosines) / 60, rel=1e-5)


def test_a_black_box_with_few_inputs_is_compared_exactly():
    split, student, teacher = _split(), _smooth(1), _smooth(2)
    exact = agreement(student, ModuleTeacher(teacher), split)
    assert agreement(student, BlackBoxTeacher(teacher), split) == pytest.approx(exact, rel=1e-3)


def test_a_black_box_with_many_inputs_is_estimated():
    """64 of 100 directions: 5 standard deviations of the estimate lie within the bounds."""
    split, student, teacher = _split(200, 100), _smooth(1, 100), _smooth(2, 100)
    with torch.no_grad():
        student[0].weight.copy_(0.5 * student[0].weight + teacher[0].weight)
    exact = agreement(student, ModuleTeacher(teacher), split)
    guess = agreement(student, BlackBoxTeacher(teacher), split)
    assert guess["jacobian_cosine"] == pytest.approx(exact["jacobian_cosine"], abs=0.03)
    assert guess["jacobian_relative_error"] == pytest.approx(exact["jacobian_relative_error"], rel=0.03)


def test_an_analytic_teacher_answers_exactly():
    split, student, teacher = _split(), _smooth(1), _smooth(2)
    exact = agreement(student, ModuleTeacher(teacher), split)
    analytic = AnalyticTeacher(lambda x: teacher(x), lambda x: jacobian(teacher, x)[1].detach())
    assert agreement(student, analytic, split) == pytest.approx(exact, rel=1e-4)


def test_agreement_with_itself_is_perfect_and_small_batches_do_not_matter(monkeypatch):
    split, student, teacher = _split(), _smooth(1), _smooth(2)
    itself = agreement(student, ModuleTeacher(_smooth(1)), split)
    assert itself == pytest.approx({"top1": 1.0, "jacobian_cosine": 1.0, "jacobian_relative_error": 0.0}, abs=1e-6)
    whole = agreement(student, ModuleTeacher(teacher), split)
    monkeypatch.setattr("jacmatch.training.evaluation._NUMBERS", 50)
    assert agreement(student, ModuleTeacher(teacher), split, batch_size=3) == pytest.approx(whole, rel=1e-5)


def test_a_teacher_without_derivatives_has_no_relative_error():
    flat = _smooth(2)
    nn.init.zeros_(flat[2].weight)
    got = agreement(_smooth(1), ModuleTeacher(flat), _split())
    assert got["jacobian_cosine"] == 0.0
    assert got["jacobian_relative_error"] is None


def test_samples_limits_the_jacobians_only():
    split, student, teacher = _split(), _smooth(1), _smooth(2)
    few, all_of_them = (agreement(student, ModuleTeacher(teacher), split, samples=n) for n in (4, 10**6))
    assert few["top1"] == all_of_them["top1"]
    assert few["jacobian_cosine"] != all_of_them["jacobian_cosine"]


def test_agreement_refuses_what_it_cannot_compare():
    with pytest.raises(InputError, match=r"`agreement` needs at least one sample\. Got samples=0, 20 rows"):
        agreement(_smooth(1), ModuleTeacher(_smooth(2)), _split(), samples=0)
    for split in (_split(), _split(outputs=4)):
        with pytest.raises(InputError, match=r"shape of the teacher's, \(20, 4\)\. Got \(20, 3\)"):
            agreement(_smooth(1), ModuleTeacher(_smooth(2, outputs=4)), split)


class _Structured(nn.Module):
    """A network that returns its outputs beside something else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return {"hidden": x, "logits": self.layer(x)}


def test_output_selects_in_evaluation_and_in_training_as_in_an_objective(tmp_path):
    network, split = _Structured(), Split(torch.rand(12, 3), torch.arange(12) % 2)
    expected = evaluate(network.layer, split, device="cpu")
    assert evaluate(network, split, device="cpu", output=lambda out: out["logits"]) == expected
    objective = Distillation(network, nn.Linear(3, 2), jacobians=0.5, output=(lambda out: out["logits"], None))
    rows = []
    settings = Training(steps=2, batch_size=6, validate_every=1, ema=0.5)
    fit(objective, split, settings, seed=0, validation=split, on_step=lambda _, row: rows.append(row))
    assert 0 <= rows[-1]["validation_accuracy"] <= 1
