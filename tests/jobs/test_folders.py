"""Jobs that start at once without `--out` each have a folder of their own."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jacmatch.errors import InputError
from jacmatch.jobs.settings import JobFields, claimed_folder


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_next_free_number_is_taken_at_once():
    assert [str(claimed_folder("train")) for _ in range(2)] == ["runs/train-001", "runs/train-002"]
    assert Path("runs/train-002").is_dir()
    Path("runs/train-003").symlink_to("nowhere")
    assert str(claimed_folder("train")) == "runs/train-004"
    assert str(JobFields().folder("distill")) == "runs/distill-001"
    assert str(JobFields(out=Path("mine")).folder("distill")) == "mine"
    assert not Path("mine").exists()


def test_no_two_of_many_threads_have_the_same_folder():
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: claimed_folder("train"), range(64)))
    assert sorted(map(str, folders)) == [f"runs/train-{number:03d}" for number in range(1, 65)]


def test_a_file_instead_of_the_folder_is_reported():
    Path("runs").write_text("mine")
    with pytest.raises(InputError, match=r"The run folder runs \(`--out`\) must be writable"):
        claimed_folder("train")
    assert Path("runs").read_text() == "mine"


@pytest.mark.ci
def test_four_jobs_at_once_have_four_folders():
    words = ["train", "--data", "digits", "--model", "mlp:4", "--smoke", "--steps", "2", "--no-doctor", "--json"]
    command = [sys.executable, "-m", "jacmatch", *words]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = sorted(json.loads(job.communicate()[0])["out"] for job in jobs)
    assert [job.returncode for job in jobs] == [0] * 4
    assert folders == [f"runs/train-00{number}" for number in range(1, 5)]
