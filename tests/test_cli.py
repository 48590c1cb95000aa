"""The command line on tiny real jobs: every verb, `--json`, `--config`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jacmatch
from jacmatch.cli import main, summary

TRAIN = ["train", "--model", "mlp:6", "--smoke"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("here")


@pytest.fixture(scope="module")
def data(here):
    """Two classes of images in an archive: ink on the left or on the right."""
    x = np.random.default_rng(0).random((60, 1, 6, 6), dtype=np.float32) / 4
    y = np.arange(60) % 2
    for row, label in enumerate(y):
        x[row, :, :, 3 * label : 3 * label + 3] += 0.5
    np.savez(here / "two.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    return f"npz:{here}/two.npz"


@pytest.fixture(scope="module")
def trained(here):
    """A run folder with a tiny network trained on digits."""
    assert main([*TRAIN, "--out", str(here / "trained")]) == 0
    return here / "trained"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch, here):
    monkeypatch.setenv("JACMATCH_CACHE", str(here / "cache"))
    monkeypatch.chdir(tmp_path)


def result_of(words, capsys):
    """What `--json` prints, after comparing it with result.json."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    if "out" in result:
        written = json.loads((Path(result["out"]) / "result.json").read_text())
        assert {key: result[key] for key in written} == written
        assert set(result) - set(written) <= {"out", "report"}
    return result


# Jobs -------------------------------------------------------------------------------------------------------------


def test_train_on_digits(capsys):
    result = result_of([*TRAIN, "--out", "run"], capsys)
    assert result["job"] == "train"
    assert result["out"] == "run"
    assert result["student"].keys() == {"accuracy", "parameters"}
    assert result["settings"]["smoke"] is True
    assert (Path("run") / "student.safetensors").is_file()


def test_train_learns_what_can_be_learnt(data, capsys):
    words = ["train", "--data", data, "--model", "mlp:16", "--steps", "80", "--lr", "0.02", "--validation", "0"]
    assert result_of(words, capsys)["student"]["accuracy"] == 1.0


@pytest.mark.ci
def test_distill_with_no_more_arguments(capsys):
    result = result_of(["distill", "--smoke"], capsys)
    assert [row["method"] for row in result["rows"]] == ["labels", "outputs", "jacobians"]
    assert result["out"] == "runs/distill-001"
    assert Path(result["report"]).is_file()
    assert set(result["agreement"]) == {"top1", "jacobian_cosine", "jacobian_relative_error"}


@pytest.mark.ci
def test_distill_on_arrays_with_the_teacher_of_a_run(as_users_run, data, capsys):
    assert main(["train", "--data", data, "--model", "mlp:12", "--smoke", "--out", "teacher"]) == 0
    words = ["distill", "--data", data, "--teacher", "teacher", "--student", "mlp:4", "--smoke", "--per-class", "0"]
    result = result_of([*words, "--methods", "jacobians", "--probe", "random-inputs"], capsys)
    assert result["teacher_source"] == "teacher"
    assert len(result["rows"]) == 1
    benchmark = json.loads((Path(result["out"]) / "engine.json").read_text())
    assert benchmark["engine"] == min(benchmark["seconds"], key=benchmark["seconds"].get)
    assert set(benchmark["seconds"]) == {"forward", "reverse"}


@pytest.mark.ci
def test_distill_a_regression(capsys):
    words = ["distill", "--data", "synthetic:D=3,K=2,N=40,T=20", "--teacher", "mlp:8", "--student", "mlp:4", "--smoke"]
    result = result_of([*words, "--per-class", "0", "--methods", "jacobians"], capsys)
    assert "rmse" in result["student"]
    assert result["agreement"]["top1"] is None


def test_robust(capsys):
    words = ["robust", "--model", "mlp:6", "--smoke", "--penalty-weight", "0", "0.5", "--out", "robust"]
    result = result_of(words, capsys)
    assert [row["method"] for row in result["variants"]] == ["penalty-0", "penalty-0.5", "noise-0.2"]
    assert result["teacher"] is None
    assert "student.safetensors" in {file.name for file in Path("robust").iterdir()}
    assert result_of(["evaluate", "robust", "--smoke"], capsys)["job"] == "evaluate"


def test_evaluate(trained, capsys):
    result = result_of(["evaluate", trained, "--smoke"], capsys)
    assert result["student"] == json.loads((trained / "result.json").read_text())["student"]


def test_evaluate_with_weights(trained, capsys):
    words = ["evaluate", "mlp:6", "--weights", trained / "student.safetensors", "--smoke"]
    assert result_of(words, capsys)["student"] == json.loads((trained / "result.json").read_text())["student"]


def test_compare_a_network_with_itself(trained, capsys):
    result = result_of(["compare", trained, trained, "--samples", "10", "--smoke"], capsys)
    assert result["agreement"]["top1"] == 1.0
    assert result["agreement"]["largest_output_difference"] == 0.0
    assert result["agreement"]["jacobian_cosine"] == pytest.approx(1.0)


def test_doctor(capsys):
    result = result_of(["doctor", "mlp:6", "--smoke"], capsys)
    assert result["modes"]["training"]["ok"]


@pytest.mark.ci
def test_report(as_users_run, trained, capsys):
    assert main(["distill", "--teacher", "mlp:12", "--student", "mlp:6", "--smoke", "--out", "run"]) == 0
    page = Path("run") / "report.html"
    before = page.read_text()
    page.unlink()
    assert result_of(["report", "run"], capsys)["report"] == str(page)
    assert page.read_text() == before


def test_list(capsys):
    result = result_of(["list"], capsys)
    assert "random-outputs" in result["probes"]
    assert "digits" in result["data"]


@pytest.mark.ci
def test_what_a_person_reads(as_users_run, trained, data, capsys):
    def shown(*words):
        capsys.readouterr()
        assert main(list(map(str, words))) == 0
        return capsys.readouterr().out

    assert "Test accuracy %: " in shown(*TRAIN, "--out", "run")
    assert "Test accuracy %: " in shown("evaluate", trained, "--smoke")
    assert "cosine of J" in shown("compare", trained, trained, "--samples", "4", "--smoke")
    assert "engine: reverse" in shown("doctor", "mlp:6", "--smoke")
    assert "antithetic-noise" in shown("list")
    table = shown("distill", "--teacher", "mlp:12", "--student", "mlp:6", "--smoke", "--out", "comparison")
    for name in ("teacher", "labels only", "labels + outputs + Jacobians", "Report: comparison/report.html"):
        assert name in table
    table = shown("robust", "--model", "mlp:6", "--smoke", "--out", "penalties")
    for name in ("penalty λ = 0.1", "noise 0.2 in training", "standard deviations of the data"):
        assert name in table
    stopped = shown("train", "--model", "mlp:6", "--steps", "20", "--max-steps", "10", "--out", "stopped")
    assert (
        "Stopped after 10 steps. Run the same command without --max-steps to resume.\nRun folder: stopped\n" in stopped
    )


# Going on, and again ----------------------------------------------------------------------------------------------


def weights(folder):
    return (Path(folder) / "student.safetensors").read_bytes()


@pytest.mark.parametrize("source", ["folder", "settings.json", "result.json"])
def test_the_settings_of_a_run_give_the_same_run(source, trained, capsys):
    config = trained if source == "folder" else trained / source
    result = result_of(["train", "--config", config, "--out", "again"], capsys)
    assert weights("again") == weights(trained)
    assert result["student"] == json.loads((trained / "result.json").read_text())["student"]


@pytest.mark.ci
def test_a_comparison_from_its_settings(as_users_run, capsys):
    words = ["distill", "--teacher", "mlp:12", "--student", "mlp:6", "--smoke", "--methods", "outputs", "jacobians"]
    first = result_of([*words, "--seed", "3", "--lr", "0.01", "--out", "first"], capsys)
    second = result_of(["distill", "--config", "first", "--out", "second"], capsys)
    assert second["settings"] == first["settings"]
    assert weights("first") == weights("second")


def test_flags_override_the_config(capsys):
    Path("mine.yaml").write_text("model: mlp:6\nsmoke: true\nbatch-size: 16\nlr: 1e-2\nmilestones: [0.5]\nclip: 1\n")
    result = result_of(["train", "--config", "mine.yaml", "--batch_size", "8", "--no-smoke", "--steps", "5"], capsys)
    chosen = result["settings"]
    assert (chosen["model"], chosen["smoke"], chosen["batch_size"], chosen["lr"]) == ("mlp:6", False, 8, 0.01)
    assert (chosen["milestones"], chosen["clip"]) == ([0.5], 1.0)


def test_a_config_gives_the_words_too(trained, capsys):
    Path("mine.json").write_text(json.dumps({"model": str(trained), "smoke": True}))
    assert result_of(["evaluate", "--config", "mine.json"], capsys)["settings"]["model"] == str(trained)
    capsys.readouterr()
    assert main(["evaluate", "none", "--config", "mine.json"]) == 2
    assert "'none'" in capsys.readouterr().err


def test_max_steps_and_the_rest(as_users_run, trained, capsys):
    words = ["train", "--config", trained, "--out", "parts"]
    capsys.readouterr()
    assert main([*map(str, words), "--max-steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"job": "train", "finished": False, "steps": 1, "out": "parts"}
    result_of(words, capsys)
    assert weights("parts") == weights(trained)


def test_runs_are_numbered(capsys):
    assert [result_of(TRAIN, capsys)["out"] for _ in range(2)] == ["runs/train-001", "runs/train-002"]


# Version and tables -----------------------------------------------------------------------------------------------


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jacmatch {jacmatch.__version__}\n"


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_process():
    assert python("-m", "jacmatch", "--version") == f"jacmatch {jacmatch.__version__}\n"


def test_tables_are_printed_with_their_notes_and_with_what_an_experiment_is_about(capsys):
    """Two jobs print tables: `reproduce` says what it is about, `transfer` has nothing of the kind."""
    table = {"title": "Title", "head": ("row", "n = 1"), "rows": (("labels", "5.0"),), "notes": ("A note.",)}
    summary.show({"job": "transfer", "tables": [table]})
    plain = capsys.readouterr().out
    assert plain.startswith("Title\n")
    assert "labels" in plain
    assert plain.endswith("A note.\n")
    summary.show({"job": "reproduce", "about": "counts", "tables": [table]})
    assert capsys.readouterr().out == "Counts.\n\n" + plain
