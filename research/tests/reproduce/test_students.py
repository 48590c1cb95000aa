"""What the experiments on distillation share: what a step costs, what a cell says, and what is cached."""

import pytest
import torch

from jacmatch.jobs import Train
from jacmatch.jobs import settings as job_settings
from jacmatch_research.reproduce import students
from jacmatch_research.reproduce.experiment import Cell, Request

SMOKE = Request(name="low-data", smoke=True)


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


def cost(method, probe="random-outputs", point="mixed-pairs", probes=1, every=1):
    settings = {"method": method, "probe": probe, "point": point, "probes": probes, "every": every}
    return students.cost(settings, 10, 2.5)


def test_cost_counts_passes():
    """Labels 3; a teacher of r forward passes r more; one product doubles that; a pair of values triples it."""
    assert cost("labels") == 3
    assert cost("outputs") == 5.5
    assert cost("jacobians") == 11
    assert cost("jacobians", every=2) == 8.25
    assert cost("jacobians", probes=3) == 22
    assert cost("jacobians", "every-row") == 60.5
    assert cost("jacobians", "antithetic-noise") == 16.5


def test_a_teacher_that_is_queried_once_costs_nothing():
    assert cost("outputs", point="data") == 3
    assert cost("jacobians", "top-class", point="data") == 6
    assert cost("jacobians", "random-outputs", point="data") == 11


@pytest.mark.parametrize(
    ("settings", "in_every_step"),
    [
        ({"method": "outputs", "point": "data"}, False),
        ({"method": "jacobians", "probe": "top-class", "point": "data"}, False),
        ({"method": "jacobians", "point": "data"}, True),
        ({"method": "outputs", "point": "mixed-pairs"}, True),
    ],
)
@pytest.mark.ci
def test_the_cost_is_that_of_the_queries(settings, in_every_step, monkeypatch):
    """The samples of the teacher's queries in training, counted at the network itself."""
    monkeypatch.setattr(job_settings, "SMOKE_STEPS", 20)  # enough that the teacher is queried for an image twice
    monkeypatch.setattr(job_settings, "SMOKE_BATCH", 32)
    world = students.world_of(SMOKE)
    chosen = students.settings_of(SMOKE, 5, **settings, steps=20, batch_size=50, output_loss="squared")
    seen = 0

    def count(module, inputs):
        nonlocal seen
        seen += len(inputs[0])

    monkeypatch.setattr(students, "judged", lambda *_: {"accuracy": 0.0})
    hook = world.teacher.register_forward_pre_hook(count)
    try:
        students.measure(SMOKE, Cell("row", "5", 1, chosen), {})  # of seed 0 the doctor asks too
    finally:
        hook.remove()
    every_step = 20 * 32  # steps and batch size; a batch with one new image is queried as a whole
    assert seen == every_step if in_every_step else seen < every_step / 2


def test_a_cell_says_all_that_decides_it():
    """Defaults of `jacmatch distill` are written down with what they mean for these data."""
    few = students.settings_of(SMOKE, 5, method="outputs")
    assert (few["point"], few["output_loss"], few["temperature"]) == ("mixed-pairs", "kl", 4.0)
    assert (few["jacobian_share"], few["probe"], few["per_class"]) == (0.3, "random-outputs", 5)
    everything = students.settings_of(SMOKE, 0, method="outputs")
    assert everything["point"] == "data"  # about 116 images of each
    assert "lr" not in few


def test_another_student_is_another_world():
    one = students.world_of(SMOKE)
    assert students.world_of(SMOKE) is one
    other = students.world_of(Request(name="low-data", smoke=True, student="mlp:8"))
    assert other is not one
    assert other.description.spec == "mlp:8"


def test_the_ratio_of_the_networks_needs_no_teacher_that_is_trained(tmp_path):
    """By name, and of a run folder; mlp:8 has 64·8 + 8·10 multiplications, mlp:16 twice as many."""
    request = Request(name="low-data", smoke=True, teacher="mlp:16", student="mlp:8")
    assert students.forward_ratio(request) == pytest.approx(2)
    Train(model="mlp:16", smoke=True, out=tmp_path / "teacher").run(students.Progress(quiet=True))
    trained = Request(name="low-data", smoke=True, teacher=str(tmp_path / "teacher"), student="mlp:8")
    assert students.forward_ratio(trained) == pytest.approx(2)
    assert students.world_of(trained).description.spec == "mlp:8"


def test_images_to_judge_by_are_of_every_class(monkeypatch):
    """Ordered by class, as a folder has them: the first ones alone would be of one class."""
    monkeypatch.setattr(students, "_JUDGED", 60)
    test = students.data_of("digits", 0, smoke=False).test
    ordered = test.subset(test.y.argsort())
    chosen = students.sample(ordered)
    assert len(chosen) == 60
    assert torch.equal(chosen.y.unique(), torch.arange(10))
    assert torch.equal(chosen.x, students.sample(ordered).x)
