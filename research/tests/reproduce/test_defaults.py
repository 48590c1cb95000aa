"""The study of the default: which settings, the loop, and the margin that decides."""

from itertools import combinations, product

import pytest
import torch

from jacmatch.cli import main
from jacmatch_research.reproduce import defaults, students, two_pairs
from jacmatch_research.reproduce.defaults import CROSS_ENTROPY, DEFAULT, PLAIN_KL
from jacmatch_research.reproduce.experiment import Cell, Request


def document(**rows):
    """Accuracies by row, seeds 0, 1, … of one column."""
    names = {"ce": CROSS_ENTROPY, "kl": PLAIN_KL, "default": DEFAULT}
    cells = [
        {"row": names[row], "column": "c", "seed": seed, "measures": {"accuracy": value}}
        for row, values in rows.items()
        for seed, value in enumerate(values)
    ]
    return {"cells": cells}


def test_the_rival_is_the_better_one_and_gains_are_taken_seed_by_seed():
    """Over plain KL: +4, +2, +6 points; mean 4, standard deviation 2, standard error 2/√3 = 1.155."""
    margin = defaults.margin(
        document(ce=(0.6, 0.6, 0.6), kl=(0.7, 0.71, 0.69), default=(0.74, 0.73, 0.75)), "c", (CROSS_ENTROPY, PLAIN_KL)
    )
    assert margin.rival == PLAIN_KL
    assert margin.text() == "+4.0 ± 1.2"
    assert margin.holds


@pytest.mark.parametrize(
    ("default", "holds"),
    [((0.69, 0.71, 0.69), True), ((0.68, 0.69, 0.67), False), ((0.70, 0.70, 0.70), True), ((0.69, 0.69, 0.69), False)],
    ids=["within two errors", "below", "equal", "below without spread"],
)
def test_the_criterion_is_two_standard_errors(default, holds):
    """Differences −1, +1, −1 points: mean −⅓, standard error ⅔. −2, −1, −3: mean −2, standard error 0.58."""
    margin = defaults.margin(document(kl=(0.7, 0.7, 0.7), default=default), "c", (CROSS_ENTROPY, PLAIN_KL))
    assert margin.holds is holds
    assert ("missed" in margin.text()) is not holds


def test_every_two_levels_of_two_factors_meet(monkeypatch):
    """Over the three data sets; digits have no 1,000 images per class."""
    monkeypatch.setattr(
        students,
        "per_class_of",
        lambda request, sizes: [n for n in sizes if n <= 100 or not request.data.startswith("digits")],
    )
    families = ("digits", "fashion-mnist", "cifar10")
    settings = [
        (family, setting.pair, setting.per_class, setting.optimizer)
        for family in families
        for setting in defaults.settings_of(Request(name="defaults", data=f"{family}:somewhere"))
    ]
    assert len(settings) == len(set(settings)) == 17
    levels = families, defaults.PAIRS, defaults.PER_CLASS, defaults.OPTIMIZERS
    for (i, one), (j, other) in combinations(enumerate(levels), 2):
        missing = set(product(one, other)) - {(setting[i], setting[j]) for setting in settings}
        assert missing <= {("digits", 1000)}


@pytest.mark.parametrize("network", ["convolutional", "residual"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_networks_take_the_images_of_every_data_set(network, shape):
    for role in ("teacher", "student"):
        built = getattr(two_pairs, f"{network}_{role}")(10, shape, [0.5] * shape[0], [0.2] * shape[0])
        assert built(torch.rand(2, *shape)).shape == (2, 10)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A pair on the digits whose teacher is not trained."""
    data = defaults.students.data_of("digits", 0, True)
    pool, validation = defaults.parts(data, 0.1, 0, 0)
    spec = "jacmatch_research.reproduce.two_pairs:convolutional_{}"
    teacher, student = (defaults.networks.Description.of(spec.format(role), data) for role in ("teacher", "student"))
    return defaults.Pair(data, pool, validation, teacher.build().eval(), student)


def cell(row, steps, seed=0):
    chosen = {"pair": "convolutional", "per_class": 5, "optimizer": "SGD", "lr": 0.01, "steps": steps, "batch": 32}
    return Cell(row, "convolutional, n = 5, SGD", seed, chosen)


def test_the_loop_is_that_of_the_readme(pair):
    """Three steps of cross-entropy with 50 images: 32 and 18 of one order, 32 of the next; a cosine from 0.01 to 0."""
    student = defaults.trained(pair, cell(CROSS_ENTROPY, 3), "cpu")
    train = pair.pool.subset(defaults.datasets.per_class(pair.pool.y, 5, 0))
    torch.manual_seed(0)
    other = pair.student.build()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    first, second = torch.randperm(50, generator=order), torch.randperm(50, generator=order)
    for rows, lr in ((first[:32], 0.01), (first[32:], 0.0075), (second[:32], 0.0025)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(other(train.inputs(rows)), train.y[rows]).backward()
        optimizer.step()
    for one, another in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, another)


def test_plain_kl_is_cross_entropy_and_hinton_at_4(pair):
    student = pair.student.build()
    x, y = pair.pool.inputs(torch.arange(8)), pair.pool.y[:8]
    loss = defaults.loss_of(PLAIN_KL, student, pair.teacher, y, 0)(x, y)
    ours, theirs = (torch.log_softmax(net(x) / 4, 1) for net in (student, pair.teacher))
    kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student(x), y) + 16 * kl)


def test_where_data_are_not_scarce_the_default_is_plain_kl(pair):
    """Bit for bit, so no derivative is computed."""
    student = pair.student.build()
    x, y = pair.pool.inputs(torch.arange(8)), pair.pool.y[:8]
    labels = torch.arange(10).repeat(1000)
    losses = [defaults.loss_of(row, student, pair.teacher, labels, 0)(x, y) for row in (PLAIN_KL, DEFAULT)]
    assert torch.equal(*losses)
    assert defaults.jacobians_pay(5)
    assert not defaults.jacobians_pay(1000)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["defaults", "defaults-grid"])
def test_the_experiments_run(tmp_path, monkeypatch, name):
    monkeypatch.setenv("JACMATCH_CACHE", str(tmp_path / "cache"))
    assert main(["reproduce", name, "--smoke", "--per-class", "5", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert (tmp_path / "run" / "result.json").is_file()


def test_networks_have_the_names_that_run_folders_of_version_0_1_know():
    from jacmatch.teachers.cached import format as fingerprint

    assert fingerprint._name_of(two_pairs.Block) == "jacmatch.recipes.reproduce.two_pairs.Block"
