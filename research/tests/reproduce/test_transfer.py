"""`jacmatch reproduce transfer`: what the tables are made of."""

import json

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.jobs import transfer as jobs
from jacmatch_research.reproduce import EXPERIMENTS
from jacmatch_research.reproduce import transfer as table
from jacmatch_research.reproduce.command import Reproduce


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACMATCH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def measured(run_folder):
    rows = ("labels only", "LwF: labels + outputs", "LwF + attention + Jacobians", "depth: the deepest pair alone")
    Reproduce(name="transfer", smoke=True, rows=rows, out=run_folder / "table").run()
    return run_folder / "table", json.loads((run_folder / "table" / "results.json").read_text())


@pytest.mark.ci
def test_the_table_is_made_of_the_stored_numbers(measured):
    folder, document = measured
    experiment = EXPERIMENTS["transfer"]
    cells = {cell["row"]: cell["measures"] for cell in document["cells"]}
    accuracy, ablations, distance_table, bounds, apart = experiment.tables(document)
    for row, text in accuracy.rows[:3]:
        assert text == f"{100 * cells[row]['accuracy']:.1f}"
    gain = cells["LwF: labels + outputs"]["accuracy"] - cells["labels only"]["accuracy"]
    assert dict(accuracy.rows)["gain: LwF: labels + outputs − labels only"] == f"{100 * gain:+.1f}"
    assert ablations.rows[-1][:2] == (
        "depth: the deepest pair alone",
        f"{100 * cells['depth: the deepest pair alone']['accuracy']:.1f}",
    )
    assert [row[0] for row in bounds.rows] == ["n = 5: LwF: labels + outputs", "n = 5: LwF + attention + Jacobians"]
    assert len(distance_table.rows) == 3
    assert len(apart.rows) == 4
    assert (folder / "figure.svg").read_bytes() == experiment.figure(document)
    assert str(folder) not in json.dumps(document)


@pytest.mark.ci
def test_a_cell_is_the_same_when_it_is_measured_again(measured):
    _, document = measured
    request = Reproduce(name="transfer", smoke=True)
    (cell,) = [each for each in table.TRANSFER_TABLE.cells(request) if each.row == "LwF + attention + Jacobians"]
    again = table.TRANSFER_TABLE.measure(request, cell, document["facts"])
    (stored,) = [each["measures"] for each in document["cells"] if each["row"] == cell.row]
    assert {**again, "train_seconds": 0} == {**stored, "train_seconds": 0}


@pytest.mark.ci
def test_published_numbers_stand_in_their_columns_and_unconfirmed_ones_nowhere():
    assert table.TRANSFER["lwf+attention+jacobians"] == {"25": 47.31, "50": 58.35, "all": 67.31}
    assert {column for values in table.TRANSFER.values() for column in values} == {"25", "50", "all"}


@pytest.mark.ci
def test_other_data_need_a_pretrained_teacher():
    with pytest.raises(InputError, match=r"`reproduce transfer` must be given a pretrained teacher for such data"):
        Reproduce(name="transfer", data="synthetic").run()


@pytest.mark.ci
def test_recipes_have_a_table_of_their_own(run_folder):
    adapt = "probe on the teacher, then its outputs; 900 unlabelled"
    Reproduce(name="transfer", smoke=True, rows=("labels, mixed pairs", adapt), out=run_folder / "recipes").run()
    document = json.loads((run_folder / "recipes" / "results.json").read_text())
    cells = {cell["row"]: cell["measures"] for cell in document["cells"]}
    recipes, cosines, apart = EXPERIMENTS["transfer"].tables(document)
    rows = {row: rest for row, *rest in recipes.rows}
    gain = cells[adapt]["accuracy"] - cells["labels, mixed pairs"]["accuracy"]
    assert rows[adapt][:4] == [
        f"{100 * cells[adapt]['accuracy']:.1f}",
        f"{100 * gain:+.1f}",
        "1",
        f"{100 * cells[adapt]['probe_accuracy']:.1f}",
    ]
    assert rows[adapt][-1] == "–"  # two steps have no curve
    for late, whole, converged in ((0.1, 0.5, "yes"), (0.3, 0.5, "no"), (0.1, 0.2, "no")):
        for cell in document["cells"]:
            cell["measures"] |= {"late_fall": late, "whole_fall": whole}
        assert {row[-1] for row in EXPERIMENTS["transfer"].tables(document)[0].rows} == {converged}
    assert (recipes.name, cosines.name, apart.name) == ("recipes", "cosines", "distances")
    names = ("random rows", "low frequencies", "data pairs")
    assert cosines.rows == ((adapt, "5", *(f"{cells[adapt][f'cosine {name}']:.3f}" for name in names)),)
    assert (run_folder / "recipes" / "figure.svg").read_bytes() == EXPERIMENTS["transfer"].figure(document)


@pytest.mark.ci
def test_semi_supervised_rows_need_no_pretrained_teacher(run_folder, monkeypatch):
    rows = ("labels, mixed pairs", "mean teacher; 900 unlabelled", "self-training; 900 unlabelled")
    monkeypatch.setattr("jacmatch.jobs.transfer.probed", lambda *_: pytest.fail("a probe was fitted"))
    Reproduce(name="transfer", smoke=True, rows=rows, out=run_folder / "semi").run()
    document = json.loads((run_folder / "semi" / "results.json").read_text())
    cells = {cell["row"]: cell["measures"] for cell in document["cells"]}
    assert set(cells) == set(rows)
    assert all(0 <= each["accuracy"] <= 1 for each in cells.values())
    assert all(cells[row]["steps"] == 2 for row in rows)


def test_a_mean_teacher_is_the_moving_average_of_the_student():
    student = torch.nn.Linear(1, 1)
    with torch.no_grad():
        student.weight.fill_(1.0)
        student.bias.zero_()
    teacher = table.MeanTeacher(student, (), decay=0.75)
    x = torch.ones(1, 1)
    assert float(teacher.answer(x).outputs) == 1
    with torch.no_grad():
        student.weight.fill_(5.0)
    assert float(teacher.answer(x).outputs) == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert not teacher.answer(x).outputs.requires_grad


@pytest.mark.ci
def test_a_teacher_is_adapted_again_for_other_numbers_of_images(run_folder, monkeypatch):
    """Columns of a table in one process: neither the probe nor the memory is that of another column."""
    row = "probe on the teacher, then its outputs; 900 unlabelled"
    request = Reproduce(name="transfer", smoke=True, per_class=(3, 5), rows=(row,))
    cells = [cell for cell in table.TRANSFER_TABLE.cells(request) if cell.row == row]
    seen = []

    class Stop(Exception):
        pass

    def taught(self, method, ready, labelled, images, seed, held_out=None):
        seen.append((ready.memories, ready.adapted))
        raise Stop

    monkeypatch.setattr(jobs.Transfer, "taught", taught)
    for cell in (*cells, cells[-1]):
        with pytest.raises(Stop):
            table.TRANSFER_TABLE.measure(request, cell, {})
    assert [cell.column for cell in cells] == ["3", "5"]
    for first, second, again in zip(*seen, strict=True):
        assert first is not second
        assert second is again


@pytest.mark.ci
def test_the_objective_of_every_row_can_be_built(run_folder):
    """Settings of a row that do not go together would be found after the hours of the rows before it."""
    request = Reproduce(name="transfer", smoke=True)
    for cell in table.TRANSFER_TABLE.cells(request):
        if (method := cell.settings["method"]) not in table.WITHOUT_TEACHER:
            recipe = table._recipe(request, cell.settings)
            ready = table._ready(request, recipe)
            recipe.network_and_objective(method, 0, ready)
            recipe.training_of(method, 0)
