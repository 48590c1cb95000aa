"""Runs of several networks: what is finished is not trained again, and an interrupted run ends like any other."""

from dataclasses import replace

import pytest
import torch
from tests.jobs.equal_runs import JOBS, differences
from torch import nn

from jacmatch.datasets import Split
from jacmatch.errors import InputError
from jacmatch.jobs import networks, study
from jacmatch.jobs.study import Progress
from jacmatch.objectives import Distillation
from jacmatch.runs import Run
from jacmatch.training import Training

pytestmark = pytest.mark.usefixtures("as_users_run")
NETWORK = networks.Description("mlp:3", 2, (4,), (0.0,) * 4, (1.0,) * 4)
SAMPLES = Split(torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1] * 3))


class Interrupted(BaseException):
    """Stands for a process that ends in the middle of a step."""


class Interrupting(Progress):
    """Ends the process at a step, counted over all networks."""

    def __init__(self, step):
        super().__init__(quiet=True)
        self.left = step

    def training(self, name, steps):
        def on_step(step, metrics):
            self.left -= 1
            if self.left == 0:
                raise Interrupted

        return on_step


@pytest.fixture(scope="module")
def cached_teachers(tmp_path_factory):
    """Where the trained teachers are, for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACMATCH_CACHE", str(tmp_path_factory.mktemp("teachers")))
        yield


@pytest.mark.ci
@pytest.mark.parametrize("job", JOBS)
def test_an_interrupted_run_equals_another_one(job, tmp_path, cached_teachers):
    whole, resumed = (replace(JOBS[job], out=tmp_path / name) for name in ("whole", "resumed"))
    whole.run(Progress(quiet=True))
    for step in (1, 9, 14):  # in the teacher or the first network, and in later ones
        with pytest.raises(Interrupted):
            resumed.run(Interrupting(step))
    if job != "surrogate":  # its solver takes other steps where --max-steps is given
        assert replace(resumed, max_steps=2).run(Progress(quiet=True))["finished"] is False
    resumed.run(Progress(quiet=True))
    assert not list(differences(tmp_path / "whole", tmp_path / "resumed"))


def cells(**settings):
    training = Training(steps=2, batch_size=6, doctor=False, **settings)
    return [study.Cell(seed, method, method, training, NETWORK) for seed in (3, 4) for method in ("a", "b")]


def conclude(done):
    rows = [study.row(method.upper(), study.of_method(done, method)) for method in ("a", "b")]
    head = {**done[0][1], "seed": 3, "settings": {"x": 1}, "rows": rows, "tables": [], "seconds": 0.0}
    return {**head, **study.main_fields(study.of_method(done, "b"), rows[1])}


def run(folder, prepared=None, **settings):
    """A study of four small networks whose results are 0.25, 0.5, 0.75 and 1."""

    def prepare(cell):
        (prepared if prepared is not None else []).append((cell.seed, cell.method))
        torch.manual_seed(cell.seed)
        student = NETWORK.build()
        accuracy = (1 + 2 * (cell.seed - 3) + "ab".index(cell.method)) / 4
        fields = {"teacher": None, "student": {"accuracy": accuracy, "parameters": 23}, "agreement": study.NO_AGREEMENT}
        return study.Task(Distillation(student, labels=1.0), SAMPLES, None, lambda: (student, fields))

    begun = Run.create(folder, "train", {"x": 1}, study.__version__)
    return study.run_cells(begun, cells(**settings), prepare, conclude, device="cpu", progress=Progress(quiet=True))


@pytest.fixture
def no_page(monkeypatch):
    monkeypatch.setattr(study, "write_report", lambda folder, result: folder / "report.html")


@pytest.mark.usefixtures("no_page")
def test_the_rows_are_spreads_over_the_seeds_and_the_last_one_represents_the_run(tmp_path):
    result = run(tmp_path / "run")
    first, last = result["rows"]
    assert (first["method"], first["label"], first["seeds"], first["steps"]) == ("a", "A", 2, 2)
    assert first["accuracy"] == {"mean": 0.5, "std": pytest.approx(0.125**0.5), "values": [0.25, 0.75]}
    assert result["student"] == {"accuracy": last["accuracy"]["mean"], "parameters": 23}
    assert result["student"]["accuracy"] == 0.75
    assert result["agreement"] == study.NO_AGREEMENT
    cell = Run.open(tmp_path / "run" / "seed4" / "b").result
    assert cell["settings"] == {"x": 1, "seed": 4, "method": "b"}
    assert (cell["method"], cell["steps"], cell["compiled"]) == ("b", 2, None)


@pytest.mark.usefixtures("no_page")
def test_finished_networks_are_not_trained_again_and_damage_is_noticed_first(tmp_path):
    folder = tmp_path / "run"
    stopped = run(folder, max_steps=1)
    assert stopped == {"job": "train", "finished": False, "steps": 1, "out": str(folder)}
    run(folder)
    (folder / "result.json").unlink()
    (folder / "seed4" / "a" / "result.json").unlink()
    prepared = []
    run(folder, prepared)
    assert prepared == [(4, "a")]
    (folder / "result.json").unlink()
    (folder / "seed4" / "b" / "result.json").unlink()
    weights = folder / "seed3" / "a" / networks.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    prepared = []
    with pytest.raises(InputError, match="must have the checksum that it was written with"):
        run(folder, prepared)
    assert not prepared


def test_values_that_are_not_known_do_not_count():
    assert study.over_seeds([None, 1.0, 3.0])["mean"] == 2.0
    assert study.over_seeds([None]) is None


def test_the_quality_of_a_network_is_measured_by_its_task():
    network = nn.Linear(4, 2)
    assert study.measured(network, SAMPLES, "cpu")["parameters"] == 10
    assert study.quality(study.measured(network, SAMPLES, "cpu")) == "accuracy"
    assert study.quality(study.measured(network, replace(SAMPLES, y=torch.zeros(6, 2)), "cpu")) == "rmse"
