"""Run folders: nothing half written, nothing of another run touched, every refusal says why."""

import errno
import json
import os
import warnings

import pytest
import torch

from jacmatch.errors import InputError
from jacmatch.runs import Run, environment, read_metrics, spread
from jacmatch.runs.folder import warn_of_changes

VERSION = "0.0.1"
SETTINGS = {"lr": 0.1, "layers": [1, 2], "nested": {"a": 1}}


def begun(folder, settings=SETTINGS, job="train", version=VERSION):
    return Run.create(folder, job, settings, version)


def result(**changes):
    network = {"accuracy": 0.5, "parameters": 10}
    whole = {
        "job": "train",
        "version": VERSION,
        "seed": 0,
        "teacher": None,
        "student": network,
        "agreement": {"top1": None, "jacobian_cosine": None, "jacobian_relative_error": None},
        "seconds": 1.5,
        "samples_per_second": 10.0,
        "peak_memory_bytes": 1,
        "settings": SETTINGS,
    }
    return {**whole, **changes}


def test_a_run_from_begin_to_end(tmp_path):
    run = begun(tmp_path / "a" / "b")
    assert not run.resumed
    assert not run.finished
    run.log({"step": 1, "loss": 0.5})
    run.log({"step": 2, "loss": 0.25})
    run.write_json("notes.json", {"x": [1, None]})
    run.write_result(result())
    again = Run.open(run.path)
    assert again.settings == SETTINGS
    assert again.result == result()
    assert [row["step"] for row in again.metrics()] == [1, 2]
    assert {"python", "platform", "cpus", "started"} <= again.environment.keys()
    assert not list(run.path.glob(".*"))


def test_the_same_job_goes_on_and_another_is_refused(tmp_path):
    begun(tmp_path).log({"step": 1})
    again = begun(tmp_path)
    assert again.resumed
    assert len(again.environment["resumed"]) == 1
    cases = {
        r"of `train`, not of `distill`": lambda: begun(tmp_path, job="distill"),
        r"other settings: lr \(0.1 there, 0.2 here\)": lambda: begun(tmp_path, {**SETTINGS, "lr": 0.2}),
        r"nested.a \(1 there, nothing here\)": lambda: begun(tmp_path, {**SETTINGS, "nested": {}}),
        r"of version 0.0.1, not 9": lambda: begun(tmp_path, version="9"),
    }
    before = (tmp_path / "settings.json").read_bytes()
    for message, deed in cases.items():
        with pytest.raises(InputError, match=message):
            deed()
    assert (tmp_path / "settings.json").read_bytes() == before


def test_at_most_eight_differences_are_listed(tmp_path):
    begun(tmp_path, {f"s{n}": n for n in range(12)})
    with pytest.raises(InputError, match=r"and 4 more"):
        begun(tmp_path, {f"s{n}": n + 1 for n in range(12)})


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    begun(tmp_path / "done").write_result(result())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "settings.json").write_text('{"job": "tra')
    for name, message in {
        "file": "Got a file",
        "full": "contains 'thesis.txt'",
        "done": "a finished run of `train`",
        "torn": "torn",
    }.items():
        with pytest.raises(InputError, match=message):
            begun(tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"
    for name, message in {"none": "no folder of that name", "full": "without settings.json"}.items():
        with pytest.raises(InputError, match=message):
            Run.open(tmp_path / name)


def test_an_unfinished_or_torn_result_is_refused(tmp_path):
    run = begun(tmp_path)
    with pytest.raises(InputError, match="must contain a finished run"):
        Run.open(tmp_path)
    assert Run.open(tmp_path, finished=False).settings == SETTINGS
    (run.path / "result.json").write_text('{"job": ')
    with pytest.raises(InputError, match=r"result\.json"):
        Run.open(tmp_path)


def test_a_torn_last_line_of_the_metrics_is_left_out_and_mended(tmp_path):
    run = begun(tmp_path)
    run.log({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    begun(tmp_path).log({"step": 2})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(tmp_path)


def test_rewinding_drops_later_rows_only(tmp_path):
    run = begun(tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step})
    run.rewind(2)
    assert [row["step"] for row in run.metrics()] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agreement": {}}, "agreement"),
        ({"student": {"accuracy": 1.5, "parameters": 10}}, "accuracy"),
        ({"student": {"parameters": 10}}, "accuracy"),
        ({"seconds": float("nan")}, "seconds"),
        ({"job": "distill"}, "job"),
        ({"settings": {}}, "settings"),
        ({"version": "2"}, "version"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_a_wrong_result_is_refused_and_not_written(tmp_path, change, message):
    run = begun(tmp_path)
    with pytest.raises(InputError, match=message):
        run.write_result(result(**change))
    assert not run.finished
    assert not list(tmp_path.glob(".*-part"))


def test_the_result_is_written_once(tmp_path):
    run = begun(tmp_path)
    run.write_result(result())
    with pytest.raises(InputError, match="once"):
        run.write_result(result())


def test_a_finished_run_stays_finished_until_its_result_is_replaced(tmp_path):
    begun(tmp_path).write_result(result())
    again = Run.create(tmp_path, "train", SETTINGS, VERSION, again=True)
    assert again.result == result()
    for deed in (lambda: again.write_result(result()), lambda: again.write_result(result(seconds=-1), again=True)):
        with pytest.raises(InputError):
            deed()
    assert Run.open(tmp_path).result == result()
    again.write_result(result(seconds=2.0), again=True)
    assert Run.open(tmp_path).result == result(seconds=2.0)


def test_a_kill_before_the_rename_leaves_no_result(tmp_path, monkeypatch):
    run = begun(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.write_result(result())
    assert not run.finished
    begun(tmp_path).write_result(result())
    assert Run.open(tmp_path).result == result()
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"[Nn]o space"):
            begun(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("written", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch, written, error):
    """Neither when the settings nor when, after them, the environment cannot be written."""
    real, calls = os.replace, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) > written:
            raise error
        real(*paths)

    (tmp_path / "mine").mkdir()
    for folder in ("a/b/new", "mine"):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with pytest.raises((InputError, KeyboardInterrupt)):
                begun(tmp_path / folder)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine"]


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refused)
        with pytest.raises(InputError, match=r"Read-only file system.*Choose another --out"):
            begun(tmp_path / "new")


def test_a_run_folder_that_cannot_be_read_is_not_called_the_output(tmp_path, monkeypatch):
    run = begun(tmp_path / "run")

    def refused(*_, **__):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    message = rf"The run folder {run.path} must be readable\. Got 'Permission denied'\. Check its permissions\.$"
    with pytest.raises(InputError, match=message):
        Run.open(run.path, finished=False)


def test_names_stay_inside_the_folder(tmp_path):
    run = begun(tmp_path / "run")
    for name in ("../x", "a/../../x", "/x", "settings.json", ""):
        with pytest.raises(InputError, match=r"name|file that the run writes"):
            run.write_bytes(name, b"x")
    with pytest.raises(InputError, match="name"):
        run.child("../other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_children_have_settings_and_results_of_their_own(tmp_path):
    run = begun(tmp_path)
    child = run.child("seed0/labels", {**SETTINGS, "seed": 0})
    child.write_result(result(settings=child.settings))
    assert run.child("seed0/labels", {**SETTINGS, "seed": 0}).finished
    with pytest.raises(InputError, match="other settings"):
        run.child("seed0/labels", {**SETTINGS, "seed": 1})


def test_settings_must_be_json(tmp_path):
    with pytest.raises(InputError, match="settings"):
        begun(tmp_path / "x", {"lr": float("inf")})
    assert not (tmp_path / "x").exists()


def test_spread_is_the_sample_standard_deviation():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert spread([1.0])["std"] is None
    with pytest.raises(InputError, match="at least one"):
        spread([])


def test_the_environment_is_plain_json_without_paths():
    text = json.dumps(environment("a GPU"))
    assert "a GPU" in text
    assert os.path.expanduser("~") not in text


def test_another_number_of_threads_or_version_is_recorded_and_warned_of(tmp_path, monkeypatch):
    assert begun(tmp_path).environment["threads"] == torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(tmp_path)
    before = (
        rf"started with threads {torch.get_num_threads()}, and is resumed with threads 7\. The result equals that of a"
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.warns(UserWarning, match=before):
        run = begun(tmp_path)
    assert run.environment["resumed"][-1]["threads"] == 7
    with pytest.warns(
        UserWarning, match=r"started with torch 1\.0, cuda None, and is resumed with torch 2\.0, cuda a GPU\."
    ):
        warn_of_changes({"torch": "1.0", "cuda": None}, {"torch": "2.0", "cuda": "a GPU", "threads": 3})


def test_what_a_process_left_that_was_killed_after_the_result_goes(tmp_path):
    begun(tmp_path).write_result(result())
    whole = sorted(os.listdir(tmp_path))
    for name in ("checkpoint.pt", ".lock", ".student.safetensors.7.jacmatch-part"):
        (tmp_path / name).write_text("left")
    with pytest.raises(InputError, match="a finished run"):
        begun(tmp_path)
    assert sorted(os.listdir(tmp_path)) == whole


def test_the_checkpoint_goes_with_the_result(tmp_path):
    run = begun(tmp_path)
    (tmp_path / "checkpoint.pt").write_text("all that is needed to go on")
    run.write_result(result())
    assert not (tmp_path / "checkpoint.pt").exists()
