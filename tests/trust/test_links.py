"""A symbolic link, or a name that a file says, does not lead out of a run folder or a cache."""

import json
import shutil

import pytest
import torch
from tests.report.test_report import comparison as compared
from tests.report.test_report import read as page_of
from tests.teachers import cache_folders

from jacmatch.errors import InputError
from jacmatch.jobs import networks
from jacmatch.report import page, write_report
from jacmatch.runs import Run
from jacmatch.teachers import CachedTeacher

pytestmark = pytest.mark.usefixtures("all_as_users_run")
OUTSIDE = r"must lie in .*\. Got a link that leads out of it\. Copy its target"


def swap(file, target):
    """Moves a file out of its folder and leaves a link to it."""
    target.mkdir()
    shutil.move(file, target / "moved")
    file.symlink_to(target / "moved")


def use(folder):
    run = Run.open(folder)
    _ = run.result, run.environment, run.metrics()
    networks.load_student(folder)


@pytest.mark.parametrize(
    "name", ["settings.json", "result.json", "environment.json", "metrics.jsonl", "network.json", "student.safetensors"]
)
def test_a_link_does_not_lead_out_of_a_run_folder(name, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    use(tmp_path / "run")
    swap(tmp_path / "run" / name, tmp_path / "outside")
    with pytest.raises(InputError, match=OUTSIDE):
        use(tmp_path / "run")


def test_a_link_within_the_folder_and_a_link_to_it_are_followed(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "kept").mkdir()
    (tmp_path / "run" / "result.json").rename(tmp_path / "run" / "kept" / "result.json")
    (tmp_path / "run" / "result.json").symlink_to("kept/result.json")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    use(tmp_path / "link")


@pytest.mark.parametrize("name", ["jacobian_figure.npz", "seed0/labels", "figure.svg"])
def test_a_report_shows_nothing_from_elsewhere(name, tmp_path):
    run = compared(tmp_path / "run")
    if name == "figure.svg":
        result = {**run.result, "about": "", "tables": []}
        result["tables"] = [{"title": "t", "head": ["a"], "rows": [["b"]], "notes": []}]
        (run.path / "result.json").write_text(json.dumps(result))
        (run.path / name).write_text("<svg/>")
    write_report(run.path)
    swap(run.path / name, tmp_path / "outside")
    with pytest.raises(InputError, match=OUTSIDE):
        write_report(run.path)


def test_a_name_in_a_result_is_no_path(tmp_path):
    run = compared(tmp_path / "run")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text('{"step": 1, "validation_accuracy": 0.123}\n' * 2)
    result = run.result
    for method in ("../../secret", str(tmp_path / "secret"), "*", "\0"):
        result["rows"][0]["method"] = method
        assert not page._students(run, method)
    result["rows"][0]["method"] = "../../secret"
    (run.path / "result.json").write_text(json.dumps(result))
    assert "script" not in page_of(write_report(run.path)).tags


def test_a_run_inside_a_run_is_not_written_elsewhere(tmp_path):
    run = Run.create(tmp_path / "run", "train", {}, "1")
    (tmp_path / "elsewhere").mkdir()
    (run.path / "seed0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=OUTSIDE):
        run.child("seed0/labels")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["cache.json", "view-00001/places.memmap", "view-00001/shard-00000"])
def test_a_link_does_not_lead_out_of_a_cache(name, tmp_path):
    made = cache_folders.make(tmp_path / "cache")
    swap(tmp_path / "cache" / name, tmp_path / "outside")
    with pytest.raises(InputError, match=OUTSIDE):
        CachedTeacher(tmp_path / "cache").answer(cache_folders.inputs(1)[:2], made.question(1, torch.arange(2)))
