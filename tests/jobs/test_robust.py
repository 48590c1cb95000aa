"""`jacmatch robust` on tiny jobs: what is trained, at which cost, and that the numbers are those of the networks."""

import json
import statistics

import pytest
import torch

from jacmatch import datasets
from jacmatch.errors import InputError
from jacmatch.jacobian import EveryRow
from jacmatch.jobs import Robust, load_student
from jacmatch.jobs.robust import UNSEEN, Variant
from jacmatch.jobs.study import Progress
from jacmatch.training import evaluate, evaluate_under_shifts

SMALL = {"model": "mlp:8", "steps": 6, "seeds": 2, "draws": 2, "noise_levels": (0.2,), "batch_size": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the result of a small job."""
    folder = tmp_path_factory.mktemp("robust") / "run"
    job = Robust(**SMALL, penalty_weight=(0.0, 0.1), noise_augment=(0.3,), validation=0.2, out=folder)
    return job, folder, job.run(Progress(quiet=True))


@pytest.mark.ci
def test_the_networks_without_a_penalty_get_the_steps_that_it_costs(run):
    _, _, result = run
    steps = {row["method"]: row["steps"] for row in result["variants"]}
    assert steps == {"penalty-0": 12, "penalty-0.1": 6, "noise-0.3": 12}
    assert [row["label"] for row in result["variants"]] == [
        "penalty λ = 0",
        "penalty λ = 0.1",
        "noise 0.3 in training",
    ]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 12),
        ({"equal_cost": False}, 6),
        ({"probes": 3}, 24),
        ({"probe": "every-row"}, 66),
        ({"probe": "every-row", "penalty": "paper-label-cross-entropy"}, 12),
        ({"probe": "every-row", "penalty": "piecewise-linear-cross-entropy"}, 66),
        ({"penalty_weight": (0.0,)}, 6),
    ],
)
def test_equal_cost_is_counted_in_passes(settings, steps):
    job = Robust(**{**SMALL, "penalty_weight": (0.0, 0.1), **settings})
    chosen = {variant.method: variant.steps for variant in job.variants(datasets.load("digits"))}
    assert chosen["penalty-0"] == chosen["noise-0.2"] == steps
    assert chosen.get("penalty-0.1", 6) == 6


@pytest.mark.ci
def test_the_result_is_that_of_the_last_weight_and_follows_the_schema(run):
    _, folder, result = run
    written = json.loads((folder / "result.json").read_text())
    assert json.loads(json.dumps({key: result[key] for key in written})) == written
    assert written["job"] == "robust"
    assert written["teacher"] is None
    assert written["student"]["accuracy"] == written["variants"][1]["accuracy"]["mean"]
    assert written["settings"]["penalty_weight"] == [0.0, 0.1]


def test_the_numbers_are_those_of_the_stored_networks(run):
    _, folder, result = run
    data = datasets.load("digits")
    for row in result["variants"]:
        accuracies, noisy, contrast = [], [], []
        for seed in (0, 1):
            network = load_student(folder / f"seed{seed}" / row["method"])
            accuracies.append(evaluate(network, data.test, device="cpu")["accuracy"])
            shifts = [("gaussian-noise", 0.2), UNSEEN[2]]
            chosen = evaluate_under_shifts(network, data.test, shifts, draws=2, scale=data.std, device="cpu")
            noisy.append(statistics.fmean(chosen["gaussian-noise", 0.2]))
            contrast.append(chosen[UNSEEN[2]][0])
        assert row["accuracy"]["values"] == accuracies
        assert row["accuracy"]["std"] == pytest.approx(statistics.stdev(accuracies))
        assert row["under"]["gaussian-noise 0.2"]["values"] == pytest.approx(noisy)
        assert row["under"]["contrast 0.5"]["values"] == contrast
    assert list(result["variants"][0]["under"]) == [
        "gaussian-noise 0.2",
        *(f"{name} {severity:g}" for name, severity in UNSEEN),
    ]


def test_the_network_of_the_run_is_the_first_seed_of_the_last_weight(run):
    _, folder, _ = run
    ours, theirs = load_student(folder).state_dict(), load_student(folder / "seed0" / "penalty-0.1").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.ci
def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path):
    job, folder, _ = run
    settings = {name: getattr(job, name) for name in SMALL} | {
        "penalty_weight": (0.0, 0.1),
        "noise_augment": (0.3,),
        "validation": 0.2,
    }
    quiet = Progress(quiet=True)
    assert Robust(**settings, out=tmp_path / "run", max_steps=4).run(quiet)["finished"] is False
    assert not (tmp_path / "run" / "result.json").exists()
    Robust(**settings, out=tmp_path / "run").run(quiet)
    for method in ("penalty-0", "penalty-0.1", "noise-0.3"):
        name = f"seed1/{method}/student.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def test_the_objective_is_what_the_settings_say():
    data = datasets.load("digits")
    network = torch.nn.Linear(1, 1)
    job = Robust(penalty="squared-norm", probe="every-row", unit="normalized")
    objective = job.objective(Variant(0.5, 0.2, 10), network, data, seed=7)
    assert (objective.form, objective.noise, objective.differentiation.seed) == ("squared-norm", 0.2, 7)
    assert isinstance(objective.differentiation.probe, EveryRow)
    assert objective.loss_weights.weights["penalty"] == 0.5
    assert objective.scale.tolist() == pytest.approx(list(data.std))
    raw = Robust(unit="raw", probes=2).objective(Variant(0.5, 0.0, 10), network, data, seed=7)
    assert raw.scale.tolist() == [1.0]
    probe = raw.differentiation.probe
    assert (probe.count, probe.law) == (2, "sphere")


@pytest.mark.ci
def test_a_regression(tmp_path):
    settings = {**SMALL, "model": "mlp:4", "seeds": 1, "data": "synthetic:D=3,K=2,N=40,T=20"}
    result = Robust(**settings, penalty="squared-norm", probe="random-inputs", out=tmp_path / "run").run(
        Progress(quiet=True)
    )
    assert "rmse" in result["student"]
    assert list(result["variants"][0]["under"]) == ["gaussian-noise 0.2"]
    with pytest.raises(InputError, match=r"must not have settings for classes\. Got piecewise"):
        Robust(**settings, penalty="piecewise-linear-cross-entropy", out=tmp_path / "no").run(Progress(quiet=True))
    assert not (tmp_path / "no").exists()
