"""The experiment `force-field`: learning from the larger network, the drift of a motion, and a run of smoke size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jacmatch_research.reproduce import EXPERIMENTS, force_field
from jacmatch_research.reproduce.command import Reproduce
from jacmatch_research.reproduce.force_field import FORCES, METHODS, ROW
from jacmatch_research.systems.force_field import learning
from jacmatch_research.systems.force_field.lennard_jones import ARGON, energy, forces


class Potential(torch.nn.Module):
    """The potential itself as a network for the energy."""

    def forward(self, x):
        return energy(x.reshape(len(x), -1, 3))[:, None]


def test_the_potential_itself_has_no_error_and_no_drift():
    exact = learning.ForceField(Potential())
    errors = learning.errors(exact, 5)
    assert max(errors[name] for name in ("energy", "force", "hessian")) < 1e-9
    assert errors["force_std"] == pytest.approx(10, rel=0.4)
    motion = learning.simulated(exact, clusters=2, steps=50, seed=0)
    assert motion["drift"] == pytest.approx(motion["own"])
    assert motion["drift"] < 0.03


class Weaker(torch.nn.Module):
    """Ninety-nine hundredths of the potential."""

    def forward(self, x):
        return 0.99 * energy(x.reshape(len(x), -1, 3))[:, None]


def test_errors_and_drift_of_a_potential_that_is_a_little_weaker():
    """H − H(0) is a hundredth of what the potential's energy changes, and its forces are wrong by a hundredth."""
    field = learning.ForceField(Weaker())
    errors = learning.errors(field, 5)
    assert errors["force"] == pytest.approx(errors["force_std"] / 100, rel=1e-6)
    x = learning.configurations(5, seed=2**20 + 1)
    mean = float(energy(x.reshape(-1, 7, 3)).square().mean().sqrt())
    assert errors["energy"] == pytest.approx(ARGON.millielectronvolts * mean / 100, rel=1e-6)
    motion = learning.simulated(field, clusters=2, steps=50, seed=0)
    assert 10 * motion["own"] < motion["drift"]


def test_targets_are_energy_and_forces():
    x = learning.configurations(3, seed=1)
    positions = x.reshape(3, 7, 3)
    expected = torch.cat((energy(positions)[:, None], forces(positions).flatten(1)), 1)
    assert torch.equal(learning.targets(x), expected)
    assert torch.equal(learning.configurations(3, seed=1), x)
    assert not torch.equal(learning.configurations(3, seed=2), x)


def test_a_lost_cluster_is_counted_and_not_averaged():
    value = {"mean": 1e9, "std": 1e9, "values": [1.0, 2.0, 3e9]}
    assert force_field._entry(value, "drift", 1) == "1.5 ± 0.7, 1 lost"
    assert force_field._entry({"mean": 3e9, "std": None, "values": [3e9]}, "drift", 1) == "1 lost"
    assert force_field._entry({"mean": 1.5, "std": None, "values": [1.5]}, "force", 1) == "1.5"


@pytest.mark.ci
def test_smoke_run(as_users_run, tmp_path):
    result = Reproduce(name="force-field", smoke=True, out=tmp_path / "run").run()
    errors, gains = result["tables"]
    assert [row[0] for row in errors["rows"]] == [*(f"n = 16: {row}" for row in METHODS), "the teacher"]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    force = {cell["row"]: cell["measures"]["force"] for cell in stored["cells"]}
    assert gains["rows"][0][:2] == (f"n = 16: {ROW} − {FORCES}", f"{force[ROW] - force[FORCES]:.3f}")
    assert len(set(force.values())) == len(METHODS)
    assert EXPERIMENTS["force-field"].figure(stored) == (tmp_path / "run" / "figure.svg").read_bytes()


def test_committed_entries_are_means_over_seeds():
    """With numpy, from the files alone."""
    folder = Path(__file__).resolve().parents[3] / "docs" / "results" / "force-field-cpu"
    cells = json.loads((folder / "results.json").read_text(encoding="utf-8"))["cells"]
    head, *body = csv.reader((folder / "force-field.csv").read_text(encoding="utf-8").splitlines())
    assert head[1] == "forces, meV/Å"
    for title, entry, *_ in body[:-1]:
        column, _, row = title.removeprefix("n = ").partition(": ")
        force = np.array([c["measures"]["force"] for c in cells if (c["row"], c["column"]) == (row, column)])
        spread = f" ± {force.std(ddof=1):.3f}" if len(force) > 1 else ""
        assert entry == f"{force.mean():.3f}{spread}"
